"""--nodes N or MIN:MAX: how many nodes a run has, and which numbers of them can share its batch."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError


class NodeCount(int):
    """The number of nodes of a run; of an elastic one the largest, with the smallest beside it."""

    least: int
    """The smallest number of nodes that the run goes on with; the number itself for a run of fixed size."""

    def __new__(cls, most: int, least: int | None = None) -> NodeCount:
        """Build the count; least: None = `most`."""
        count = super().__new__(cls, most)
        count.least = most if least is None else least
        return count

    @property
    def is_elastic(self) -> bool:
        """Return whether nodes may leave and join."""
        return self.least < self

    def __str__(self) -> str:
        return f"{self.least}:{int(self)}" if self.is_elastic else str(int(self))


def parse_nodes(word: str) -> NodeCount:
    """Parse N or MIN:MAX, for argparse. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(?:([0-9]{1,6}):)?([0-9]{1,6})", word)
    if match is None:
        raise argparse.ArgumentTypeError(f"{word[:100]!r} must be a number of nodes, or MIN:MAX")
    most, least = int(match[2]), int(match[1] or match[2])
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{word[:100]!r} must be at least 1, and MIN at most MAX")
    return NodeCount(most, least)


def find_usable(module: str, config: Path, settings: list[str], nodes: NodeCount, nproc: int, gpus: bool) -> list[int]:
    """Return the numbers of nodes, from MIN to MAX, with which a configuration can run.

    Their processes divide the batch, for example. With a number between two of them, the nodes beyond the smaller one wait.
    gpus: whether the nodes have GPUs. Raises ConfigError where MIN itself cannot run.
    """
    from pretrain.runtime import distributed

    trainer: Any = importlib.import_module(f"{module}.train")
    usable = []
    for count in range(nodes.least, nodes + 1):
        try:
            with distributed.assume_world(count * nproc, count, gpus):
                trainer.load_config(config, settings)
        except ConfigError as error:
            if count == nodes.least:
                raise ConfigError(f"--nodes {nodes} --nproc {nproc}: the smallest run cannot start: {error}") from error
            continue
        usable.append(count)
    return usable
