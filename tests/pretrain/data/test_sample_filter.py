"""data.keep and data.skip: which samples are read instead, how they are counted, and what a wrong setting says.

The references read the tars with plain Python, and follow the documented rule: while the sample of a position is passed over or
bad, the next substitute of `Order.substitute` takes its place.
"""

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch import cli, report
from pretrain.checkpoints import store
from pretrain.data import worker
from pretrain.data.batch import Batch
from pretrain.data.check import check_shards
from pretrain.data.loader import DataConfig, Loader, build_loader
from pretrain.data.order import Order, ShardSource
from pretrain.data.sample_filter import NOT_KEPT, SKIPPED, SkipList, format_skip_line, parse_keep, read_skip_list
from pretrain.data.shards.paths import RawSample
from pretrain.errors import ConfigError, UserError
from tests.support import Small, read_jsonl

KEEP = "json.similarity > 0.28 and json.width >= 200"
SHARDS, SAMPLES, WINDOW, BATCH = 4, 16, 2, 8


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "JPEG")
    return out.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def fields_of(i: int) -> dict[str, Any]:
    """About half of the samples pass KEEP; some have no similarity, one that is null, or one that is no number."""
    values: dict[str, Any] = {"similarity": (0.1, 0.3, 0.29, 0.5)[i % 4], "width": 150 + 100 * (i % 3 > 0)}
    if i % 7 == 0:
        del values["similarity"]
    if i % 11 == 5:
        values["similarity"] = None
    return values | ({"similarity": "0.9"} if i % 13 == 12 else {})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 16 samples; in each, number 3 has no image, and number 9 no json."""
    folder = tmp_path_factory.mktemp("filtered")
    image = jpeg()
    for s in range(SHARDS):
        samples = []
        for i in range(SAMPLES):
            number = SAMPLES * s + i
            members = {"jpg": image, "txt": f"a red square {number}".encode(), "json": json.dumps(fields_of(number)).encode()}
            for missing in ("jpg",) if i == 3 else ("json",) if i == 9 else ():
                del members[missing]
            samples.append((f"{number:04d}", members))
        write_shard(folder / f"t-{s}.tar", samples)
    return folder


def read_tars(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return {"shard/KEY": members}, in the order of the files."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(f"{path.stem}/{key}", {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return samples


def passes(members: dict[str, bytes]) -> bool:
    """KEEP, in Python."""
    values = json.loads(members.get("json", b"{}"))
    similarity, width = values.get("similarity"), values.get("width")
    return isinstance(similarity, float) and similarity > 0.28 and isinstance(width, int) and width >= 200


def expected_keys(folder: Path, batches: int, reason: Callable[[str, dict[str, bytes]], str]) -> tuple[list[str], Counter[str]]:
    """Return the keys of the first batches by the documented rule, and the reasons of the samples that were replaced."""
    samples = read_tars(folder)
    names = list(samples)
    order = Order([ShardSource([SAMPLES] * SHARDS)], seed=1, window=WINDOW)
    keys, reasons = [], Counter[str]()
    for position in range(batches * BATCH):
        _, shard, sample = (int(index[0]) for index in order.locate([position]))
        for attempt in itertools.count():
            key = names[SAMPLES * shard + sample]
            why = reason(key, samples[key])
            if not why:
                break
            reasons[why] += 1
            _, shard, sample = order.substitute(position, attempt)
        keys.append(key)
    return keys, reasons


class Bytes:
    """Decoder of the image's bytes: a sample without them is bad."""

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> torch.Tensor:
        if "jpg" not in sample.members:
            raise worker.BadSample("no image")
        return torch.tensor([int(rng.integers(1 << 30))])

    def collate(self, items: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        return torch.stack(items), None


def build(folder: Path, workers: int = 0, **settings: Any) -> Loader:
    config = DataConfig(train=str(folder), batch_size=BATCH, workers=workers, window=WINDOW, max_bad_rate=0.2, **settings)
    config.check()
    return build_loader(config, {"image": Bytes()}, seed=1)


def take(loader: Loader, count: int) -> list[Batch]:
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


# ---- which samples are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_are_not_kept_are_replaced_by_the_rule(data: Path, workers: int) -> None:
    keys, reasons = expected_keys(
        data, 20, lambda _, members: NOT_KEPT if not passes(members) else "no image" if "jpg" not in members else ""
    )
    loader = build(data, workers, keep=KEEP)
    batches = take(loader, 20)
    assert keys_of(batches) == keys
    assert set(keys) == {key for key, members in read_tars(data).items() if passes(members) and "jpg" in members}
    assert loader.filtered == {NOT_KEPT: reasons[NOT_KEPT]}
    assert loader.bad == {"no image": reasons["no image"]}
    plain = build(data)
    untouched = take(plain, 20)
    assert not plain.filtered
    same = 0
    for batch, other in zip(batches, untouched, strict=True):  # random numbers belong to positions
        for i, key in enumerate(other.keys):
            if batch.keys[i] == key:
                assert torch.equal(batch.inputs["image"][i], other.inputs["image"][i])
                same += 1
    assert same > 40


def test_samples_of_a_list_are_replaced_and_counted_apart(data: Path, tmp_path: Path) -> None:
    listed = [key for i, key in enumerate(read_tars(data)) if i % 5 == 1]
    (tmp_path / "skip.txt").write_text("\ufeff" + "\r\n".join([*listed, "", listed[0] + "\tseen twice"]))

    def reason(key: str, members: dict[str, bytes]) -> str:
        return SKIPPED if key in listed else NOT_KEPT if not passes(members) else "no image" if "jpg" not in members else ""

    keys, reasons = expected_keys(data, 16, reason)
    loader = build(data, keep=KEEP, skip=str(tmp_path / "skip.txt"))
    assert keys_of(take(loader, 16)) == keys
    assert loader.filtered == {NOT_KEPT: reasons[NOT_KEPT], SKIPPED: reasons[SKIPPED]}
    by_shard = loader.take_replaced()
    assert Counter(reason for (_, reason) in by_shard.elements()) == reasons
    assert not loader.take_replaced()


def test_a_resumed_loader_goes_on_with_keys_and_counts(data: Path) -> None:
    whole = build(data, keep=KEEP)
    keys = keys_of(take(whole, 14))
    half = build(data, keep=KEEP)
    first = keys_of(take(half, 5))
    rest = build(data, 1, keep=KEEP)
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert first + keys_of(take(rest, 9)) == keys
    assert rest.state_dict() == whole.state_dict()
    for settings in ({}, {"keep": "json.similarity > 0.3"}):
        with pytest.raises(UserError, match=r"data\.keep or data\.skip"):
            build(data, **settings).load_state_dict(half.state_dict())


def test_filtered_samples_do_not_count_against_the_limits(data: Path) -> None:
    few = build(data, keep="json.similarity == 0.29 and json.width = 250", max_bad_run=0)
    few.max_bad_rate = 0.0
    keys = set(keys_of(take(few, 10)))
    assert keys
    assert few.filtered[NOT_KEPT] > 80
    assert not few.bad
    assert all("jpg" in read_tars(data)[key] for key in keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_passes_one_line_says_so(data: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(worker, "MAX_FILTERED", 300)
    with pytest.raises(
        UserError, match=r"data\.keep='json\.width > 9000': none of 300 samples .* the last is t-\d/\d+ \(not kept\)"
    ) as error:
        take(build(data, workers, keep="json.width > 9000"), 1)
    assert "\n" not in str(error.value)


def test_a_json_that_cannot_be_parsed_is_bad(tmp_path: Path) -> None:
    samples = [(f"{i}", {"jpg": jpeg(), "json": b'{"width": 300}'}) for i in range(30)]
    samples[4][1]["json"] = b'{"width": 3'
    write_shard(tmp_path / "a.tar", samples)
    loader = build(tmp_path, keep="json.width >= 200")
    take(loader, 4)
    assert set(loader.bad) == {"json unreadable"}
    assert loader.filtered == {NOT_KEPT: 0}


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("similarity > 0.28", "fields of a sample's json are written json.NAME, not 'similarity'"),
        ("json.similarity > 0.28 and", "column 27"),
        ("json.similarity > 0.28 && json.width > 3", "write and, not &&"),
        ("", "data.keep is empty"),
        ("json.title is null", "not exists FIELD"),
    ],
)
def test_a_wrong_condition_is_one_line(keep: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_keep(keep)
    assert "data.keep" in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file"),
        (b"t-0/0001\nt-0 0002\n", "line 2 is 't-0 0002', not SHARD/KEY"),
        (b"t-0/0001\n\xff\xfe", "byte 9 is not UTF-8"),
        (b"t-0\t0001\n", "not SHARD/KEY"),
    ],
)
def test_a_broken_list_is_refused_in_one_line(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "skip.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        DataConfig(train="x.tar", skip=str(path)).check()
    assert f"data.skip={path}" in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_synthetic_data_have_neither_fields_nor_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.keep='json\.a' needs shards, but data\.train is synthetic"):
        DataConfig(keep="json.a").check()


def test_lines_that_name_no_sample_are_counted(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "skip.txt"
    path.write_text("t-0/0001\nt-0/9999\nt-9/0001\nt-1/0017\nt-1/0017\tagain\n")
    take(build(data, skip=str(path)), 1)
    assert [r.getMessage() for r in caplog.records if "data.skip" in r.getMessage()] == [
        f"data.skip={path}: 2 of 4 lines name no sample of data.train"
    ]
    caplog.clear()
    path.write_text("t-0/0001\n")
    take(build(data, skip=str(path)), 1)
    assert "data.skip" not in caplog.text


@pytest.mark.parametrize("key", ["a/b c", "tab\there", "two\nlines", "back\\slash", "\u2028", "é"])
def test_any_key_survives_the_list(tmp_path: Path, key: str) -> None:
    path = tmp_path / "skip.txt"
    path.write_text(format_skip_line(f"t-0/{key}", "no image") + "\n" + format_skip_line("t-0/x", "duplicate key") + "\n")
    skip_list = read_skip_list(str(path))
    assert len(skip_list) == 2
    assert skip_list.names(f"t-0/{key}")
    assert not skip_list.names(f"t-1/{key}")
    assert (skip_list.names("t-0/x"), skip_list.names("t-0/x", is_repeated=True)) == (False, True)
    assert skip_list.describe() == SkipList(path.read_text().split("\n")[1::-1]).describe()  # in any order


# ---- check --fix -----------------------------------------------------------------------------------------------------


def test_what_check_writes_leaves_training_without_bad_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    members = {"jpg": jpeg(), "txt": b"red"}
    for folder in ("a", "b"):  # shards of one name
        (tmp_path / folder).mkdir()
        samples = [(f"{i:02d}", dict(members)) for i in range(20)]
        del samples[3][1]["jpg"], samples[7][1]["txt"]
        samples += [("00", dict(members)), ("x", {"jpg": jpeg()}), ("y", dict(members)), ("x", {"txt": b"apart"})]
        write_shard(tmp_path / folder / "0.tar", samples)
    arguments = ["data", "check", "a", "b", "--workers", "1"]
    assert cli.main(arguments) == 1
    assert cli.main([*arguments, "--fix", "no/skip.txt"]) == 2
    assert cli.main([*arguments, "--fix", "skip.txt"]) == 0
    assert "skip.txt: 10 samples; data.skip=skip.txt trains without them" in capsys.readouterr().out
    lines = [line.split("\t") for line in (tmp_path / "skip.txt").read_text().splitlines()]
    expected = [("03", "no image"), ("07", "no caption"), ("00", "duplicate key"), *[("x", "members apart")] * 2]
    assert lines == [[f"{name}-0/{key}", reason] for name in ("a", "b") for key, reason in expected]

    class Pair(Bytes):
        def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> torch.Tensor:
            if "txt" not in sample.members:
                raise worker.BadSample("no caption")
            return super().__call__(sample, rng, train)

    config = DataConfig(train=["a/0.tar", "b/0.tar"], batch_size=8, workers=0, window=2, skip="skip.txt", max_bad_rate=0.0)
    loader = build_loader(config, {"image": Pair()}, seed=1)
    keys = set(keys_of(take(loader, 24)))
    assert not loader.bad
    assert loader.filtered[SKIPPED] > 0
    good = [f"{i:02d}" for i in range(20) if i not in (3, 7)] + ["y"]
    assert keys == {f"{name}-0/{key}" for name in ("a", "b") for key in good}
    assert check_shards(["a/0.tar"], decode=False, workers=1).lines[2] == "0/00\tduplicate key"


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(small: Small, data: Path, in_tmp: Path) -> Callable[..., list[str]]:
    def build_settings(run: str, *more: str) -> list[str]:
        given = [f"data.train={data}", f"data.batch_size={BATCH}", f"data.window={WINDOW}", "data.max_bad_rate=0.3", "seed=1"]
        return ["pretrain", "scenes", *small.settings(run, *given, "train.audit=true", *more)]

    return build_settings


def test_a_run_reads_what_is_kept_counts_it_and_resumes(
    settings: Callable[..., list[str]], data: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = f"data.keep={KEEP}"
    assert cli.main(settings("whole", keep, "train.steps=12")) == 0
    printed = capsys.readouterr()
    keys, reasons = expected_keys(
        data, 12, lambda _, members: NOT_KEPT if not passes(members) else "no image" if "jpg" not in members else ""
    )
    audited = [key for line in read_jsonl(in_tmp / "runs/whole/audit-0.jsonl") for key in line["keys"]]
    assert audited == keys
    last = read_jsonl(in_tmp / "runs/whole/metrics.jsonl")[-1]
    assert (last["filtered_samples"], last["filtered/not kept"]) == (reasons[NOT_KEPT],) * 2
    assert (last["bad_samples"], last["bad/no image"]) == (reasons["no image"],) * 2
    table = [line.split("\t") for line in (in_tmp / "runs/whole/replaced.tsv").read_text().splitlines()]
    assert table[0] == ["shard", "reason", "samples"]
    counts = Counter({(shard, reason): int(count) for shard, reason, count in table[1:]})
    assert Counter(reason for _, reason in counts.elements()) == reasons
    assert {shard for shard, _ in counts} == {f"t-{s}" for s in range(SHARDS)}
    assert f"passed over {reasons[NOT_KEPT]} samples not kept; by shard in runs/whole/replaced.tsv" in printed.out + printed.err
    assert f"{reasons[NOT_KEPT]:,} samples were passed over" in report.write(in_tmp / "runs/whole").read_text()

    parts = settings("parts", keep, "train.save_every=5", "train.log_every=4")
    assert cli.main([*parts, "train.steps=7"]) == 0
    assert cli.main([*parts, "train.steps=12", "data.workers=1"]) == 0
    assert [key for line in read_jsonl(in_tmp / "runs/parts/audit-0.jsonl") for key in line["keys"]] == keys
    assert read_jsonl(in_tmp / "runs/parts/metrics.jsonl")[-1]["filtered_samples"] == reasons[NOT_KEPT]
    assert (in_tmp / "runs/parts/replaced.tsv").read_text() == (in_tmp / "runs/whole/replaced.tsv").read_text()


def test_a_run_is_not_resumed_with_another_filter(
    settings: Callable[..., list[str]], data: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "skip.txt").write_text("t-0/0001\n")
    assert cli.main(settings("r", "data.skip=skip.txt", "train.steps=3", "train.save_every=2", "train.log_every=2")) == 0
    whole = (in_tmp / "runs/r/replaced.tsv").read_text()
    store_folder = store.list_complete(in_tmp / "runs/r/checkpoints")
    assert store_folder
    capsys.readouterr()
    for changes, expected in (
        (["data.skip=skip.txt", f"data.keep={KEEP}"], f"data.keep is '{KEEP}' now and was None"),
        ([], "data.skip is None now and was '1 lines, "),
    ):
        assert cli.main(settings("r", *changes, "train.steps=6")) == 2
        assert expected in capsys.readouterr().err
    (in_tmp / "skip.txt").write_text("t-0/0002\n")
    assert cli.main(settings("r", "data.skip=skip.txt", "train.steps=6")) == 2
    assert "data.skip is '1 lines, " in capsys.readouterr().err
    (in_tmp / "skip.txt").write_text("t-0/0001\tits reason\n")
    step2 = str(store_folder[0])
    again = settings("r", "data.skip=skip.txt", "train.steps=3", f"resume={step2}", "train.save_every=2", "train.log_every=2")
    assert cli.main(again) == 0
    assert (in_tmp / "runs/r/replaced.tsv").read_text() == whole


def test_a_run_that_stops_for_bad_samples_leaves_the_table(settings: Callable[..., list[str]], in_tmp: Path) -> None:
    assert cli.main(settings("r", "train.steps=9", "data.max_bad_rate=0.0", "train.log_every=50")) == 1
    rows = (in_tmp / "runs/r/replaced.tsv").read_text().splitlines()[1:]
    assert rows
    assert all("\tno image\t" in row for row in rows)
