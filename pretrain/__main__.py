"""python -m pretrain CONFIG [--dry-run] [key=value ...]: launchers start it, once per process."""

import sys

from pretrain.runtime.entrypoint import main

if __name__ == "__main__":
    sys.exit(main())
