"""launch: the clipfuse command, ways to start processes, and the report of a run.

    cli.py       the command; progress.py: its bars
    local.py     processes on this machine, by torch's elastic agent
    slurm.py     writes and submits an sbatch script
    plan.py      memory, network and steps before renting anything; footprint.py: what a step holds
    demo.py      what `make demo` does, command by command
    report/      a run folder -> one self-contained HTML page

May import pretrain; nothing imports this room.
"""
