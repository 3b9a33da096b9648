"""Shards in, batches out.

    shards.py      find and count tar shards; index.py: where their samples lie; tar.py: their format; cache.py: remote ones
    reader.py      any sample by byte range; check.py: are they all good?
    order.py       which sample is read when: pure functions of (seed, position); sequence.py: one source of it
    loader.py      training batches, state out and in; sequential.py: evaluation's, each sample once
                   (batch.py, sources.py, synthetic.py; worker.py: what a worker process does; pool.py: keeps them;
                   scout.py: fetches ahead)
    images.py      augment, resize; decode.py: bytes to pixels
    text.py        token ids, trimmed; captions.py: which text; tokenizer.py: trains one
    pack.py        anything -> shards, with pack_*.py and tables.py
    vocabulary.py  the words for objects that a data set brings; vocabularies/: those that ship with the package
    scenes.py      the built-in data set, with scene_*.py; of the project only `launch` imports it

May import `pretrain.runtime.distributed`, `pretrain.registry` and `pretrain.config`; nothing above them.
"""


class BadSample(Exception):  # noqa: N818 - says what is wrong with the sample, not with the program
    """The CONTENT of a sample cannot be used: no picture, an unreadable one, no caption.

    Training replaces the sample and counts it by `reason`; evaluation leaves it out and counts it. A failing disk or
    network is never a BadSample: those are OSErrors, which are retried and then stop the run.

    Args:
        reason: a short fixed phrase to count by ("no caption", "image unreadable"), the same for all of its kind.
        detail: what was seen in this sample, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args: the exception survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
