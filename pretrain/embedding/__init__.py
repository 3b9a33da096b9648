"""Embeddings: of batches, of a split in memory, and of whole data sets in Parquet files.

encoder.py      batches encoded one after the other, on a GPU without waiting between them; a function that encodes texts
split.py        a split embedded in memory, by all processes together; evaluation starts from it
job.py          `clipfuse embed`: a data set embedded into a folder of files, on any number of processes
manifest.py     what it is to write: the columns of the files, and the manifest
summary.py      what that command prints at its end
options.py      the command-line options of `clipfuse embed`
dataset.py      the embedding folder: its files, manifest and lock; its content loaded into memory
parquet.py      the columns of the files, a thread that writes them, and how they are read
teachers.py     embedding folders as teachers of pretraining: checked, and turned into arrays that are mapped into memory
aligned.py      embedding folders in the order of given samples, for the curation of shards
work_queue.py   counters that processes share to divide the files among them, and the progress of all processes

May import pretrain.checkpoints, formats, model, data and what lies below them, but neither training nor evaluation.
"""
