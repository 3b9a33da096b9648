"""Checkpoints: how they are written, verified, loaded, used to start another run, and exported.

store.py        checkpoint folders: found, checked against their manifests, and read
writing.py      one checkpoint folder, written so that it is complete or not there
background.py   a thread that writes checkpoints while training goes on
remote.py       copies of checkpoints in an object store or another folder, uploaded and downloaded
uploading.py    a thread that copies complete checkpoints to train.copy_to
rotation.py     which checkpoints are deleted after a save, or set aside when a run leaves them
loading.py      a checkpoint or a published model as model, tokenizer and decoders, ready to encode
warm_start.py   `init`: architecture, tokenizer and weights that a new run takes from another run or a published model
resuming.py     what a resumed run takes from its checkpoint, and what must not differ from it
export.py       a run as a folder that transformers, open_clip or onnxruntime loads, compared with the run

May import pretrain.formats, model, data and what lies below them, but neither training, embedding nor evaluation.
"""
