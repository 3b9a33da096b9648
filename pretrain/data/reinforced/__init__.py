"""Reinforced data sets: samples that hold the embeddings of teachers, and the augmentations and captions that these were of.

    npz_embeddings.py   KEY.npz: embeddings, read without unpickling
    augmentation.py     KEY.paug.json: stored augmentations, and their exact application
    decoders.py         the image decoder that applies them, and the decoder of the embeddings that belong to what was drawn

The layout is DataCompDR's. A sample KEY with A augmentations and S synthetic captions has these members:

    KEY.jpg         the image, which the user adds
    KEY.txt         its caption
    KEY.syn.json    {"syn_text": [S texts]}
    KEY.paug.json   {"param_aug": "[A augmentations]"}, the list as json within a text, or as it is
    KEY.npz         image_emb (A, D): of each augmentation; text_emb (1 + S, D): of KEY.txt, then of each synthetic caption

The embeddings of several teachers stand side by side in D.

Source: Vasu et al., MobileCLIP, arXiv:2311.17049; Faghri et al., Dataset reinforcement, arXiv:2303.08983.
"""
