"""Tests of the loaders: order of batches, resuming, bad samples and shards, evaluation."""

import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data import worker_pool
from pretrain.data.captions import caption_id
from pretrain.data.config import check_sources
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.loader import DataConfig, Loader, build_eval_loader, build_loader
from pretrain.data.order import Order, ShardSource
from pretrain.data.shards import retries
from pretrain.data.text import TextDecoder, load_tokenizer, train_tokenizer
from pretrain.errors import ConfigError, UserError


def jpeg(i, size=40):
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size, size)).save(out, "JPEG")
    return out.getvalue()


def caption(i):
    return " ".join(random.Random(i).choices(["red", "blue", "car", "house", "tree", "dog"], k=1 + i % 17))


def write_shard(path, samples):
    """Write a shard of samples {key: {extension: bytes}} and return its path."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def good(i):
    fields = {"number": i, "captions": [caption(i), f"a picture of {caption(i)}"]}
    return {"jpg": jpeg(i), "txt": caption(i).encode(), "json": json.dumps(fields).encode()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with ten shards of 20 samples, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    for s in range(10):
        write_shard(folder / f"t-{s:02d}.tar", {f"{i:04d}": good(i) for i in range(20 * s, 20 * s + 20)})
    train_tokenizer(str(folder), folder / "tokenizer", vocab=300)
    return folder


@pytest.fixture(scope="module")
def decoders(data):
    return decoders_for(data)


def decoders_for(data, **text):
    tokenizer = load_tokenizer(data / "tokenizer")
    return {"image": ImageDecoder(32, AugmentConfig(scale=[0.5, 1.0], flip=True)), "text": TextDecoder(tokenizer, 32, **text)}


def loader(data, decoders, partial_size=None, **changes):
    config = DataConfig(**{"train": str(data), "batch_size": 24, "workers": 0, "window": 3} | changes)
    config.check()
    built = build_loader(config, decoders, seed=1)
    if partial_size:
        built.partial_size = partial_size
    return built


def take(batches, n):
    iterator = iter(batches)
    try:
        return list(itertools.islice(iterator, n))
    finally:
        iterator.close()


def assert_equal_batches(a, b):
    assert [batch.keys for batch in a] == [batch.keys for batch in b]
    for x, y in zip(a, b, strict=True):
        for actual, expected in ((x.inputs, y.inputs), (x.masks, y.masks), (x.targets, y.targets)):
            assert actual.keys() == expected.keys()
            for name in actual:
                assert torch.equal(actual[name], expected[name]), name


@pytest.fixture(scope="module")
def reference(data, decoders):
    """The first 20 batches, more than two epochs, read without workers."""
    return take(loader(data, decoders), 20)


# ---- content and order of batches ------------------------------------------------------------------------------------


def test_batches_follow_the_order(data, decoders, reference):
    order = Order([ShardSource([20] * 10)], seed=1, window=3)
    _, shard, sample = order.locate(np.arange(20 * 24))
    numbers = (20 * shard + sample).tolist()
    assert [key for batch in reference for key in batch.keys] == [f"t-{n // 20:02d}/{n:04d}" for n in numbers]
    tokenizer = decoders["text"].tokenizer
    for g, batch in enumerate(reference):
        assert batch.inputs["image"].shape == (24, 3, 32, 32)
        assert batch.inputs["image"].dtype == torch.uint8
        batch_numbers = numbers[24 * g : 24 * g + 24]
        texts = [
            tokenizer.decode(i[m], skip_special_tokens=True).strip()
            for i, m in zip(batch.inputs["text"], batch.masks["text"], strict=True)
        ]
        assert texts == [caption(n) for n in batch_numbers]
        assert batch.targets["caption_id"].tolist() == [caption_id(caption(n)) for n in batch_numbers]
        assert batch.masks["text"].dtype == torch.bool
    assert {batch.inputs["text"].shape[1] for batch in reference} == {
        24
    }  # trimmed from 32; partial batches alone need 8, 16 or 24


@pytest.mark.parametrize(("workers", "partial_size"), [(0, 7), (1, 24), (1, 3), (3, 24), (3, 5)])
def test_batches_do_not_depend_on_workers_or_size_of_partial_batches(data, decoders, reference, workers, partial_size):
    assert_equal_batches(take(loader(data, decoders, workers=workers, partial_size=partial_size), 20), reference)


def test_batches_do_not_depend_on_the_number_of_processes(data, decoders, reference):
    for world, nodes in ((2, 1), (4, 2), (3, 3)):
        loaders = []
        for rank in range(world):
            one = loader(data, decoders)
            loaders.append(Loader(one.order, one._dataset.reader, decoders, 24, rank, world, nodes))
        for parts, whole in zip(zip(*(take(rank_loader, 3) for rank_loader in loaders), strict=True), reference, strict=False):
            assert [key for part in parts for key in part.keys] == whole.keys
            assert torch.equal(torch.cat([part.inputs["image"] for part in parts]), whole.inputs["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_the_batch_the_trainer_took_last(data, decoders, reference, workers):
    first = loader(data, decoders, workers=workers)
    iterator = iter(first)
    for n in range(1, 5):
        next(iterator)
        assert first.state_dict()["position"] == 24 * n  # not what was read ahead
    state = json.loads(json.dumps(first.state_dict()))
    iterator.close()
    again = loader(data, decoders, workers=2 - workers)
    again.load_state_dict(state)
    assert_equal_batches(take(again, 16), reference[4:])
    assert again.state_dict()["position"] == 20 * 24
    assert first.state_dict()["position"] == 4 * 24


def test_the_state_is_small_and_is_refused_for_other_data(data, decoders, tmp_path):
    one = loader(data, decoders)
    one.bad.update({f"reason {i} " + "x" * 500: i for i in range(500)})
    assert len(json.dumps(one.state_dict())) < 10_000
    for changes, message in (
        ({"window": 4}, "other data"),
        ({"train": f"{data}/t-0*.tar"}, None),
        ({"train": f"{data}/t-00.tar", "batch_size": 8}, "other data"),
        ({"batch_size": 8}, "data.batch_size=8, but the checkpoint was made with 24"),
    ):
        other = loader(data, decoders, **changes)
        if message is None:
            other.load_state_dict(one.state_dict())
            continue
        with pytest.raises(UserError, match=message):
            other.load_state_dict(one.state_dict())


def test_the_digest_does_not_depend_on_the_folder(data, decoders, tmp_path):
    for s in range(10):
        os.symlink(data / f"t-{s:02d}.tar", tmp_path / f"t-{s:02d}.tar")
    assert loader(tmp_path, decoders).digest() == loader(data, decoders).digest()


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(data, decoders, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    take(loader(data, decoders, workers=workers), 3)
    list(build_eval_loader(str(data), decoders, 50, workers=workers))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_one_of_several_captions_is_drawn_by_position(data):
    both = decoders_for(data, caption="captions")
    first, second = take(loader(data, both), 17), take(loader(data, both, workers=1), 17)
    assert_equal_batches(first, second)
    long = [int(mask.sum()) for batch in first for mask in batch.masks["text"]]
    assert len(set(long)) > 2
    one = {"text": both["text"]}  # without images the same captions are drawn: each modality has its own random numbers
    assert all(torch.equal(a.inputs["text"], b.inputs["text"]) for a, b in zip(take(loader(data, one), 5), first, strict=False))


def test_several_sources(data, decoders):
    parts = [f"{data}/t-0[0-3].tar", f"{data}/t-0[4-9].tar"]
    weighted = [{"shards": parts[0], "weight": 3}, {"shards": parts[1], "weight": 1}]
    keys = [key for batch in take(loader(data, decoders, train=weighted), 10) for key in batch.keys]
    assert abs(sum(key < "t-04" for key in keys) - 180) <= 4
    even = [key for batch in take(loader(data, decoders, train=[{"shards": p} for p in parts]), 10) for key in batch.keys]
    assert abs(sum(key < "t-04" for key in even) - 96) <= 4
    assert loader(data, decoders, train=weighted).shard_count == 10


# ---- bad content -----------------------------------------------------------------------------------------------------


def bomb(side=30_000):
    """Return a small PNG whose header claims 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


