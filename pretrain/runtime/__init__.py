"""Processes, signals, memory, terminal and files: what a run needs of the machine, whatever it trains.

    entrypoint.py    one process of a run: arguments, exit codes, one line for an expected error
    preflight.py     checks before training: launcher, GPUs; equal code, configuration and data on all processes
    distributed.py   the process group: rank, world size, gathering with gradient, reductions
    agree.py         an error on one rank is raised on every rank
    watchdog.py      heartbeats of all processes: a dead or stalled one ends the run with a line that names it
    flight_recorder.py  collectives that each process has begun, by torch's flight recorder
    signals.py       SIGINT, SIGTERM and SIGUSR1: save and stop at the same step on all processes
    progress.py      lines that say how far an evaluation is
    orphans.py       no process outlives the one that started it
    background.py    an iterator that a thread reads, one item ahead
    device_copy.py   copies to a GPU that the host does not wait for
    memory.py        peak memory; the error message for out of memory
    performance.py   settings of torch that decide speed and determinism
    gpus.py          memory and peak throughput of GPUs, by name
    deferred_imports.py  timm and transformers without the compiler that they import
    console.py       log lines of rank 0, the progress bar, durations
    files.py         files that are written atomically

May import pretrain.config and pretrain.errors of this project, and nothing else.
"""
