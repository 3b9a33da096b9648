"""Backends: what a VectorIndex stands on. The name of a place decides which, see places.py.

    exact.py          a folder of files that is compared row by row; nearest.py: the comparison
    exact_files.py    its files
    milvus.py         Milvus Lite in a folder, or a Milvus server

May import the contract (vector_index.py), fields, filters and captions of finetune.search.
"""
