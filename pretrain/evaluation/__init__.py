"""Evaluation of image and text encoders: retrieval, zero-shot classification, a linear probe.

evaluate.py       evaluate(): the metrics of a model on shards, on any number of processes; results as a table
retrieval.py      recall at k and median rank, between any two modalities
languages.py      retrieval within each language of a multilingual split
zero_shot.py      classification by the embeddings of sentences that name the classes
chance.py         what answers that ignore the input would score
linear_probe.py   logistic regression on the image tower's frozen output

May import everything in pretrain but train.py; of this package, the other files need embeddings only, no model.
"""
