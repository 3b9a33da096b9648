"""What a filtered folder says of itself: report.json and the table that the command prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.printable import format_count
from pretrain.runtime.files import read_json_object

REPORT = "report.json"
FORMAT = "clipfuse filter 1"


@dataclass
class FilterReport:
    """How many samples stay, and how many go and why."""

    out: str
    shards: int
    """Of the source."""
    samples: int
    """Of the source."""
    kept: int
    kept_shards: int
    removed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By reason, the largest first: count, share of all samples, and examples, the keys of a few."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the rules met: embeddings, similarity, near_duplicates, clusters."""
    settings: dict[str, Any] = field(default_factory=dict)
    list_file: str = ""
    """The list for data.skip, where one was asked for instead of shards."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        return {"format": FORMAT, **vars(self)}

    @classmethod
    def load(cls, folder: Path) -> FilterReport | None:
        """Return the report in a folder, None where there is none. Raises OSError, ValueError, TypeError."""
        try:
            values = read_json_object(folder / REPORT)
        except FileNotFoundError:
            return None
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of {FORMAT}")
        return cls(**values)

    def format_lines(self) -> list[str]:
        """Return the report as lines of text for the console."""
        share = f"{self.kept / max(1, self.samples):.1%}"
        lines = [
            f"{self.kept:,} of {format_count(self.samples, 'sample')} stay ({share}), "
            f"in {self.kept_shards:,} of {format_count(self.shards, 'shard')}"
        ]
        for reason, entry in self.removed.items():
            lines.append(f"{entry['count']:>10,}  {entry['share']:>6.1%}  {reason}")
            lines += [f"{'':20}{example}" for example in entry["examples"][:2]]
        lines += self._format_facts()
        lines.append(f"{self.list_file}: data.skip={self.list_file} trains without them" if self.list_file else f"{self.out}")
        return lines

    def _format_facts(self) -> list[str]:
        lines = []
        for option, entry in self.facts.get("lists", {}).items():
            lines.append(f"{option}: {format_count(entry['lines'], 'line')}, {format_count(entry['samples'], 'sample')} named")
        if found := self.facts.get("embeddings", {}).get("missing"):
            entry = self.facts["embeddings"]
            done = "they stay, and no rule of embeddings applies to them" if entry["treated"] == "keep" else "they go"
            lines.append(f"{found:,} of {format_count(entry['samples'], 'sample')} without an embedding: {done}")
        if entry := self.facts.get("similarity"):
            quantiles = ", ".join(f"{name} {value:.3f}" for name, value in entry.items())
            lines.append(f"quantiles of the similarity of image and caption: {quantiles}")
        if entry := self.facts.get("near_duplicates"):
            held_out = f", {entry['held_out']:,} of them held out" if entry["held_out"] else ""
            lines.append(
                f"near-duplicates: {format_count(entry['pairs'], 'pair')} in {format_count(entry['groups'], 'group')}, among "
                f"{entry['compared']:,} images{held_out}; searched {entry['search']}"
            )
        if entry := self.facts.get("clusters"):
            lines.append(
                f"{format_count(entry['clusters'], 'cluster')} of {entry['smallest']:,} to {entry['largest']:,} samples: "
                f"{entry['limited']:,} limited"
            )
        return lines
