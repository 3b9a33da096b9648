"""clipfuse pretrain, finetune and plan: one process here, several here or on several nodes, or a Slurm job."""

from __future__ import annotations

import argparse

from launch.cli.command import Subparsers, add_command
from launch.nodes import NodeCount, parse_nodes
from pretrain.config import find_config
from pretrain.config.arguments import count, endpoint, positive_int, process_count, seconds, whole_number
from pretrain.config.static_schema import check_settings
from pretrain.errors import ConfigError
from pretrain.runtime.entrypoint import DONE, DryRun, run


def add_commands(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add pretrain and finetune."""
    p = add_command(commands, "pretrain", run_training, "shards -> aligned encoders", reads_runs=True)
    p.set_defaults(module="pretrain")
    _add_config(p, "settings that replace the file's")

    p = add_command(
        commands, "finetune", run_training, "aligned encoders -> answers, re-ranking, classes, captions", reads_runs=True
    )
    p.set_defaults(module="finetune")
    _add_config(p, "settings that replace the file's; init=RUN starts from it")


def _add_config(p: argparse.ArgumentParser, settings: str) -> None:
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    p.add_argument("--dry-run", action="store_true", help="check everything, print what would run and where, and exit")
    p.add_argument("-v", "--verbose", action="store_true", help="with --dry-run: print the whole configuration, as YAML")
    _add_process_options(p)
    p.add_argument("settings", nargs="*", default=[], metavar="key=value", help=settings)


def _add_process_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--nproc", type=process_count, metavar="N", help="processes on each node: a number, or gpus for one per GPU (default 1)"
    )
    p.add_argument(
        "--nodes",
        type=parse_nodes,
        default=NodeCount(1),
        metavar="N|MIN:MAX",
        help="nodes in the run (default 1); MIN:MAX: it goes on while nodes leave and join",
    )
    p.add_argument("--on", choices=["local", "slurm"], default="local", help="here, or as a Slurm job (default local)")
    local = p.add_argument_group("processes here (--on local)")
    local.add_argument(
        "--rdzv", type=endpoint, metavar="HOST:PORT", help="with --nodes: where they meet, the same on every node"
    )
    local.add_argument(
        "--join", type=seconds, default=30, metavar="SECONDS", help="with MIN:MAX: wait for more nodes (default 30)"
    )
    local.add_argument(
        "--restarts", type=count, metavar="N", help="restarts after a lost process (default 0; 3 on several nodes)"
    )
    local.add_argument(
        "--grace", type=seconds, default=600, metavar="SECONDS", help="time to save after a signal, then SIGKILL (default 600)"
    )
    job = p.add_argument_group("a job (--on slurm)")
    job.add_argument("--time", metavar="LIMIT", help="time limit as sbatch reads it: 12:00:00 (default: the partition's)")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}", metavar="NAME")
    job.add_argument("--gpus-per-node", type=whole_number(0, 4096), metavar="N", help="default: one per process; 0 = none")
    job.add_argument(
        "--warning",
        type=whole_number(0, 65535),
        default=300,
        metavar="SECONDS",
        help="save this long before the limit (default 300)",
    )
    job.add_argument("--no-requeue", action="store_true", help="do not requeue the job when preempted or out of time")
    job.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other option: --sbatch=--mem=64G")


def add_plan(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add plan."""
    p = add_command(commands, "plan", plan, "memory, network and steps before renting anything", reads_runs=True)
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    p.add_argument("--gpus", type=positive_int, required=True, metavar="N", help="GPUs in the run, over all nodes")
    p.add_argument("--gpu", default="h100", metavar="NAME", help="h100 (default), h200, b200, a100, a100-40, l40s, 4090, ...")
    p.add_argument(
        "--samples", type=positive_int, metavar="N", help="samples per epoch, where the shards are not on this machine"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("settings", nargs="*", default=[], metavar="key=value", help="settings that replace the file's")


def run_training(args: argparse.Namespace) -> int:
    """Run `clipfuse pretrain` or `finetune` (args.module): in this process, by torch's elastic agent, or as a Slurm job."""
    _check_settings(args.config, args.settings, args.module)
    if args.verbose and not args.dry_run:
        raise ConfigError("-v prints the configuration with --dry-run")
    if args.on == "slurm":
        return _submit_job(args)
    if args.dry_run:
        return _describe_run(args)
    if args.nproc is None and args.nodes == 1:
        return run(args.config, args.settings, None, args.module, is_checked=True)
    from launch import elastic

    words = [args.config, *args.settings]
    world = elastic.World(
        elastic.parse_nproc(args.nproc),
        args.nodes,
        args.rdzv,
        args.restarts,
        args.grace,
        least_nodes=args.nodes.least,
        join=args.join,
    )
    return elastic.launch(args.module, words, world)


def _check_settings(config: str, settings: list[str], module: str) -> None:
    """Refuse typos before torch is imported, in the condition of data.keep too. Raises ConfigError."""
    values = check_settings(find_config(config, module), settings, module)
    keep = values.data.keep if values is not None else None
    if keep is not None:
        from pretrain.data.sample_filter import parse_keep

        parse_keep(keep)


def _describe_run(args: argparse.Namespace) -> int:
    """Print what would run, in this process, whatever the number of processes and nodes."""
    from launch.elastic import parse_nproc
    from launch.plan import describe_estimate

    processes = parse_nproc(args.nproc) * args.nodes
    dry_run = DryRun(args.verbose, processes, args.nodes, describe_estimate)
    return run(args.config, args.settings, dry_run, args.module, is_checked=True)


def _submit_job(args: argparse.Namespace) -> int:
    from launch import slurm

    if not (args.nproc or "").isdigit():
        raise ConfigError("--on slurm needs --nproc N, a number: the nodes may have other GPUs than this machine")
    job = slurm.Job(
        nodes=args.nodes,
        nproc=int(args.nproc),
        time=args.time,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        gpus=args.gpus_per_node,
        warning=args.warning,
        requeue=not args.no_requeue,
        more=args.sbatch,
    )
    slurm.submit(args.module, args.config, args.settings, job, args.dry_run, args.verbose)
    return DONE


def plan(args: argparse.Namespace) -> int:
    """Run `clipfuse plan`."""
    _check_settings(args.config, args.settings, "pretrain")
    from launch import plan as planning

    planning.print_plan(planning.build_plan(args.config, args.settings, args.gpus, args.gpu, args.samples), args.json)
    return DONE
