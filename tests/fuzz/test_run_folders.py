"""Run folders, checkpoints, exports and embedding folders that are damaged: a fall-back, or one line, but never a crash."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from launch import cli, report
from launch.report.run_history import read_run
from pretrain.checkpoints import export, store
from pretrain.checkpoints.loading import load_model
from pretrain.embedding import dataset
from pretrain.errors import UserError
from pretrain.strategies import Strategy, single
from tests.support import Small
from tests.support.mutations import (
    HOSTILE,
    BoundedMemory,
    assert_one_line,
    count_cases,
    mutate_bytes,
    mutate_json,
    mutate_value,
)
from tests.support.tiny import build_batch, build_model, build_objective


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint after each and an evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    more = [f"data.val={small.val}", "train.steps=2", "train.save_every=1", "train.eval_every=1", "optim.average=0.5"]
    assert cli.main(["pretrain", "scenes", *small.settings(folder), *more]) == 0
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that makes a fresh copy of the run."""

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        return Path(shutil.copytree(run, tmp_path / "r"))

    return fresh


def attempt(action: Callable[[], Any], name: str = "") -> Any:
    """Return what `action` returns; None where it fails as it may, with one line that contains `name`."""
    try:
        return action()
    except UserError as error:
        assert_one_line(error, name)
        return None


TEXTS = ["status.json", "environment.json", "metrics.jsonl", "config.yaml"]


def damage_text(rng: random.Random, path: Path) -> None:
    """Damage a text file of a run folder: its bytes, or values in it."""
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(mutate_json(rng, data))
    elif path.suffix == ".jsonl" and rng.random() < 0.7:
        lines = data.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = mutate_json(rng, lines[i])
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix == ".yaml" and rng.random() < 0.7:
        path.write_text(yaml.safe_dump(mutate_value(rng, yaml.safe_load(data))), errors="replace")
    else:
        path.write_bytes(mutate_bytes(rng, data))


def test_a_damaged_run_folder_gets_a_report_without_what_is_damaged(copy: Callable[[], Path]) -> None:
    folder = copy()
    originals = {name: (folder / name).read_bytes() for name in TEXTS}
    with BoundedMemory():
        for case in range(count_cases(40)):
            rng = random.Random(case)
            for name in rng.sample(TEXTS, rng.choice([1, 1, 2])):
                damage_text(rng, folder / name)
            history = attempt(lambda: read_run(folder))
            page = report.render(history)
            assert "</html>" in page, case
            for name, data in originals.items():
                (folder / name).write_bytes(data)
    history = read_run(folder)
    assert history.step == 2
    assert len(history.steps) == 2
    assert len(history.evaluations) == 2