BAD = {
    "no image": {"txt": b"red"},
    "no caption": {"jpg": jpeg(0)},
    "image empty": {"jpg": b"", "txt": b"red"},
    "image truncated": {"jpg": jpeg(0)[:400], "txt": b"red"},
    "image too large": {"png": bomb(), "txt": b"red"},
    "image unreadable": {"jpg": b"<html>not found</html>", "txt": b"red"},
    "empty caption": {"jpg": jpeg(0), "txt": b" \n "},
    "caption not UTF-8": {"jpg": jpeg(0), "txt": b"\xff\xfe\x00"},
}


@pytest.fixture(scope="module")
def spoilt(data, tmp_path_factory):
    """(folder, {key: reason}): the shards of `data`, with one bad sample in each of the first eight."""
    folder = tmp_path_factory.mktemp("spoilt")
    reasons = {}
    for s in range(10):
        samples = {f"{i:04d}": good(i) for i in range(20 * s, 20 * s + 20)}
        if s < len(BAD):
            reason, members = list(BAD.items())[s]
            samples[f"{20 * s + 7:04d}"] = members
            reasons[f"t-{s:02d}/{20 * s + 7:04d}"] = reason
        write_shard(folder / f"t-{s:02d}.tar", samples)
    return folder, reasons


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_from_their_window(data, decoders, reference, spoilt, workers, caplog):
    folder, reasons = spoilt
    one = loader(folder, decoders, workers=workers, max_bad_rate=0.05)
    batches = take(one, 20)
    expected, expected_reasons = [], []
    for position, key in enumerate(key for batch in reference for key in batch.keys):
        attempt = 0
        while key in reasons:
            expected_reasons.append(reasons[key])
            _, shard, sample = one.order.substitute(position, attempt)
            key, attempt = f"t-{shard:02d}/{20 * shard + sample:04d}", attempt + 1
        expected.append(key)
    assert [key for batch in batches for key in batch.keys] == expected
    assert dict(one.bad) == {reason: expected_reasons.count(reason) for reason in expected_reasons}
    assert set(one.bad) == set(BAD)
    assert "t-05/0107 cannot be used and is replaced: image unreadable" in caplog.text
    for batch, untouched in zip(batches, reference, strict=True):  # other slots are unchanged, augmentation included
        for i, key in enumerate(untouched.keys):
            assert key in reasons or torch.equal(batch.inputs["image"][i], untouched.inputs["image"][i])


