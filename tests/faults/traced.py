"""`clipfuse` whose processes write down their positions: python -m tests.faults.traced.

Ranks are forked from the launcher (tests.support.forked), so that they write them, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch import cli
from tests.faults import positions

if __name__ == "__main__":
    positions.trace(Path(os.environ[positions.FOLDER]))
    sys.exit(cli.main(sys.argv[1:]))
