"""Multi-head attention, position encodings for its keys, and a record of its weights.

    multihead.py    attention between two token sequences: a fast path, and an exact path that returns the weights
    positions.py    Fourier encodings of where image regions and words stand, appended to keys
    trace.py        the weights that the exact path records, and how they read as a matrix over tokens

The lowest layer of finetune: it imports nothing of finetune outside this package, and of pretrain only pretrain.errors.
"""