def test_counts_of_bad_samples_are_resumed(data, decoders, spoilt):
    folder, _ = spoilt
    whole = loader(folder, decoders, max_bad_rate=0.05)
    take(whole, 20)
    half = loader(folder, decoders, max_bad_rate=0.05)
    take(half, 9)
    rest = loader(folder, decoders, max_bad_rate=0.05, workers=1)
    rest.load_state_dict(half.state_dict())
    take(rest, 11)
    assert rest.state_dict() == whole.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(decoders, tmp_path, workers):
    write_shard(tmp_path / "a.tar", {f"{i:03d}": good(i) if i % 3 else BAD["no image"] for i in range(300)})
    with pytest.raises(
        UserError, match=r"12 of 24 samples cannot be used, more than data.max_bad_rate=0.01; .* no image 12"
    ) as e:
        take(loader(tmp_path, decoders, workers=workers), 50)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"12 of 24 samples cannot be used, more than data.max_bad_rate=0.0;"):
        take(loader(tmp_path, decoders, workers=workers, max_bad_rate=0.0), 50)
    take(loader(tmp_path, decoders, workers=workers, max_bad_rate=1.0), 30)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_in_a_row_stop_the_run(decoders, tmp_path, workers):
    write_shard(tmp_path / "a.tar", {f"{i:03d}": BAD["no caption"] for i in range(100)})
    with pytest.raises(UserError, match=r"21 samples in a row cannot be used, more than data.max_bad_run=20; the last is a/0"):
        take(loader(tmp_path, decoders, workers=workers, max_bad_rate=1.0, max_bad_run=20), 1)
    write_shard(tmp_path / "a.tar", {f"{i:03d}": good(i) if i % 2 else BAD["no caption"] for i in range(100)})
    take(loader(tmp_path, decoders, workers=workers, max_bad_rate=1.0, max_bad_run=20), 10)


