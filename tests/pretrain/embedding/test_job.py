"""clipfuse embed writes each sample once, across kills, as if encoding samples one by one."""

import dataclasses
import io
import json
import resource
import signal
import tarfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch import cli
from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import loading, writing
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data.loader import build_eval_loader
from pretrain.data.text import load_tokenizer
from pretrain.embedding import dataset
from pretrain.embedding.dataset import build_work_units, load
from pretrain.embedding.job import Summary, embed
from pretrain.embedding.options import Options
from pretrain.embedding.parquet import to_numpy
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.evaluate import EvalConfig, evaluate_checkpoint
from pretrain.model import ModelSchema
from tests.support import TINY_TOWERS, Small
from tests.support.launches import BIN, clipfuse_command, start_launcher

CPU = torch.device("cpu")


def save_model(small: Small, root: Path, seed: int, *more: str) -> Path:
    """Save a checkpoint of an untrained tiny model and return its folder."""
    config = configuration.load(ModelSchema, None, [*TINY_TOWERS, f"text.tokenizer={small.tokenizer}", *more])
    tokenizer = load_tokenizer(small.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.build(models.tower_configs(config), config.model, tokenizer)

    def files(folder: Path) -> None:
        configuration.save(models.portable_config(config, model), folder / "config.yaml")
        tokenizer.save_pretrained(folder / loading.TOKENIZER)

    content = {"model.safetensors": writing.weights_file(model.state_dict()), **writing.capture_files(files)}
    return writing.save(root / "checkpoints", seed, content, keep=0)


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(small, tmp_path_factory.mktemp("run"), 0)


@pytest.fixture
def loaded(run: Path) -> LoadedModel:
    return load_model(run)


def make_options(small: Small, out: Path, **more: Any) -> Options:
    return Options(**{"data": [small.val], "out": str(out), "batch_size": 10, "workers": 0, **more})


def run_embed(loaded: LoadedModel, options: Options) -> Summary:
    summary = embed(loaded, options, CPU)
    assert summary is not None
    return summary


def read_tables(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("*.parquet"))])


