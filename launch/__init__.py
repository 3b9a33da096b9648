"""launch: the clipfuse command, ways to start processes, and the report of a run.

    cli.py       the command; progress.py: its bars
    local.py     processes on this machine, by torch's elastic agent
    demo.py      what `make demo` does, command by command
    report/      a run folder -> one self-contained HTML page

May import pretrain; nothing imports this room.
"""