def test_a_bug_is_not_a_bad_sample(data):
    class Broken:
        def __call__(self, sample, rng, train):
            return {}["a bug"]

    for workers in (0, 1):
        with pytest.raises(KeyError) as e:
            take(loader(data, {"image": Broken()}, workers=workers), 1)
        assert "while decoding sample t-0" in str(e.value) + "".join(getattr(e.value, "__notes__", []))


# ---- bad shards and invalid settings ---------------------------------------------------------------------------------


def test_damaged_shards_are_refused_before_training(data, decoders, tmp_path):
    content = (data / "t-00.tar").read_bytes()
    with tarfile.open(data / "t-00.tar") as tar:
        header = tar.getmembers()[20].offset
    for name, damage, message in (
        ("a", content[: len(content) // 2], "a.tar is damaged at byte"),
        ("b", content[: header + 8] + b"X" + content[header + 9 :], f"b.tar is damaged at byte {header:,}"),
        ("c", b"", "c.tar is empty"),
        ("d", bytes(10240), r"data.train: no samples in .*d.tar"),
        ("e", b"hello" * 1000, "e.tar is not a tar file"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(damage)
        with pytest.raises(UserError, match=message):
            loader(data, decoders, train=str(tmp_path / f"{name}.tar"))
    with pytest.raises(ConfigError, match=r"data.train=.*no file matches"):
        loader(data, decoders, train=str(tmp_path / "none-*.tar"))


def test_an_empty_shard_among_others_is_only_reported(data, decoders, tmp_path, caplog):
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    one = loader(data, decoders, train=[str(data), str(tmp_path)])
    assert one.order.epoch_size == 200
    assert "empty.tar holds no samples" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_contradicts_its_stats_stops_the_run(data, decoders, tmp_path, workers):
    content = (data / "t-00.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "a_stats.json").write_text(json.dumps({"successes": 30}))
    with pytest.raises(UserError, match=r"a\.tar is damaged"):
        take(loader(data, decoders, train=str(tmp_path), workers=workers), 1)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a.tar holds 20 samples, but .*a_stats.json says 30"):
        take(loader(data, decoders, train=str(tmp_path), workers=workers), 1)


def test_disk_errors_stop_the_run(data, decoders, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0))
    write_shard(tmp_path / "a.tar", {f"{i:03d}": good(i) for i in range(50)})
    one = loader(data, decoders, train=str(tmp_path), workers=1)

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pretrain.data.shards.reader.os.pread", fails)
    with pytest.raises(UserError, match=r"cannot read .*a.tar: \[Errno 5\] Input/output error, tried 3 times"):
        take(one, 1)
    assert not one.bad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 201}, "data.batch_size=201 is more than data.train holds: a batch can have at most its 200 samples"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"workers": -1}, "data.workers=-1 must be at least 0"),
        ({"max_bad_rate": 2.0}, "data.max_bad_rate=2.0 must be a fraction, 0 to 1"),
        ({"streams": 5}, "data.batch_size=24 cannot be divided among data.streams=5"),
        ({"train": 3}, "data.train=3 must be a string of shards"),
        ({"train": []}, r"data.train=\[\] must be a string of shards"),
        ({"train": [{"shard": "x"}]}, r"data.train: {'shard': 'x'} must be"),
        ({"train": [{"shards": "x", "wieght": 1}]}, "an entry has no key 'wieght'; did you mean 'weight'"),
        ({"train": [{"shards": "x", "weight": -1}]}, "weight=-1 of x must be a positive number"),
        ({"train": [{"shards": "x", "weight": 1}, {"shards": "y"}]}, "y has no weight, but others have"),
        ({"val": {"a": 1}}, "data.val={'a': 1} must be"),
    ],
)
def test_settings_refused(data, decoders, changes, message):
    with pytest.raises(ConfigError, match=message) as e:
        loader(data, decoders, **changes)
    assert "\n" not in str(e.value)


