"""The command-line options of `clipfuse embed` and of `python -m pretrain.embedding.job`.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from pretrain.config import check_numbers
from pretrain.config.arguments import count, nonempty, positive_int, whole_number
from pretrain.errors import ConfigError


@dataclass
class Options:
    """Which data is embedded, and how."""

    data: list[str]
    """Shards: globs, brace patterns, folders, urls."""
    out: str
    """The embedding folder; if an earlier command began it, its missing files are written."""
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
    """Most samples of a file; 0 = 16,384, fewer where several processes share a small data set."""
    caption: str = ""
    """Where captions are: txt, or a field of the json; empty = where the model's training read them."""

    def check(self) -> None:
        """Refuse numbers that are too small. Raises ConfigError."""
        for name, minimum in (("batch_size", 1), ("per_file", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")
        check_numbers(self, "embed")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options, with their defaults, to a parser."""
    p.add_argument("run", type=nonempty, metavar="RUN", help="a run folder, a checkpoint folder, or a published CLIP")
    p.add_argument(
        "--data", type=nonempty, required=True, nargs="+", metavar="SHARDS", help="globs, brace patterns, folders or urls"
    )
    p.add_argument(
        "--out", type=nonempty, required=True, metavar="DIR", help="folder for the embeddings; an unfinished one is completed"
    )
    p.add_argument("--only", default="", metavar="MODALITY", help="image, text, audio (default: all that the model has)")
    p.add_argument("--tokens", default="", choices=["own", "shared"], help="token features too: the towers' own, or projected")
    p.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="in the files (default float16)")
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the towers (default fp32)")
    p.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="N", help="samples at a time, per process (default 256)"
    )
    p.add_argument(
        "--workers", type=whole_number(0, 4096), metavar="N", help="processes that decode, per process (default: by the cores)"
    )
    p.add_argument("--per-file", type=count, default=0, metavar="N", help="most samples of a file (default 16384)")
    p.add_argument("--caption", default="", metavar="FIELD", help="txt, or a field of the json (default: the model's)")
    p.add_argument("--json", action="store_true", help="print one JSON object at the end")


def build_argv(args: argparse.Namespace) -> list[str]:
    """Build the command line that parses to `args`, for the processes that a launcher starts."""
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in Options.__dataclass_fields__ if name != "data"}
    words = [word for flag, value in flags.items() if value not in ("", None) for word in (flag, str(value))]
    return [args.run, *words, *(["--json"] if args.json else []), "--data", *args.data]


def build_options(args: argparse.Namespace) -> Options:
    """Build the options from a parsed command line. Raises ConfigError."""
    options = Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
    options.check()
    return options
