"""Maps of what each word of a text attends to in an image or a sound, computed from a model's predictions.

    word_maps.py      the maps of one image or sound and one text
    examples.py       such maps for some samples of a data set, for a report
    attribution.py    a trace -> one map per token: raw | rollout | gradcam | relevance
    similarity.py     projected tokens and cells -> one map per token, without a fusion: similarity
    token_spans.py    which tokens belong to which characters and words of a text
    heatmap.py        maps drawn on images, with Pillow alone
    spectrogram.py    the picture of a sound that maps are drawn on

May import finetune.loading and the layers below it, and pretrain. finetune.grounding measures these maps.
"""