# ---- processes -------------------------------------------------------------------------------------------------------


def children():
    """Return the ids of the live child processes."""
    own_pid = str(os.getpid())
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                state, parent = f.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if parent == own_pid and state != "Z":
            pids.append(int(pid))
    return pids


def data_workers():
    return {pid for pid in children() if Path(f"/proc/{pid}/comm").read_text().startswith("pt_data")}


def test_a_killed_worker_is_a_clear_error(data, decoders):
    handler = signal.getsignal(signal.SIGCHLD)
    before = data_workers()
    iterator = iter(loader(data, decoders, workers=2))
    next(iterator)
    assert signal.getsignal(signal.SIGCHLD) is handler
    os.kill(min(data_workers() - before), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a data worker \(process \d+\) was killed by signal 9 \(SIGKILL\): most often"):
        list(itertools.islice(iterator, 1000))
    assert time.monotonic() - start < 60
    assert not data_workers() - before


class Dying(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Data set whose worker is killed during the third job, some time after its files were closed."""

    def __getitem__(self, job: int) -> torch.Tensor:
        if job == 2:
            time.sleep(0.5)  # by now the previous results have been sent
            os.closerange(3, 1024)
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1000)


def test_a_killed_worker_whose_files_are_closed_before_it_exits() -> None:
    """On a busy machine some time passes between the two."""
    with worker_pool.run_workers(Dying(), iter(range(9)), 1) as results:
        next(results)
        (worker,) = data_workers()
        while len(os.listdir(f"/proc/{worker}/fd")) > 3:
            time.sleep(0.05)
        with pytest.raises(UserError, match=rf"a data worker \(process {worker}\) was killed by signal 9"):
            next(results)


def test_threads_that_wait_for_the_same_process_all_get_its_exit_code() -> None:
    """The kernel gives it to one of them; by join() alone, about one process in fifteen has no code for another thread."""
    context = multiprocessing.get_context("fork")
    for _ in range(60):
        process = context.Process(target=os._exit, args=(3,))
        process.start()
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(worker_pool._wait_for_exit_code, [process] * 3)) == [3, 3, 3]


class Large(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Data set whose results do not fit into a pipe: a worker waits until half of one is read."""

    def __getitem__(self, job: int) -> bytes:
        return bytes(1 << 20)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("workers", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_worker_that_is_killed_while_it_sends_a_result(workers: int, victim: int) -> None:
    """The rest of the result never comes, and other workers wait for the lock of the pipe."""
    before = data_workers()
    with worker_pool.run_workers(Large(), iter(range(90)), workers) as results:
        next(results)
        time.sleep(0.5)  # results are ready, and the trainer does something else: it evaluates, for example
        pid = sorted(data_workers() - before)[victim]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match=rf"a data worker \(process {pid}\) was killed by signal 9"):
            list(results)
    assert not data_workers() - before


def test_workers_leave_signals_to_the_trainer(data, decoders):
    before = set(children())
    iterator = iter(loader(data, decoders, workers=2))
    next(iterator)
    workers = set(children()) - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        for pid in workers:
            os.kill(pid, number)
        for _ in range(10):
            next(iterator)
    iterator.close()
    assert set(children()) <= before


def test_shards_are_prefetched(data, decoders, tmp_path):
    for s in range(9):
        write_shard(tmp_path / f"s-{s}.tar", {f"{i}": good(i) for i in range(30)})
        (tmp_path / f"s-{s}_stats.json").write_text(json.dumps({"successes": 30}))
    before = set(children())
    built = loader(data, decoders, train=str(tmp_path), window=3, batch_size=10)

    def indexed() -> set[str]:
        return {path.name.removesuffix(".idx") for path in tmp_path.glob("*.idx")}

    looked_at = indexed()  # for lines in captions, when the loader was built
    windows = {f"s-{shard}.tar" for batch in range(18) for shard in built._list_shards(batch)}
    assert len(windows) == 6
    iterator = iter(built)
    next(iterator)
    for _ in range(300):
        if indexed() >= windows:
            break
        time.sleep(0.1)
    time.sleep(0.3)  # the prefetcher looks every 0.1 s whether it may go on
    assert indexed() == windows | looked_at  # those of the current and the next window
    for _ in range(9):
        next(iterator)
    for _ in range(300):
        if len(indexed()) == 9:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the prefetcher did not follow the loader")
    iterator.close()
    assert set(children()) <= before
    again = loader(data, decoders, train=str(tmp_path), window=3, batch_size=10)
    assert again.prefetch_reader is None  # all shards are indexed now


def test_streams_are_chosen_where_shards_are_fetched(data, decoders, tmp_path, caplog):
    """Eight is the largest divisor of the batch of 24, and of 48, for which nine shards suffice."""
    for s in range(9):
        write_shard(tmp_path / f"s-{s}.tar", {f"{i}": good(i) for i in range(30)})
    chosen = {}
    for stage in (False, True):
        config = DataConfig(train=str(tmp_path), batch_size=24, workers=0, window=3, stage=stage, cache=str(tmp_path / "cache"))
        chosen[stage] = build_loader(config, decoders, seed=1).order.streams
        assert (config.streams, config.window) == ((8, 1) if stage else (1, 3))
    assert chosen == {False: 1, True: 8}
    assert not caplog.records
    config = DataConfig(train=str(tmp_path), batch_size=24, workers=0, streams=1, stage=True, cache=str(tmp_path / "cache"))
    build_loader(config, decoders, seed=1, rank=1, world=2, nodes=2)
    assert "data.streams=1: each of the 2 nodes fetches every shard" in caplog.text


@pytest.mark.parametrize(
    ("now", "saved", "resumed"),
    [
        ((0, 16), {"streams": 48, "window": 1}, (48, 1)),
        ((0, 16), {"streams": 1, "window": 16}, (1, 16)),
        ((0, 16), {}, (1, 16)),  # saved before there were streams
        ((0, 32), {"streams": 4, "window": 4}, (4, 32)),  # another window than then: the loader refuses to resume
        ((0, 16), {"streams": 4, "window": 16}, (4, 16)),
        ((2, 16), {"streams": 4, "window": 4}, (2, 16)),
    ],
)
def test_a_run_resumes_with_the_streams_that_it_began_with(now, saved, resumed):
    config = DataConfig(streams=now[0], window=now[1])
    config.resume_streams(saved)
    assert (config.streams, config.window) == resumed


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (7, 0)])
def test_evaluation_reads_each_sample_once(data, world, workers):
    both = decoders_for(data, caption="captions")
    by_rank = [list(build_eval_loader(str(data), both, 30, workers=workers, rank=rank, world=world)) for rank in range(world)]
    batches = [batch for rank_batches in by_rank for batch in rank_batches]
    assert [key for batch in batches for key in batch.keys] == [f"t-{n // 20:02d}/{n:04d}" for n in range(200)]
    assert [fields["number"] for batch in batches for fields in batch.targets["json"]] == list(range(200))
    texts = [captions for batch in batches for captions in batch.targets["captions"]]
    assert texts == [[caption(n), f"a picture of {caption(n)}"] for n in range(200)]
    sizes = [[len(batch) for batch in rank_batches] for rank_batches in by_rank]
    assert all(size == 30 for rank_sizes in sizes for size in rank_sizes[:-1])
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
    image = next(b.inputs["image"][0] for b in batches if b.keys[0] == "t-00/0000")
    assert torch.equal(image, both["image"].decode_eval(jpeg(0)))


