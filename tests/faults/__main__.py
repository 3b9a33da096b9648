"""Tries faults and prints what became of them: python -m tests.faults [kills | servers] [--kills 20] [--seed 0].

    kills       training is killed, stopped and frozen at seeded moments, in one process, in two, and in relays of 1, 2 and 4
    servers     shards are read through faults of an http and an S3 server

The exit code is 1 where a fault cost a sample, a loss or the run, or stopped it without a line that names the shard.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from tests.faults import kills, servers
from tests.support import Small, make_small

PATCH_DROPOUT = ("image.patch_dropout=0.25",)


class Campaign(NamedTuple):
    """One run that is disturbed."""

    sizes: Sequence[int]
    """Processes of each leg."""
    steps: Sequence[int] = ()
    """Of faults that must come there."""
    more: Sequence[str] = ()
    """Further settings; those of a run whose number of processes changes leave random layers off."""


def plan_campaigns(count: int) -> dict[str, Campaign]:
    """Return the campaigns by name, with `count` stops or kills altogether, at least 10."""
    rest = max(2, count - 8)
    relays = {
        "1 -> 2 -> 1": Campaign([1, 2, 1, 2, 1], (kills.VAL_EDGE, kills.TRAIN_EDGE)),
        "2 -> 4 -> 2": Campaign([2, 4, 2], (kills.TRAIN_EDGE,)),
        "2, fsdp2": Campaign([2, 2, 2], (), ("train.strategy=fsdp2",)),
    }
    return {
        "1": Campaign([1] * (rest - rest // 2 + 1), (kills.TRAIN_EDGE,), PATCH_DROPOUT),
        "2": Campaign([2] * (rest // 2 + 1), (kills.VAL_EDGE,), PATCH_DROPOUT),
        **relays,
    }


def run_kills(small: Small, root: Path, count: int, seed: int) -> int:
    """Run all campaigns and print their table; return the exit code."""
    begin = time.monotonic()
    references: dict[tuple[int, Sequence[str]], Path] = {}
    failures, total = [], []
    row = "| {:24} | {:26} | {:48} | {:>15} | {:8} | {:>12} | {:13} |"
    print(row.format("run (processes)", "fault", "moment", "procs x workers", "survived", "samples lost", "losses equal"))
    print("|" + "|".join(["---"] * 7) + "|", flush=True)
    for number, (name, campaign) in enumerate(plan_campaigns(count).items()):
        legs = kills.draw_legs(random.Random(f"{seed}-{number}"), campaign.sizes, campaign.steps, freezes=True)
        is_exact = len(set(campaign.sizes)) == 1
        key = (campaign.sizes[0], campaign.more)
        strikes: list[kills.Strike] = []
        run = root / f"run-{number}" / "run"
        run.parent.mkdir()
        equal = "-"
        try:
            if key not in references:
                references[key] = root / f"reference-{number}" / "run"
                references[key].parent.mkdir()
                kills.run_campaign(small, references[key], [kills.Leg(campaign.sizes[0], 0)], campaign.more)
            kills.run_campaign(small, run, legs, campaign.more, strikes)
            verdict = kills.compare(run, references[key])
            kills.credit(strikes, verdict)
            equal = "bit for bit" if not verdict.losses and not verdict.weights else f"to {verdict.losses:.1g}"
            kills.check(verdict, is_exact)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
            print(f"FAILED {failures[-1]}", file=sys.stderr, flush=True)
        for strike in strikes:
            moment = f"step {strike.step}, {strike.moment}" if strike.moment != "starting" else "starting"
            fault = strike.fault.action + ("" if strike.fault.ends else f" {strike.fault.seconds:.1f} s")
            state = "yes" if strike.has_survived else "NO"
            where = f"{strike.leg.processes} x {strike.leg.workers}"
            print(row.format(name, fault, moment, where, state, strike.samples_lost, equal), flush=True)
        total += strikes
    ended = sum(strike.fault.ends for strike in total)
    print(
        f"{ended} kills and stops, {len(total) - ended} freezes in {len(plan_campaigns(count))} runs of {kills.STEPS} steps, "
        f"seed {seed}: {sum(strike.has_survived for strike in total)} survived, "
        f"{sum(strike.samples_lost for strike in total)} samples lost; {time.monotonic() - begin:.0f} s"
    )
    return 1 if failures else 0


def run_servers(root: Path) -> int:
    """Try all faults of both servers and print their table; return the exit code."""
    logging.disable()  # the S3 server logs each request
    problems = 0
    row = "| {:4} | {:24} | {:32} | {:7} | {:>4} | {:9} | {:>8} | {}"
    print(row.format("by", "fault", "when", "samples", "lost", "order", "requests", "stopped by"))
    print("|" + "|".join(["---"] * 8) + "|", flush=True)
    for kind in get_args(servers.Kind):
        for tried in servers.try_faults(kind, root / kind):
            result, problem = tried.outcome, servers.find_problem(tried)
            problems += problem is not None
            line = " ".join(filter(None, [result.error, f"PROBLEM: {problem}" if problem else ""]))
            order = "unchanged" if result.is_in_order else "CHANGED"
            print(row.format(kind, tried.fault, tried.frequency, result.read, result.lost, order, result.requests, line))
    print(f"{problems} problems; {servers.SHARDS * servers.SAMPLES} samples in {servers.SHARDS} shards")
    return 1 if problems else 0


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["kills", "servers"], default="kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        if args.what == "servers":
            return run_servers(root)
        small = make_small(root / "small")
        return run_kills(small, root, args.kills, args.seed)


if __name__ == "__main__":
    sys.exit(main())
