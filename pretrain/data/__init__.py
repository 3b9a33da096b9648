"""Reading, decoding and batching of sharded image-text data.

    config.py           the `data` section of the configuration, and the shards and sample counts that it stands for
    loader.py           the training loader: endless batches, resumable from a saved position
    eval_loader.py      the evaluation loader: each sample exactly once over all processes
    order.py            which sample is read at which position of the run: pure functions of (seed, position)
    batch_sizes.py      the size of each batch of the run, and the position of its first sample
    shuffle.py          the shuffled, endless sample sequence of one source, and the counter-based random numbers
    worker.py           the data sets that a worker process reads and decodes, and the settings of such a process
    worker_pool.py      starts worker processes, keeps their results in order, reports a worker that died
    prefetch.py         fetches and indexes the shards of coming windows ahead of the workers
    batch.py            Batch, the Decoder protocol, and collation
    images.py           ImageDecoder: augmentation, resizing and cropping
    device_images.py    JPEGs decoded on the device: data.decode_on
    decode.py           encoded images to pixels
    audio.py            AudioDecoder: cropping and padding of sounds
    audio_files.py      encoded sounds to samples at any rate
    thumbnails.py       small JPEGs of whole images, for pages
    text.py             TextDecoder: captions to token ids; loading of tokenizers
    length_groups.py    groups of texts of similar length, in the same shapes for every batch
    text_packing.py     several texts in a row, in the same shapes for every batch
    captions.py         the captions of a sample, cleaned
    training_captions.py   captions for pretraining with their weights, and negatives: data.weight and data.negatives
    caption_statistics.py  lengths of captions, and captions that are hardly meant to be captions
    teacher_settings.py values of data.teachers, and what goes with them
    teachers.py         stored embeddings of teachers, looked up by key: data.teachers
    members.py          explains why a sample lacks an image, a sound or a caption
    sample_json.py      the json member of a sample, parsed
    filter_expression.py   conditions on the fields of a sample, and their evaluation; filter_parser.py reads them
    sample_filter.py    the samples that training passes over: data.keep and data.skip
    train_tokenizer.py  trains a byte-level BPE tokenizer on captions
    vocabulary.py       words for the objects of a data set; vocabularies/ holds those that ship with the package
    check.py            verifies shards before training
    key_digests.py      digests of keys, by which stored embeddings are found
    job_pool.py         processes that work on one job after the other, as those that write shards
    synthetic.py        data.train=synthetic: noise images and random captions, without files

    shards/             finding, counting, indexing, fetching and reading tar shards
    reinforced/         embeddings, augmentations and captions that samples bring along (DataCompDR): data.teachers=samples
    pack/               packing of folders, tables and tars into shards
    filter/             curation: rules of captions, near-duplicates, similarity, balance -> fewer shards, or a list
    scenes/             the built-in data set of drawn scenes; of the other packages only `launch` imports it

May import `pretrain.runtime`, `pretrain.config`, `pretrain.registry`, `pretrain.optim`, `pretrain.ops` and `pretrain.errors`.
"""


class BadSample(Exception):  # noqa: N818 - describes the sample, not an error of the program
    """The content of a sample cannot be used: it has no image, an unreadable image or no caption.

    Training replaces the sample and counts it by `reason`; evaluation leaves it out and counts it. A failing disk or
    network is never a BadSample: those are OSErrors, which are retried and then stop the run.

    Args:
        reason: a short fixed phrase to count by ("no caption", "image unreadable"), the same for every sample of its kind.
        detail: the particulars of this sample, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args, so that the exception survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class MissingContent(BadSample):
    """A sample has nothing of a modality, in contrast to content that cannot be used."""
