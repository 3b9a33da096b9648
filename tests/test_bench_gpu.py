"""`make gpu` runs through on a machine without a GPU, at tiny sizes, and says what it cannot measure there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.gpu import SECTIONS, main, write_table


def run_gpu_bench(out: Path, *options: str) -> list[dict[str, object]]:
    """Run the measurements without a GPU and return their rows."""
    main(["--out", str(out), *options])
    rows: list[dict[str, object]] = json.loads((out / "gpu.json").read_text())
    return rows


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tiny_sizes_run_through_on_a_cpu(tmp_path: Path) -> None:
    rows = run_gpu_bench(tmp_path, "--tiny", "--only", "gradients", "throughput", "loss", "resume", "profile", "batch", "peer")
    assert not [row for row in rows if row["unit"] == "failed"]
    values = {str(row["what"]): row["value"] for row in rows}
    exact = [value for what, value in values.items() if "fp32" in what]
    assert len(exact) == 6
    assert all(isinstance(value, float) and value <= 1e-4 for value in exact)
    assert values["resume, deterministic: largest difference of the loss"] == 0.0  # on a CPU, bit for bit
    assert values["vit-b-32, largest batch, 1 chunks (the largest that was tried)"] == 32
    assert sum(float(str(row["value"])) for row in rows if row["unit"] == "of the step") == pytest.approx(1)
    assert "not here" in str(values["open_clip"])
    assert "| resume |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_what_needs_one_is_not_here(tmp_path: Path) -> None:
    needs_gpu = [name for name, (_, needs) in SECTIONS.items() if needs]
    rows = run_gpu_bench(tmp_path, "--only", *needs_gpu)
    assert [(row["section"], row["value"]) for row in rows[1:]] == [(name, "not here: no GPU") for name in needs_gpu]


def test_a_row_of_the_table_has_four_columns() -> None:
    table = write_table([{"section": "loss", "what": "clip", "value": {"seconds": 0.123456, "name": "x"}, "unit": "JSON"}])
    assert table.splitlines()[-1] == "| loss | clip | seconds 0.1235 |  |"
