"""The file that `make bench` writes keeps what was measured before."""

from __future__ import annotations

from pathlib import Path

from tests.bench.__main__ import read_tables, write_tables


def test_a_measurement_replaces_its_own_figures_only(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    assert read_tables(path) == {}
    path.write_text(write_tables({"loss": "once\n\n- a 1\n- b 2", "gone": "- c 3"}, ["text", "loss"]))
    assert read_tables(path) == {"loss": "once\n\n- a 1\n- b 2", "gone": "- c 3"}
    path.write_text(write_tables({**read_tables(path), "text": "- d 4"}, ["text", "loss"]))
    assert list(read_tables(path)) == ["text", "loss", "gone"]
    assert read_tables(path)["gone"] == "- c 3"
