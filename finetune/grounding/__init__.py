"""Grounding: whether the map of a word highlights the objects that the word names.

    evaluate.py         the measurement on shards: pointing game, attention lift, exchanged colors, controls; and its table
    probes.py           one batch of images with boxes -> scores of words' maps
    phrases.py          which words of a text name which objects of its image
    pointing_game.py    scores of one map against boxes, and their confidence intervals

May import finetune.explain and the layers below it, and pretrain.
"""