def test_a_report_of_lines_that_no_run_has_written(copy: Callable[[], Path]) -> None:
    folder = copy()
    intact = (folder / "metrics.jsonl").read_text()
    strange = [json.dumps({"step": value, "loss": value}) for value in HOSTILE if value not in (0, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(["", "[]", "nul", *strange]) + "\n" + intact)
    history = read_run(folder)
    assert [line["step"] for line in history.steps if line["step"] <= 2] == [1, 2]
    assert all(isinstance(line["step"], int) and isinstance(line["loss"], float | None) for line in history.steps[:2])
    assert "</html>" in report.render(history)


POINTERS = ["best", "latest", "step-0000002/manifest.json", "step-0000001/manifest.json", "step-0000002/model.safetensors"]


def test_damaged_pointers_and_manifests_never_hide_an_intact_checkpoint(copy: Callable[[], Path]) -> None:
    folder = copy()
    checkpoints = folder / "checkpoints"
    originals = {name: (checkpoints / name).read_bytes() for name in POINTERS}
    for case in range(count_cases(120)):
        rng = random.Random(case)
        name = rng.choice(POINTERS)
        data = originals[name]
        (checkpoints / name).write_bytes((mutate_json if name.endswith(".json") else mutate_bytes)(rng, data))
        found = store.find(folder)
        assert store.integrity_error(found) is None, case
        assert found.parent == checkpoints, case
        if "model" in name and (checkpoints / name).read_bytes() != data:
            assert found.name == "step-0000001", case
        lines: list[str] = []
        newest = store.find_newest(checkpoints, lines.append)
        assert newest is not None, case
        assert all("\n" not in line for line in lines), case
        (checkpoints / name).write_bytes(data)
    shutil.rmtree(checkpoints / "step-0000001")
    for text in ("../../other", "step-0000002/../step-0000002", "step-9", "", ".", "\x00", "step-0000001"):
        (checkpoints / "best").write_text(text)
        assert store.read_pointer(checkpoints, "best") is None
    os.unlink(checkpoints / "best")
    os.mkfifo(checkpoints / "best")
    assert store.find(folder).name == "step-0000002"


def test_a_damaged_configuration_of_a_checkpoint_is_one_line(copy: Callable[[], Path]) -> None:
    folder = copy()
    checkpoint = folder / "checkpoints/step-0000002"
    (checkpoint / "manifest.json").unlink()  # nothing vouches for the other files now
    path = checkpoint / "config.yaml"
    data, loads = path.read_bytes(), 0
    with BoundedMemory(2048):
        for case in range(count_cases(15)):
            damage_text(random.Random(case), path)
            loads += attempt(lambda: load_model(checkpoint)) is not None
            path.write_bytes(data)
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
        for text in (bomb, "a: &a {b: *a}", "[" * 50_000, "a: 2024-99-99", "? [1, 2]\n: x", "a: !!binary x", "x: ${", "- 1"):
            path.write_text(text)
            with pytest.raises(UserError) as error:
                load_model(checkpoint)
            assert_one_line(error.value)


# ---- state to resume from --------------------------------------------------------------------------------------------


def other_tensors(rng: random.Random, value: torch.Tensor) -> Any:
    """Return something that is not the tensor that belongs there."""
    return rng.choice(
        [
            torch.zeros(1), torch.zeros(3, 5), torch.tensor(0.0), torch.zeros(0), value.int(), value.to(torch.complex64),
            torch.zeros(*value.shape, 2), value.to_sparse() if value.ndim else torch.zeros(2), value.to("meta"), "text", None,
            3, [1.0], {"a": 1}, torch.zeros(1).expand(1 << 40),
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[Strategy, dict[str, Any]]:
    """A strategy after a step, and the state that it saves."""
    strategy = build_strategy()
    take_step(strategy)
    return strategy, {"optimizer": strategy.optimizer_state(), "scaler": {}}


def build_strategy() -> Strategy:
    from pretrain.optim import OptimConfig

    strategy = single.build("fp32", OptimConfig(), torch.device("cpu"))
    strategy.setup(build_model("clip"))
    return strategy


def take_step(strategy: Strategy) -> None:
    from pretrain.training.step import train_step

    train_step(strategy, build_objective("clip"), build_batch(), 1, 1e-3, (0, 0, 0))


def test_damaged_optimizer_state_is_one_line(trained: tuple[Strategy, dict[str, Any]], tmp_path: Path) -> None:
    _, state = trained
    loads = refusals = 0
    for case in range(count_cases(60)):
        rng = random.Random(case)
        damaged = {"optimizer": {name: dict(values) for name, values in state["optimizer"].items()}, "scaler": {}}
        name = rng.choice(list(damaged["optimizer"]))
        key = rng.choice(["step", "exp_avg", "exp_avg_sq"])
        kind = rng.randrange(6)
        if kind == 0:
            del damaged["optimizer"][name][key]
        elif kind == 1:
            damaged["optimizer"][name] = rng.choice(HOSTILE[:24])
        elif kind == 2:
            damaged[rng.choice(["optimizer", "scaler"])] = rng.choice(HOSTILE[:24])
        else:
            damaged["optimizer"][name][key] = other_tensors(rng, damaged["optimizer"][name][key])
        path = tmp_path / "optimizer.pt"
        torch.save(damaged, path)
        if rng.random() < 0.3:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        strategy = build_strategy()
        try:
            strategy.load(tmp_path)
            take_step(strategy)  # the fused kernel trusts shapes
            loads += 1
        except UserError as error:
            assert_one_line(error, "optimizer.pt")
            refusals += 1
    assert refusals > 20


def test_damaged_trainer_state_is_one_line(run: Path, tmp_path: Path) -> None:
    from pretrain.training.trainer_state import load_trainer_state

    source = run / "checkpoints/step-0000002/state/trainer.pt"
    state = torch.load(source, weights_only=True)
    refusals = 0
    for case in range(count_cases(120)):
        rng = random.Random(case)
        damaged = mutate_value(rng, state)
        path = tmp_path / "trainer.pt"
        torch.save(damaged, path)
        if rng.random() < 0.3:
            path.write_bytes(mutate_bytes(rng, source.read_bytes()))
        loaded = attempt(lambda path=path: load_trainer_state(path), "trainer.pt")
        refusals += loaded is None
        if loaded is not None:
            assert type(loaded["step"]) is int, case
            assert all(type(loaded["loader"][name]) is int for name in ("position", "seen", "run")), case
    assert refusals > 30


@pytest.mark.parametrize(
    "name", ["state/trainer.pt", "state/optimizer.pt", "model.safetensors", "state/weights/model.safetensors"]
)
def test_resuming_from_damaged_state_is_one_line(
    copy: Callable[[], Path], small: Small, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = copy()
    checkpoint = folder / "checkpoints/step-0000002"
    path = checkpoint / name
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        if "optimizer" in state:
            state["optimizer"] = {key: {**v, "exp_avg": v["exp_avg"][..., :1]} for key, v in state["optimizer"].items()}
        else:
            state["loader"]["position"] = "far"
        torch.save(state, path)
    else:
        save_file({key: value[..., :1].contiguous() for key, value in load_file(path).items()}, path)
    (checkpoint / "manifest.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-0000001")
    capsys.readouterr()
    more = ["optim.average=0.5", "train.steps=3", f"resume={checkpoint}"]
    assert cli.main(["pretrain", "scenes", *small.settings(folder), *more]) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfuse: ")]
    assert len(lines) == 1, lines
    assert path.name in lines[0] or "step-0000002" in lines[0]
    assert not (folder / "checkpoints/step-0000003").exists()


def test_resuming_drops_lines_of_metrics_that_no_run_has_written(copy: Callable[[], Path], small: Small) -> None:
    folder = copy()
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_bytes(b'{}\n{"step": "x"}\n{"step": [1]}\n{no json}\n{\xff}\n' + lines.encode() + b'{"st')
    more = ["optim.average=0.5", "train.steps=3"]
    assert cli.main(["pretrain", "scenes", *small.settings(folder), *more]) == 0
    assert (folder / "metrics.jsonl").read_text().startswith(lines)


# ---- published folders and embeddings --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["hf", "open_clip"])
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The run as a published folder of one format."""
    folder = tmp_path_factory.mktemp("exports") / request.param
    export.export(load_model(run), folder, request.param)
    return folder


def test_damaged_published_folders_are_one_line(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "e"))
    names = [name for name in ("open_clip_config.json", "config.json", "preprocessor_config.json") if (folder / name).exists()]
    refusals = 0
    with BoundedMemory(2048):
        for case in range(count_cases(20)):
            rng = random.Random(case)
            name = rng.choice(names)
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(mutate_json(rng, data))
            refusals += attempt(lambda: load_model(folder)) is None
            (folder / name).write_bytes(data)
    assert refusals > 4
    assert load_model(folder).step == 0


@pytest.mark.parametrize("value", [10**9, 10**30, -1, "x", None])
def test_impossible_sizes_of_published_models_are_one_line(exported: Path, tmp_path: Path, value: Any) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "e"))
    name = "open_clip_config.json" if (folder / "open_clip_config.json").exists() else "config.json"
    original = json.loads((folder / name).read_text())
    sections = original.get("model_cfg", original)
    with BoundedMemory(2048):
        for section in [key for key, item in sections.items() if isinstance(item, dict)]:
            for key, old in sections[section].items():
                if type(old) is int:
                    changed = json.loads(json.dumps(original))
                    changed.get("model_cfg", changed)[section][key] = value
                    (folder / name).write_text(json.dumps(changed))
                    attempt(lambda: load_model(folder))


def test_damaged_embedding_folders_are_one_line(run: Path, small: Small, tmp_path: Path) -> None:
    assert cli.main(["embed", str(run), "--data", small.val, "--out", str(tmp_path / "intact")]) == 0
    expected = dataset.load(tmp_path / "intact")
    files = sorted(path.name for path in (tmp_path / "intact").iterdir() if not path.name.startswith("."))
    assert len(files) == 2
    refusals = 0
    for case in range(count_cases(80)):
        rng = random.Random(case)
        folder = Path(shutil.copytree(tmp_path / "intact", tmp_path / "e", dirs_exist_ok=True))
        path = folder / rng.choice(files)
        data = path.read_bytes()
        path.write_bytes(mutate_json(rng, data) if path.suffix == ".json" else mutate_bytes(rng, data[-2000:]))
        loaded = attempt(lambda folder=folder: dataset.load(folder), "e")
        refusals += loaded is None
        if loaded is not None:
            assert loaded.keys == expected.keys, case
            assert torch.equal(loaded.image, expected.image), case
    assert refusals > 20


@pytest.mark.parametrize("section", ["data", "image", "text", "model"])
@pytest.mark.parametrize("value", ["x", 3, [1], {"a": 1}])
def test_a_section_of_another_kind_is_one_line(copy: Callable[[], Path], section: str, value: Any) -> None:
    checkpoint = copy() / "checkpoints/step-0000002"
    (checkpoint / "manifest.json").unlink()
    path = checkpoint / "config.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, section: value}))
    if (section, value) == ("data", {"a": 1}):  # a section that other versions may have written
        assert load_model(checkpoint).step == 2
        return
    with pytest.raises(UserError) as error:
        load_model(checkpoint)
    assert_one_line(error.value, section)
