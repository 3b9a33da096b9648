"""python -m launch.cli: the clipfuse command, where the console script is not on the path."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
