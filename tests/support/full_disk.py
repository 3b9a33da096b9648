"""A clipfuse command whose files may grow to BYTES, as on a full disk: `python -m tests.support.full_disk BYTES WORD...`."""

from __future__ import annotations

import resource
import signal
import sys

from launch import cli

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.exit(cli.main(sys.argv[2:]))
