"""Training that is killed at seeded moments, on changing numbers of processes; `python -m tests.faults` tries many more."""

import random
from pathlib import Path

import pytest

from tests.faults import kills
from tests.support import Small


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_kills_cost_no_sample_and_no_loss(small: Small, tmp_path: Path) -> None:
    runs = {name: tmp_path / name / "run" for name in ("undisturbed", "killed")}
    for run in runs.values():
        run.parent.mkdir()
    kills.run_campaign(small, runs["undisturbed"], [kills.Leg(1, 0)])
    legs = kills.draw_legs(random.Random(0), [1, 2, 1, 1], (kills.TRAIN_EDGE,))
    strikes = kills.run_campaign(small, runs["killed"], legs)
    assert sum(strike.fault.ends for strike in strikes) == 3
    assert all(strike.has_survived for strike in strikes)
    kills.check(kills.compare(runs["killed"], runs["undisturbed"]), is_exact=False)


def test_what_is_lost_repeated_or_moved_is_noticed() -> None:
    """The comparison itself."""
    expected = {1: ["a", "b"], 2: ["c", "d"], 3: ["e", "f"]}

    def count(keys: dict[int, list[str]]) -> tuple[int, int, int]:
        verdict = kills.compare_keys(keys, expected)
        return verdict.lost, verdict.repeated, verdict.moved

    assert count(expected) == (0, 0, 0)
    assert count({**expected, 2: ["d", "c"]}) == (0, 0, 1)
    assert count({**expected, 2: ["c"]}) == (1, 0, 1)
    assert count({**expected, 2: ["c", "d", "d"]}) == (0, 1, 1)
    assert count({**expected, 2: ["c", "a"]}) == (1, 1, 1)
    assert count({1: ["a", "b"], 2: ["c", "d"]}) == (2, 0, 1)
    assert count({**expected, 4: ["g"]}) == (0, 1, 1)
