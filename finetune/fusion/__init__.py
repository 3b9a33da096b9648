"""Fusions: two modalities attend to each other.

A fusion is ONE file with a Config and build(...) -> Fusion.

    cross.py     the query attends to the context: text to image regions (ALBEF, BLIP); with `causal` it is a decoder
    co.py        both attend to each other in every layer, each in its own width (ViLBERT, METER)
    merged.py    one stream over the concatenation, with one set of weights (ViLT)
    blocks.py    the branches that all fusions are made of, and the base classes of fusions and their Configs

    module = registry.get_component("fusion", config.name)
    fusion = module.build(config, {"text": 512, "image": 768}, context=context_config, image_modalities=("image",))
    fused = fusion({"text": text_tokens, "image": image_tokens})      # TokenSequences, the same names and widths

Every branch ends in a ZeroInitLinear, a projection that starts at zero, so an untrained fusion returns its input tokens bit for
bit. `pooled` of a fused sequence is the masked mean of its states. A fusion that gets a `trace` records its attention weights
in it, for maps. With several texts per image, the query has m times the rows of the context: rows i m .. i m + m - 1 are
about image i. Keys carry position encodings of image regions and words. May import finetune.attention, finetune.context
and pretrain.
"""
