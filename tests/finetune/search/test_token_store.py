"""Token features beside an index: pooled as a mean over squares is, and whole after a kill at the worst moment."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.search import token_store
from finetune.search.item_sources import Location
from finetune.search.token_store import ItemTokens, Layout, TokenStore, pool_tokens
from pretrain.errors import UserError
from pretrain.towers import TokenSequence
from tests.support import environment

LAYOUT = Layout("abc", "runs/retrieval", 8, 1, 6, 4, 5, (2, 3))


def features(*numbers: int) -> ItemTokens:
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    states = torch.stack([torch.randn(6, 4, generator=generator) for generator in generators])
    embedding = torch.stack([torch.randn(5, generator=generator) for generator in generators])
    return ItemTokens(TokenSequence(states, torch.ones(len(numbers), 6, dtype=torch.bool), (2, 3), states[:, 0]), embedding)


def put(store: TokenStore, *numbers: int) -> None:
    store.put([f"k{number}" for number in numbers], [at(number) for number in numbers], features(*numbers))


def at(number: int) -> Location:
    return Location("/data/a.tar", 512 * number, 100)


def check(store: TokenStore, *numbers: int) -> None:
    rows = store.find([f"k{number}" for number in numbers], [at(number) for number in numbers])
    assert None not in rows
    images, expected = store.read([row for row in rows if row is not None]), features(*numbers)
    assert torch.equal(images.tokens.states, expected.tokens.states.half().float())
    assert torch.equal(images.embedding, expected.embedding)
    assert images.tokens.mask.all()
    assert images.tokens.grid == (2, 3)


def test_features_are_replaced_forgotten_and_found_by_their_location(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    with TokenStore.create(folder, LAYOUT) as store, TokenStore(folder) as reader:
        put(store, 1, 2, 3)
        check(reader, 3, 1, 2)  # another connection, as of a page, sees what was committed
        store.put(["k2"], [at(9)], features(9))
        assert reader.find(["k2", "k2", "k4"], [at(2), at(9), at(4)]) == [None, 3, None]
        assert torch.equal(reader.read([3]).embedding, features(9).embedding)
        put(store, 2)
        token_store.forget(folder, ["k1", "nowhere"])
        assert reader.find(["k1"], [at(1)]) == [None]
        check(reader, 2, 3)
        assert reader.count() == 2
    token_store.forget(tmp_path / "nowhere", ["k1"])


KILLED = """
import os, sys
from pathlib import Path
from tests.finetune.search.test_token_store import LAYOUT, TokenStore, put
store, fsync, calls = TokenStore.create(Path(sys.argv[1]), LAYOUT), os.fsync, []
def kill(file):
    fsync(file)
    calls.append(file)
    len(calls) == 2 and os.kill(os.getpid(), 9)
os.fsync = kill
put(store, 1, 2)
put(store, 3, 4)
"""


def test_a_kill_between_the_features_and_their_keys(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment(), check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "rows.bin").stat().st_size == 4 * LAYOUT.row.itemsize  # written, but not committed
    with TokenStore(folder) as store:
        check(store, 1, 2)
        assert store.find(["k3"], [at(3)]) == [None]
        put(store, 4, 3, 5)
        check(store, 1, 2, 3, 4, 5)


def test_a_full_disk_and_damage_are_said_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    limit, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with TokenStore.create(folder, LAYOUT) as store:
        put(store, *range(200))
        resource.setrlimit(resource.RLIMIT_FSIZE, (16000, limit[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write into .*; what was there before stays, and the same command"):
                put(store, 200)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
        put(store, 200)
        check(store, 0, 199, 200)
        with pytest.raises(UserError, match="not finite in float16"):
            store.put(
                ["x"], [at(0)], ItemTokens(features(1).tokens._replace(states=torch.full((1, 6, 4), 1e6)), torch.ones(1, 5))
            )
    for file, message in (
        ("rows.bin", "were written: delete"),
        ("keys.db", "keys.db is damaged"),
        ("model.json", "is damaged"),
    ):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(b"no database, no json, too short")
        with pytest.raises(UserError, match=message), TokenStore(folder) as store:
            check(store, 0)
        (folder / file).write_bytes(content)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    with pytest.raises(UserError, match="exists and holds other files"):
        TokenStore.create(tmp_path / "photos", LAYOUT)


def test_pooling_is_the_mean_over_squares_of_what_is_there() -> None:
    grid, side = (5, 3), 2
    states = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1, :3] = mask[1, 12] = False
    pooled = pool_tokens(TokenSequence(states, mask, grid, states[:, 0]), side)
    assert pooled.grid == (3, 2)
    for image in range(2):
        for cell in range(6):
            y, x = side * (cell // 2), side * (cell % 2)
            cells = [3 * v + u for v in range(y, min(y + 2, 5)) for u in range(x, min(x + 2, 3)) if mask[image, 3 * v + u]]
            assert bool(pooled.mask[image, cell]) == bool(cells)
            if cells:
                torch.testing.assert_close(pooled.states[image, cell], states[image, cells].mean(dim=0))
    same = TokenSequence(states, mask, grid, states[:, 0])
    assert pool_tokens(same, 1) is same
