"""What `clipfuse embed` prints at its end: the content of the folder, and the time that the command took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pretrain.runtime.console import format_duration


@dataclass
class Summary:
    """The content of the embedding folder, and the time that this command took."""

    out: str
    files: int
    samples: int
    """Rows in all files."""
    left_out: dict[str, int]
    """Samples that have no row because of their content, by reason."""
    missing: dict[str, int]
    """Rows without an embedding of a modality, by its name: their samples lack it."""
    embedded: int
    """Samples that this command processed; the others were there before."""
    seconds: float
    samples_per_second: float
    encoder_samples_per_second: float
    """Rate of the towers alone, all processes together, as if reading, decoding and writing took no time."""
    encoder_share: float
    """Fraction of the processes' time in which the towers worked."""

    def __str__(self) -> str:
        bad = sum(self.left_out.values())
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in Counter(self.left_out).most_common(5))
        content = f"{self.out}: {self.samples:,} samples in {self.files:,} file{'' if self.files == 1 else 's'}"
        content += "".join(f", {n:,} without {name}" for name, n in self.missing.items())
        content += f", {bad:,} left out because of their content ({reasons})" if bad else ""
        if not self.embedded:
            return f"{content}; complete, nothing to do"
        return (
            f"{content}; {self.samples_per_second:,.1f} samples/s, the encoder alone {self.encoder_samples_per_second:,.1f} "
            f"(it worked {100 * self.encoder_share:.0f}% of the {format_duration(self.seconds)})"
        )
