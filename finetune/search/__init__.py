"""Search: an index of images, and queries in words that filter, find and re-rank.

    vector_index.py   VectorIndex, the contract of every backend: upsert, delete, search, get, count, describe
    fields.py         which fields of the samples an index keeps, and their kinds
    filters.py        filters bound to the kinds of fields, and translated for each backend
    exact.py          a folder of files that is compared row by row; nearest.py: the comparison
    exact_files.py    its files; compaction.py: the space of images that were replaced
    milvus.py         Milvus Lite in a folder, or a Milvus server
    image_sources.py  shards and folders as sources of images; images read again
    indexing.py       images into an index
    embeddings.py     what `clipfuse embed` wrote into an index
    query.py          texts and images as queries, and what they find
    captions.py       BM25 over captions, and the fusion of rankings
    reranking.py      a retrieval run that scores candidates; token_store.py: its token features, beside the index
    maps.py           where the re-ranker looked for each word of a query
    answering.py      a vqa run that answers questions about images
    judged_queries.py files of queries and of judgments
    evaluation.py     nDCG, MRR and recall of an index, before and after re-ranking
    places.py         the name of a place decides which backend it is

The language of filters is that of pretrain.data.filter_expression. May import finetune.loading and all that it may import, and
pretrain.embedding.
"""
