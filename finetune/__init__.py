"""finetune: aligned encoders -> cross-attention, and maps of what each word looked at.

    attention.py    multi-head attention: a fast path, and an exact one that returns the weights
    trace.py        what the exact path leaves behind
    context/        how a picture is attended to: dense | local | coarse_to_fine | pooled
    fusion/         who asks whom: cross | co | merged
    maps.py         a trace -> one map a word on the picture's grid: raw | rollout | gradcam | relevance

Imports pretrain, never launch. Floors, each importing only those before it: trace, attention, context, fusion; maps
needs trace alone. Importing this package makes its rooms known to pretrain.registry.
"""

from pretrain import registry

registry.add_package("finetune")
