"""python -m pretrain CONFIG [--dry-run] [key=value ...]: what every launcher starts, once per process."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from pretrain.config import ConfigError, UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75


def find_config(name: str, kind: str) -> Path:
    """A path, or the name of a shipped configuration: "scenes" means configs/pretrain/scenes.yaml."""
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIGS / kind / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
    raise ConfigError(f"no configuration {name!r}: give a YAML file, or a shipped one: {', '.join(names)}")


def main(argv: list[str] | None = None) -> int:
    """Runs a pretraining and returns the exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable."""
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=__doc__)
    parser.add_argument("config", help="a YAML file, or the name of a shipped one")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    args, rest = parser.parse_known_args(argv)
    return guarded(lambda: run(args.config, args.settings + rest, args.dry_run))


def guarded(work: object) -> int:
    """Calls `work`; an expected failure becomes one line and its exit code."""
    assert callable(work)
    try:
        return int(work())
    except ConfigError as error:
        print(f"clipfuse: {error}", file=sys.stderr)
        return USAGE
    except UserError as error:
        print(f"clipfuse: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("clipfuse: interrupted before a checkpoint could be written; the last one is intact", file=sys.stderr)
        return FAILED


def run(config: str, settings: list[str], dry_run: bool) -> int:
    """One process of a pretraining run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    from pretrain import dist, recipe
    from pretrain.config import load
    from pretrain.runlog import say

    path = find_config(config, "pretrain")
    dist.setup()
    try:
        loaded = load(recipe.PretrainConfig, path, settings)
        if dry_run:
            recipe.describe(loaded)
            return DONE
        outcome = recipe.train(loaded)
        if outcome.state == "stopped":
            command = shlex.join(["clipfuse", "pretrain", config, *settings])
            say(f"{outcome.why} at step {outcome.step}, saved; go on with: {command}")
            return STOPPED
        results = ", ".join(f"{name} {value:.4g}" for name, value in outcome.results.items())
        say(f"done: {outcome.step} steps in {loaded.run}" + (f"; {results}" if results else ""))
        return DONE
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(main())
