"""python -m finetune CONFIG [--dry-run] [key=value ...]: what every launcher starts, once per process."""

from __future__ import annotations

import sys

from pretrain.runtime.entrypoint import main

if __name__ == "__main__":
    sys.exit(main(module="finetune"))
