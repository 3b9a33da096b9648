"""python -m finetune CONFIG [--dry-run] [key=value ...]: what every launcher starts, once per process."""

from __future__ import annotations

import sys

from pretrain import __main__ as training


def run(config: str, settings: list[str], dry_run: bool) -> int:
    """One process of a fine-tuning run; returns the exit code."""
    return training.run(config, settings, dry_run, "finetune")


if __name__ == "__main__":
    sys.exit(training.main(module="finetune"))
