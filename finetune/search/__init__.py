"""Search: an index of images or sounds, and queries in words that filter, find and re-rank.

    vector_index.py   VectorIndex, the contract of every backend: upsert, delete, search, get, count, describe
    fields.py         which fields of the samples an index keeps, and their kinds
    filters.py        filters bound to the kinds of fields, and translated for each backend
    backends/         a folder compared row by row, and Milvus
    compaction.py     the space of what was replaced
    modalities.py     what an index holds: members of samples, thumbnails, fields of their own
    item_sources.py   shards and folders as sources of images and sounds; files read again
    opening.py        an index opened for writing, or made: of which model and modality, with which options
    indexing.py       images or sounds into an index
    embeddings.py     what `clipfuse embed` wrote into an index
    query.py          texts, images and sounds as queries, and what they find
    captions.py       BM25 over captions, and the fusion of rankings
    reranking.py      a retrieval run that scores candidates; token_store.py: its token features, beside the index
    maps.py           where a model looked for each word of a query
    answering.py      a vqa run that answers questions about results
    judged_queries.py files of queries and of judgments
    evaluation.py     nDCG, MRR and recall of an index, before and after re-ranking
    places.py         the name of a place decides which backend it is

The language of filters is that of pretrain.data.filter_expression. May import finetune.loading and all that it may import, and
pretrain.embedding.
"""
