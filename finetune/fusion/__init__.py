"""Fusions: two modalities, any two, read each other. A fusion is ONE file with a Config and build(...) -> Fusion.

    cross.py     one asks, the other answers: text reads image regions (ALBEF, BLIP); causal, it is a decoder
    co.py        both ask at every layer, each in its own width (ViLBERT, METER)
    merged.py    one stream over the concatenation, one set of weights (ViLT)
    blocks.py    what they are made of, and the base of their Configs

    part = registry.get_component("fusion", config.name)
    fusion = part.build(config, {"text": 512, "image": 768}, context=context_config, pictures=("image",))
    fused = fusion({"text": text_tokens, "image": image_tokens})      # TokenSequences, the same names and widths

Every branch ends in a ZeroInitLinear, a projection that starts at zero, so an untrained fusion returns the tokens it was given,
bit for bit. `pooled` of a fused sequence is the masked mean of its states. Handed a `trace`, a fusion fills it for maps.py.
Several texts about one picture: the batch of the query may be m times the context's, rows i m .. i m + m - 1 are about
picture i. Who asks is told where each region or word stands (places.py). May import attention.py, places.py, context, trace.py
and pretrain's floors.
"""
