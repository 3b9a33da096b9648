"""Tar shards in WebDataset format: finding, counting, indexing, fetching and reading them.

    paths.py     expands globs, brace patterns, folders and urls to shards, and counts their samples
    names.py     the names of shards in sample keys
    counts.py    counts from files beside the shards (manifest, stats), or from the headers of a remote shard
    index.py     the byte range of each member of each sample, saved beside the shard or in the cache folder
    tar.py       scans the headers of a tar file and verifies that the archive is whole
    cache.py     a folder of this machine with copies of remote shards: locked, bounded, verified
    urls.py      which shards are remote; requests over HTTP, and streams of servers and commands
    ranges.py    byte ranges of remote files
    transfer.py  copies remote files whole, in parallel parts
    retries.py   retries after input/output errors
    stores.py    object stores (s3, gs, az, hf) through fsspec
    reader.py    random access to samples by byte range

May import `pretrain.runtime`, `pretrain.errors` and `pretrain.data.BadSample`.
"""