def encode_one_by_one(loaded: LoadedModel, shards: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the embeddings by key, without the code under test.

    Each sample and caption is encoded alone, by the model's forward().
    """
    embeddings = {}
    with torch.no_grad():
        for batch in build_eval_loader(shards, loaded.decoders, 1):
            encoded = [loaded.decoders["text"].encode([caption]) for caption in batch.targets["captions"][0]]
            outs = [loaded.model({"image": batch.inputs["image"], "text": ids}, {"text": mask}) for ids, mask in encoded]
            embeddings[batch.keys[0]] = {"image": outs[0]["image"][0], "text": torch.cat([out["text"] for out in outs])}
    return embeddings


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and killed jobs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_resume_after_a_kill_and_after_a_signal(
    small: Small, run: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [run, "--data", small.train, "--out", out, "--dtype", "float32"]
    words += ["--batch-size", "1", "--workers", "0", "--per-file", "4"]
    torchrun = [BIN / "torchrun", "--nproc-per-node", "2", "--standalone", "-m", "pretrain.embedding.job"]

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in out.glob("*.parquet")}

    def wait_for(more: int, launched: Any) -> None:
        end = time.monotonic() + 200
        while len(files()) < more:
            assert launched.process.poll() is None, launched.output
            assert time.monotonic() < end, launched.output
            time.sleep(0.002)

    with start_launcher(*torchrun, *words, cwd=tmp_path) as launched:
        wait_for(1, launched)
        for process in [*launched.ranks().values(), launched.process]:
            process.kill()
        launched.wait_for_exit(-signal.SIGKILL)
    killed = files()
    assert 0 < len(killed) < 75
    assert not json.loads((out / "_manifest.json").read_text())["complete"]
    with pytest.raises(UserError, match="is not a complete embedding folder"):
        load(out)

    with start_launcher(*clipfuse_command("embed", *words, "--nproc", "2"), cwd=tmp_path) as launched:
        wait_for(len(killed) + 1, launched)
        launched.process.send_signal(signal.SIGTERM)
        output = launched.wait_for_exit(75)
    assert "the same command resumes" in output
    stopped = files()
    assert killed.items() < stopped.items()
    assert len(stopped) < 75

    summary = run_embed(loaded, make_options(small, out, data=[small.train], dtype="float32"))
    assert (summary.files, summary.samples, summary.left_out) == (75, 300, {})
    assert summary.embedded == 300 - 4 * len(stopped)
    assert stopped.items() < files().items()
    assert not list(out.glob(".*.partial"))
    table, reference = read_tables(out), encode_one_by_one(loaded, small.train)
    assert table["key"].to_pylist() == list(reference)
    for name in ("image", "text"):
        expected = torch.stack([sample[name].view(-1) for sample in reference.values()])
        torch.testing.assert_close(torch.from_numpy(to_numpy(table[name])), expected, atol=2e-6, rtol=0)
    # Nothing is left to do.
    again = run_embed(loaded, make_options(small, out, data=[small.train], dtype="float32"))
    assert (again.embedded, again.samples) == (0, 300)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 25))
def test_work_units_hold_each_sample_once_and_at_most_the_limit(counts: list[int], limit: int) -> None:
    units = build_work_units([f"{i:04d}.tar" for i in range(len(counts))], counts, limit)
    samples = [(shard, i) for unit in units for shard, first, end in unit.ranges for i in range(first, end)]
    assert samples == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    assert all(0 < unit.samples <= limit for unit in units)
    assert len({unit.file for unit in units}) == len(units)
    shards_of = [{shard for shard, _, _ in unit.ranges} for unit in units]
    for a, b in pairwise(shards_of):  # small shards share a file where they fit
        if not a & b:
            assert sum(counts[i] for i in a) + counts[min(b)] > limit


# ---------------------------------------------------------------------------------------------------------------------
# The content of the files


def test_columns_are_half_precision_and_a_file_written_again_is_the_same(
    small: Small, loaded: LoadedModel, tmp_path: Path
) -> None:
    options = make_options(small, tmp_path / "out", per_file=25)
    summary = run_embed(loaded, options)
    assert (summary.samples, summary.files) == (64, 3)
    assert summary.encoder_samples_per_second > summary.samples_per_second > 0
    table, reference = read_tables(tmp_path / "out"), encode_one_by_one(loaded, small.val)
    assert table.schema.names == ["key", "image", "text", "caption", "json"]
    assert table.schema.field("image").type == pa.list_(pa.float16(), 16)
    expected = torch.stack([sample["image"] for sample in reference.values()])
    torch.testing.assert_close(torch.from_numpy(to_numpy(table["image"])).float(), expected, atol=5e-4, rtol=0)
    first = next(iter(build_eval_loader(small.val, loaded.decoders, 1)))
    assert table["caption"][0].as_py() == first.targets["captions"][0][0]
    assert json.loads(table["json"][0].as_py()) == first.targets["json"][0]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    sorted((tmp_path / "out").glob("*.parquet"))[1].unlink()
    assert run_embed(loaded, options).embedded in (21, 22)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")} == before


def test_token_features(small: Small, loaded: LoadedModel, tmp_path: Path) -> None:
    run_embed(loaded, make_options(small, tmp_path / "own", tokens="own", dtype="float32"))
    table = read_tables(tmp_path / "own")
    with torch.no_grad():
        for i, batch in enumerate(build_eval_loader(small.val, loaded.decoders, 1, max_samples=3)):
            image = loaded.model.tower("image")(batch.inputs["image"]).states[0]
            text = loaded.model.tower("text")(batch.inputs["text"], batch.masks["text"]).states[0][batch.masks["text"][0]]
            np.testing.assert_allclose(table["image_tokens"][i].as_py(), image, atol=1e-5)
            np.testing.assert_allclose(table["text_tokens"][i].as_py(), text, atol=1e-5)
    run_embed(loaded, make_options(small, tmp_path / "shared", tokens="shared", only="image", dtype="float32"))
    table = read_tables(tmp_path / "shared")
    assert table.schema.names == ["key", "image", "json", "image_tokens"]
    tokens = torch.tensor(table["image_tokens"].to_pylist())
    means = torch.nn.functional.normalize(tokens.mean(dim=1), dim=-1)  # the tower pools by the mean
    torch.testing.assert_close(means, torch.from_numpy(to_numpy(table["image"])), atol=1e-5, rtol=0)


def test_caption_lists_and_evaluation_from_an_embedding_folder(small: Small, loaded: LoadedModel, tmp_path: Path) -> None:
    run_embed(loaded, make_options(small, tmp_path / "out", caption="captions", dtype="float32"))
    table, reference = read_tables(tmp_path / "out"), encode_one_by_one(loaded, small.val)
    for key, captions, text in zip(*(table[name].to_pylist() for name in ("key", "captions", "text")), strict=True):
        assert len(captions) == len(text) >= 1
        np.testing.assert_allclose(text, reference[key]["text"], atol=2e-6)
    settings = EvalConfig(tasks=["retrieval", "zero_shot"], classes="scenes", batch_size=10, workers=0)
    captions = load_model(loaded.folder)
    captions.decoders["text"].caption = "captions"
    of_files, of_shards = (evaluate_checkpoint(captions, of, settings, CPU) for of in (str(tmp_path / "out"), small.val))
    assert of_files["metrics"] == pytest.approx(of_shards["metrics"])
    with pytest.raises(ConfigError, match="give shards"):
        evaluate_checkpoint(captions, str(tmp_path / "out"), EvalConfig(tasks=["linear_probe"], probe_train=small.val), CPU)


def test_bad_samples_are_skipped_and_counted(small: Small, loaded: LoadedModel, tmp_path: Path) -> None:
    shard = tmp_path / "some.tar"
    with tarfile.open(sorted((small.root / "scenes").glob("val-*.tar"))[0]) as good:
        image = next(m for m in good.getmembers() if not m.name.endswith((".txt", ".json")))
        data = good.extractfile(image).read()  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for i in range(6):
            members = {Path(image.name).suffix: data[: len(data) if i != 2 else 20], ".txt": b"a cup" if i != 4 else b" "}
            members[".json"] = json.dumps({"note": f"n{i}", "odd": "\ud800"}).encode()
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{i:03d}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    summary = run_embed(loaded, make_options(small, tmp_path / "out", data=[str(shard)], batch_size=1, per_file=2))
    assert summary.samples == 4
    assert sum(summary.left_out.values()) == 2
    assert summary.left_out["empty caption"] == 1
    assert read_tables(tmp_path / "out")["key"].to_pylist() == ["some/000", "some/001", "some/003", "some/005"]
    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    assert (manifest["rows"], manifest["left_out"], manifest["complete"]) == (4, summary.left_out, True)


def copy_with_lines(small: Small, path: Path, count: int, text: bytes = b"a red cup\na cup\r\n\n") -> str:
    """Write `count` validation images to a tar, all with the same KEY.txt; return its path."""
    with tarfile.open(sorted((small.root / "scenes").glob("val-*.tar"))[0]) as scenes, tarfile.open(path, "w") as tar:
        images = [m for m in scenes if not m.name.endswith((".txt", ".json"))][:count]
        for image in images:
            data = scenes.extractfile(image).read()  # type: ignore[union-attr]
            for name, content in ((image.name, data), (f"{Path(image.name).stem}.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_lines_of_txt_are_embedded_where_asked_for_and_reported_where_not(
    small: Small, run: Path, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = copy_with_lines(small, tmp_path / "lines.tar", 6)
    run_embed(loaded, make_options(small, tmp_path / "whole", data=[shard]))
    output = " ".join("".join(capsys.readouterr()).split())
    assert "6 of 6 samples looked at hold several lines in KEY.txt, which are read as one caption" in output
    assert read_tables(tmp_path / "whole")["caption"].to_pylist() == ["a red cup a cup"] * 6
    run_embed(load_model(run), make_options(small, tmp_path / "lines", data=[shard], caption="txt:lines"))
    assert read_tables(tmp_path / "lines")["captions"].to_pylist() == [["a red cup", "a cup"]] * 6
    result = evaluate_checkpoint(load_model(run), str(tmp_path / "lines"), EvalConfig(), CPU)
    assert (result["metrics"]["samples"], result["metrics"]["captions"]) == (6, 12)
    with pytest.raises(ConfigError, match=r"^--caption=txt:line: valid are txt, txt:lines "):
        run_embed(loaded, make_options(small, tmp_path / "typo", data=[shard], caption="txt:line"))


def test_evaluate_reads_captions_where_its_option_says(
    small: Small, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = copy_with_lines(small, tmp_path / "lines.tar", 6)

    def count_captions(*arguments: str) -> int:
        assert cli.main(["evaluate", str(run), "--data", shard, "--json", *arguments]) == 0
        return int(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["captions"])

    assert count_captions() == count_captions("--caption", "txt:lines") == 12
    assert count_captions("--caption", "txt:whole") == 6
    for arguments, line in (
        (["--caption", "txt:words"], "--caption=txt:words: valid are txt, txt:lines "),
        (["--caption", "title", "--task", "zero_shot"], "--caption title: zero_shot reads no captions"),
        (["--caption", "title"], "6 were left out because of their content (no caption 6)"),
    ):
        assert cli.main(["evaluate", str(run), "--data", shard, *arguments]) in (1, 2)
        assert line in capsys.readouterr().err


def test_keys_of_two_folders_with_shards_of_the_same_name_differ(small: Small, loaded: LoadedModel, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        copy_with_lines(small, tmp_path / folder / "shard-0000.tar", 3, b"a cup")
    run_embed(loaded, make_options(small, tmp_path / "out", data=[str(tmp_path / "first"), str(tmp_path / "second")]))
    keys = read_tables(tmp_path / "out")["key"].to_pylist()
    assert len(set(keys)) == 6
    assert [key.partition("/")[0] for key in keys] == ["first-shard-0000"] * 3 + ["second-shard-0000"] * 3
    run_embed(loaded, make_options(small, tmp_path / "one", data=[str(tmp_path / "first")]))
    assert read_tables(tmp_path / "one")["key"].to_pylist()[0].startswith("shard-0000/")
    # Unfinished folders of versions that did not record how keys are built.
    for name, data, line in (("out", ["first", "second"], "wrote other keys for these shards"), ("one", ["first"], None)):
        path = tmp_path / name / "_manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["data"]["keys"]
        path.write_text(json.dumps({**manifest, "complete": False}))
        options = make_options(small, tmp_path / name, data=[str(tmp_path / folder) for folder in data])
        if line is None:
            assert run_embed(loaded, options).embedded == 0
        else:
            with pytest.raises(UserError, match=line):
                run_embed(loaded, options)


# ---------------------------------------------------------------------------------------------------------------------
# Refused input


def test_embeddings_of_other_models_data_and_settings_are_refused(
    small: Small, run: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_embed(loaded, make_options(small, out))
    other = load_model(save_model(small, tmp_path / "other", 1))
    squashed = load_model(save_model(small, tmp_path / "squashed", 0, "image.resize=squash"))
    for model, changes, line in (
        (other, {}, rf"holds embeddings of another model, {run} \(step 0, \w+\); this one is {other.folder} \(step 1, "),
        (squashed, {}, "holds embeddings of another model"),
        (loaded, {"data": [small.train]}, "holds embeddings of other data, 64 samples in 1 shards; these are 300 samples"),
        (loaded, {"dtype": "float32"}, "was begun with dtype float16, now it is float32"),
        (loaded, {"tokens": "own"}, "was begun with tokens left at its default, now it is own"),
    ):
        with pytest.raises(UserError, match=line):
            embed(model, make_options(small, out, **changes), CPU)
    with pytest.raises(UserError, match="holds embeddings of"):
        load(out, other)
    assert len(load(out, load_model(run)).keys) == 64
    # A file of another embedding folder, copied in.
    run_embed(other, make_options(small, tmp_path / "others"))
    name = next(out.glob("*.parquet")).name
    (out / name).write_bytes((tmp_path / "others" / name).read_bytes())
    with pytest.raises(UserError, match=f"{name} holds embeddings of another model"):
        embed(loaded, make_options(small, out), CPU)


def test_the_fingerprint_depends_on_the_weights_not_on_the_folder(small: Small, run: Path, tmp_path: Path) -> None:
    same = dataset.fingerprint_model(load_model(save_model(small, tmp_path / "elsewhere", 0)))
    assert same == dataset.fingerprint_model(load_model(run))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"only": "imag"}, "--only imag: the model has image, text; did you mean 'image'"),
        ({"caption": "captions", "tokens": "own"}, "add --only image"),
        ({"data": ["nowhere/*.tar"]}, "--data=nowhere"),
        ({"out": "taken"}, "taken exists and holds other files"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    small: Small, loaded: LoadedModel, in_tmp: Path, changes: dict[str, Any], line: str
) -> None:
    (in_tmp / "taken").mkdir()
    (in_tmp / "taken/thesis.doc").touch()
    with pytest.raises(UserError, match=line):
        embed(loaded, dataclasses.replace(make_options(small, in_tmp / "out"), **changes), CPU)
    assert not (in_tmp / "out").exists() or not list((in_tmp / "out").glob("*.parquet"))


def test_infinite_embeddings_and_towers_without_shared_tokens_are_refused(small: Small, tmp_path: Path) -> None:
    diverged = load_model(save_model(small, tmp_path, 2))
    with torch.no_grad():
        diverged.model.projections["text"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="text embeddings are not finite in the batch of samples val-0000"):
        embed(diverged, make_options(small, tmp_path / "out"), CPU)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["_manifest.json"]
    pooled = load_model(save_model(small, tmp_path, 3, "text.pool=eot"))
    with pytest.raises(ConfigError, match="--tokens shared: the text tower does not pool by the mean"):
        embed(pooled, make_options(small, tmp_path / "shared", tokens="shared"), CPU)
    with pytest.raises(ConfigError, match="--batch-size 0 must be at least 1"):
        make_options(small, tmp_path, batch_size=0).check()


def test_a_full_disk_is_one_error_line_and_complete_files_stay(small: Small, loaded: LoadedModel, tmp_path: Path) -> None:
    options = make_options(small, tmp_path / "out", per_file=25, tokens="own", dtype="float32")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may grow beyond
    try:
        with pytest.raises(UserError, match=r"cannot write into .*out: .*; complete files stay, and the same command resumes"):
            embed(loaded, options, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert not list((tmp_path / "out").glob(".*.partial"))
    assert run_embed(loaded, options).samples == 64
