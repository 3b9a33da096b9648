"""python -m clipfuse: the clipfuse command."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
