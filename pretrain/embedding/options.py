"""The words of `clipfuse embed`, of `python -m pretrain.embedding.job` alike. Imports nothing heavy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from pretrain.errors import ConfigError


@dataclass
class Options:
    """What is embedded, and how."""

    data: list[str]
    """Shards: globs, brace patterns, folders, urls."""
    out: str
    """The folder of the collection; one that was begun is gone on with."""
    only: str = ""
    """One modality (image, text, ...); empty = all that the model has."""
    tokens: str = ""
    """Keep token features too: own (the towers' states) or shared (projected into the shared space)."""
    dtype: str = "float16"
    """Of the numbers in the files: float16 or float32."""
    precision: str = "fp32"
    """Of the towers' matrix products: fp32, bf16, fp16."""
    batch_size: int = 256
    """Samples encoded at a time, per process."""
    workers: int | None = None
    """Processes that read and decode, per process; none = one a core where a GPU encodes, else one."""
    per_file: int = 0
    """Most samples of a file; 0 = 16,384, fewer where several processes share a small collection."""
    caption: str = ""
    """Where captions are: txt, or a field of the json; empty = where the model's training found them."""

    def check(self) -> None:
        """Raises ConfigError."""
        for name, least in (("batch_size", 1), ("per_file", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The options, with their defaults."""
    p.add_argument("run", metavar="RUN", help="a run folder, a checkpoint folder, or a published CLIP")
    p.add_argument("--data", required=True, nargs="+", metavar="SHARDS", help="globs, brace patterns, folders or urls")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the embeddings; what is there is gone on with")
    p.add_argument("--only", default="", metavar="MODALITY", help="image or text (default: both)")
    p.add_argument("--tokens", default="", choices=["own", "shared"], help="token features too: the towers' own, or projected")
    p.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="in the files (default float16)")
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the towers (default fp32)")
    p.add_argument("--batch-size", type=int, default=256, metavar="N", help="samples at a time, per process (default 256)")
    p.add_argument("--workers", type=int, metavar="N", help="processes that decode, per process (default: by the cores)")
    p.add_argument("--per-file", type=int, default=0, metavar="N", help="most samples of a file (default 16384)")
    p.add_argument("--caption", default="", metavar="FIELD", help="txt, or a field of the json (default: the model's)")
    p.add_argument("--json", action="store_true", help="print one JSON object at the end")


def build_argv(args: argparse.Namespace) -> list[str]:
    """The same options as words again, for the processes a launcher starts."""
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in Options.__dataclass_fields__ if name != "data"}
    given = [word for flag, value in flags.items() if value not in ("", None) for word in (flag, str(value))]
    return [args.run, *given, *(["--json"] if args.json else []), "--data", *args.data]


def build_options(args: argparse.Namespace) -> Options:
    """What was asked for. Raises ConfigError."""
    made = Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
    made.check()
    return made