def test_evaluation_leaves_bad_samples_out(decoders, spoilt):
    folder, reasons = spoilt
    batches = build_eval_loader(str(folder), decoders, 1, workers=2)
    for _ in range(2):  # the loader can be iterated again
        keys = [key for batch in batches for key in batch.keys]
        assert len(keys) == 192
        assert not set(keys) & set(reasons)
        assert dict(batches.bad) == dict.fromkeys(BAD, 1)


def test_evaluation_of_the_first_samples(data, decoders):
    for world in (1, 3):
        keys = [
            key
            for rank in range(world)
            for batch in build_eval_loader(f"{data}/t-0*.tar", decoders, 8, rank=rank, world=world, max_samples=25)
            for key in batch.keys
        ]
        assert keys == [f"t-{n // 20:02d}/{n:04d}" for n in range(25)]
    with pytest.raises(ConfigError, match=r"^data.val=.*no file matches"):
        build_eval_loader(f"{data}/x-*.tar", decoders, 8)


def test_shards_of_both_training_and_evaluation_are_said_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    url = "https://host/t-00.tar"
    check_sources("synthetic", f"{data}/t-00.tar")
    check_sources([f"{data}/t-01.tar", url], [f"{data}/t-02.tar", "https://host/t-01.tar"])
    check_sources(str(data), None)
    assert not caplog.messages
    check_sources([{"shards": [str(data)], "weight": 1.0}, {"shards": url, "weight": 1.0}], ["link/t-0[12].tar", url])
    (line,) = caplog.messages
    assert line.startswith("https://host/t-00.tar and 2 more in data.val are in data.train, too: evaluation ")
    with pytest.raises(ConfigError, match=r"^data.train=gone: no file"):
        check_sources("gone", "gone")


