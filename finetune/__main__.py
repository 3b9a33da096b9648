"""Entry point of each fine-tuning process: python -m finetune CONFIG [--dry-run] [key=value ...]."""

from __future__ import annotations

import sys

from pretrain.runtime.entrypoint import main

if __name__ == "__main__":
    sys.exit(main(module="finetune"))
