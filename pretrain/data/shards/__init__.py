"""Tar shards in WebDataset format: finding, counting, indexing, fetching and reading them.

    paths.py   expands globs, brace patterns, folders and urls to shards, and counts their samples
    names.py   the names of shards in sample keys
    index.py   the byte range of each member of each sample, saved beside the shard or in the cache folder
    tar.py     scans the headers of a tar file and verifies that the archive is whole
    cache.py   fetches remote shards into a folder of this machine; retries input/output errors
    reader.py  random access to samples by byte range

May import `pretrain.runtime`, `pretrain.errors` and `pretrain.data.BadSample`.
"""
