"""What of the pretrained encoders is trained: freezing, low-rank adapters, another image size.

    freeze.py    AdaptConfig; freezing by tower, block, name or use; resizing the image tower
    lora.py      low-rank adapters in the towers' linear layers, and their merge into the plain weights

May import pretrain, and nothing of finetune outside this package.
"""
