"""launch: the clipfuse command, the Python interface, ways to start processes, and the report of a run.

api/         what `import clipfuse` gives
cli/         the clipfuse command
elastic.py   processes on this machine, or on several, by torch's elastic agent
nodes.py     --nodes N or MIN:MAX, and which numbers of nodes can share a batch
rendezvous.py  where nodes meet, in a process of its own
slurm/       an sbatch script, written and submitted
plan/        memory, network and steps before renting anything
report/      a run folder -> one self-contained HTML page
demo.py      what `make demo` does, command by command

May import finetune and pretrain; nothing imports this package.
"""

import os
import sys

_ARGS = sys.orig_argv
_PROGRAM = (*_ARGS, "")[_ARGS.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in _ARGS else ""
if _PROGRAM.partition(".")[0] == __name__ and not sys.flags.safe_path and "PYTHONSAFEPATH" not in os.environ:
    # `python -m` of this package has put the current folder first, where a user's own pretrain.py would be imported.
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.path[0] == os.getcwd() != os.path.abspath(f"{__file__}/../.."):
        del sys.path[0]