# ---- methods of Batch, several captions, synthetic data ---------------------------------------------------------------


def test_batches_are_split_and_moved(reference):
    (batch, *_) = reference
    parts = batch.chunk(5)
    assert [len(part) for part in parts] == [4, 5, 5, 5, 5]
    assert [key for part in parts for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.inputs["image"] for part in parts]), batch.inputs["image"])
    assert torch.equal(torch.cat([part.targets["caption_id"] for part in parts]), batch.targets["caption_id"])
    assert batch.to("meta").inputs["text"].device.type == "meta"
    assert batch.slice(3, 5).masks["text"].shape == (2, batch.masks["text"].shape[1])


def test_several_captions_per_sample_are_drawn_by_position(data):
    """Position p has the same captions for any workers and size of partial batches, each with its own id."""
    drawing = decoders_for(data, caption="captions", draw=2)
    whole = take(loader(data, drawing), 3)
    for batch in whole:
        assert batch.inputs["text"].shape[:2] == batch.masks["text"].shape[:2] == batch.targets["caption_id"].shape == (24, 2)
        for key, ids in zip(batch.keys, batch.targets["caption_id"].tolist(), strict=True):
            words = caption(int(key.split("/")[1]))
            assert set(ids) == {caption_id(words), caption_id(f"a picture of {words}")}
    assert_equal_batches(take(loader(data, drawing, partial_size=5), 3), whole)
    assert_equal_batches(take(loader(data, drawing, workers=2), 3), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_synthetic_data_needs_no_files(decoders, workers):
    one = loader(None, decoders, train="synthetic", workers=workers)
    assert one.order.epoch_size == 1_000_000
    first, second = take(one, 2)
    assert first.inputs["image"].shape == (24, 3, 32, 32)
    assert not torch.equal(first.inputs["image"], second.inputs["image"])
    assert first.masks["text"].sum(1).min() > 3
    assert not set(first.keys) & set(second.keys)
    assert_equal_batches(take(loader(None, decoders, train="synthetic"), 2), [first, second])
