"""Evaluation of a small real model on drawn scenes, on one process and on several."""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from launch import cli
from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import loading
from pretrain.data.loader import Batch, EvalLoader, build_eval_loader
from pretrain.data.text import load_tokenizer
from pretrain.embedding.split import embed_split, eval_mode
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.evaluate import EvalConfig, build_table, evaluate, evaluate_checkpoint
from pretrain.model import ModelSchema
from pretrain.runtime import distributed
from tests.support import TINY_TOWERS, Small, read_jsonl, world

CPU = torch.device("cpu")


def build_model(small: Small, caption: str = "txt", *more: str) -> loading.LoadedModel:
    """Build an untrained tiny model, with the same weights each time."""
    config = configuration.load(ModelSchema, None, [*TINY_TOWERS, f"text.tokenizer={small.tokenizer}", *more])
    tokenizer = load_tokenizer(small.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.build(models.tower_configs(config), config.model, tokenizer)
    decoders = models.build_decoders(config, tokenizer, model, caption)
    return loading.LoadedModel(model, config, tokenizer, decoders, Path("runs/tiny/checkpoints/step-0000000"), 0)


def eval_config(**fields: Any) -> EvalConfig:
    return EvalConfig(**{"batch_size": 10, "workers": 0, **fields})


def encode_one_by_one(loaded: loading.LoadedModel, shards: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Encode each image and each caption alone by the model's forward(), without the code under test."""
    image, text, image_index = [], [], []
    loaded.model.eval()
    with torch.no_grad():
        for i, batch in enumerate(build_eval_loader(shards, loaded.decoders, 1)):
            for caption in batch.targets["captions"][0]:
                ids, mask = loaded.decoders["text"].encode([caption])
                out = loaded.model({"image": batch.inputs["image"], "text": ids}, {"text": mask})
                text.append(out["text"])
                image_index.append(i)
            image.append(out["image"])
    return torch.cat(image), torch.cat(text), image_index


@pytest.mark.parametrize("caption", ["txt", "captions"])
def test_every_sample_counts_once_and_metrics_equal_those_of_encoding_one_by_one(small: Small, caption: str) -> None:
    loaded = build_model(small, caption)
    split = embed_split(loaded.model, build_eval_loader(small.val, loaded.decoders, 10), loaded.decoders, CPU)
    image, text, image_index = encode_one_by_one(loaded, small.val)
    assert len(split.keys) == len(set(split.keys)) == len(image) == 64
    assert split.image_index.tolist() == image_index
    assert len(split.captions) == len(text) >= 64
    assert (caption == "captions") == (len(text) > 64)
    torch.testing.assert_close(split.image, image, atol=2e-6, rtol=0)
    torch.testing.assert_close(split.text, text, atol=2e-6, rtol=0)
    metrics = evaluate(loaded.model, loaded.decoders, small.val, eval_config(), CPU)
    scores = (split.text.double() @ split.image.double().T).numpy()
    ranks = np.array(
        [(row > row[i]).sum() + (row == row[i]).sum() / 2 + 0.5 for row, i in zip(scores, image_index, strict=True)]
    )
    assert metrics["text_to_image_median_rank"] == pytest.approx(np.median(ranks))
    assert metrics["samples"] == 64
    assert metrics["captions"] == len(text)
    assert metrics["bad_samples"] == 0


def test_training_may_draw_captions_that_evaluation_does_not_read(small: Small, tmp_path: Path) -> None:
    arguments = small.settings(tmp_path / "run", "train.steps=1", f"data.val={small.val}", "data.caption=captions")
    assert cli.main(["pretrain", "scenes", *arguments, "data.val_caption=txt"]) == 0
    (line,) = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "val/samples" in line]
    assert line["val/captions"] == line["val/samples"] == 64
    assert line["val/chance_text_to_image_R@1"] == pytest.approx(1 / 64)
    assert loading.load_model(tmp_path / "run").decoders["text"].caption == "txt"
    assert cli.main(["pretrain", "scenes", *arguments, f"run={tmp_path / 'all'}"]) == 0
    (line,) = [line for line in read_jsonl(tmp_path / "all/metrics.jsonl") if "val/samples" in line]
    assert line["val/captions"] > 2 * line["val/samples"]


def test_evaluation_changes_neither_modes_nor_random_generators(small: Small) -> None:
    loaded = build_model(small)
    loaded.model.train()
    loaded.model.towers["image"].eval()
    modes = [module.training for module in loaded.model.modules()]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    config = eval_config(tasks=["retrieval", "zero_shot", "linear_probe"], classes="scenes", probe_train=small.val, workers=1)
    evaluate(loaded.model, loaded.decoders, small.val, config, CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert [module.training for module in loaded.model.modules()] == modes
    with suppress(ZeroDivisionError), eval_mode(loaded.model):
        assert not any(module.training for module in loaded.model.modules())
        raise ZeroDivisionError
    assert [module.training for module in loaded.model.modules()] == modes


def test_zero_shot_and_linear_probe_return_fractions_on_scenes(small: Small) -> None:
    loaded = build_model(small)
    config = eval_config(tasks=["zero_shot", "linear_probe"], classes="scenes", probe_train=small.train)
    metrics = evaluate(loaded.model, loaded.decoders, small.val, config, CPU)
    assert metrics["linear_probe_train_samples"] == 300
    for kind in ("zero_shot", "linear_probe"):
        assert metrics[f"chance_{kind}_top5"] == pytest.approx(5 / metrics[f"{kind}_classes"])
    assert metrics["captions"] == 0
    assert 0 <= metrics["zero_shot_top1"] <= metrics["zero_shot_top5"] <= 1
    assert 0 <= metrics["linear_probe_top1"] <= metrics["linear_probe_top5"] <= 1
    assert not any("R@" in name for name in metrics)


def test_asking_for_pooled_outputs_does_not_change_the_embeddings(small: Small) -> None:
    loaded = build_model(small)
    batches = build_eval_loader(small.val, loaded.decoders, 16)
    without = embed_split(loaded.model, batches, loaded.decoders, CPU)
    split = embed_split(loaded.model, batches, loaded.decoders, CPU, texts=False, pooled=True)
    torch.testing.assert_close(split.image, without.image, atol=1e-6, rtol=0)
    assert split.pooled.shape == (64, 32)
    assert split.text.shape == (0, 16)
    projected = F.normalize(loaded.model.projections["image"](split.pooled), dim=-1)
    torch.testing.assert_close(projected.detach(), without.image)


def test_images_without_captions_can_be_classified(small: Small, tmp_path: Path) -> None:
    shard = rewrite_shards(small, tmp_path, lambda name, data: None if name.endswith(".txt") else data)
    loaded = build_model(small)
    metrics = evaluate(loaded.model, loaded.decoders, shard, eval_config(tasks=["zero_shot"], classes="scenes"), CPU)
    assert metrics["samples"] == 64
    with pytest.raises(UserError, match="no sample to evaluate"):
        evaluate(loaded.model, loaded.decoders, shard, eval_config(), CPU)


def test_bad_samples_are_left_out_and_counted(small: Small, tmp_path: Path) -> None:
    image_names: list[str] = []

    def damage(name: str, data: bytes) -> bytes:
        if name.endswith((".jpg", ".png")):
            image_names.append(name)
            return b"" if len(image_names) in (3, 40) else data
        return data

    loaded = build_model(small)
    metrics = evaluate(loaded.model, loaded.decoders, rewrite_shards(small, tmp_path, damage), eval_config(), CPU)
    assert metrics["samples"] == 62
    assert metrics["bad_samples"] == 2


def test_max_samples_evaluates_the_first_samples_only(small: Small) -> None:
    loaded = build_model(small)
    assert evaluate(loaded.model, loaded.decoders, small.val, eval_config(max_samples=25), CPU)["samples"] == 25


def test_a_diverged_model_is_refused_with_a_clear_error(small: Small) -> None:
    loaded = build_model(small)
    with torch.no_grad():
        loaded.model.projections["text"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="64 of 64 text embeddings are not finite"):
        evaluate(loaded.model, loaded.decoders, small.val, eval_config(), CPU)


def test_low_precision_gives_unit_vectors_close_to_those_of_float32(small: Small) -> None:
    loaded = build_model(small)
    batches = build_eval_loader(small.val, loaded.decoders, 16)
    full = embed_split(loaded.model, batches, loaded.decoders, CPU)
    half = embed_split(loaded.model, batches, loaded.decoders, CPU, precision="bf16")
    assert half.image.dtype == torch.float32
    torch.testing.assert_close(half.image.norm(dim=1), torch.ones(64))
    assert (half.image * full.image).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["retrival"]}, "did you mean 'retrieval'"),
        ({"batch_size": 0}, "eval.batch_size=0 must be at least 1"),
        ({"templates": ["a picture"]}, "no place for the class name"),
        ({"tasks": ["linear_probe"]}, "eval.probe_train"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**fields).check()


def test_the_result_is_plain_json_and_makes_a_table(small: Small) -> None:
    result = evaluate_checkpoint(
        build_model(small), small.val, eval_config(tasks=["retrieval", "zero_shot"], classes="scenes"), CPU
    )
    assert json.loads(json.dumps(result)) == result
    assert result["metrics"]["samples"] == 64
    assert result["chance"]["image_to_text_R@1"] == pytest.approx(1 / 64)
    assert not any(name.startswith("chance_") for name in result["metrics"])
    console = Console(file=io.StringIO(), width=120)
    console.print(build_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "image to text R@1" in text
    assert "64 images, 64 captions" in text
    assert "1.6 %" in text


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def evaluate_on_rank(small: Small) -> dict[str, Any]:
    """Return the metrics of this process, and the errors it raises; run on several processes."""
    loaded = build_model(small, "captions")
    config = eval_config(tasks=["retrieval", "linear_probe"], probe_train=small.val)
    outcome: dict[str, Any] = {"all": evaluate(loaded.model, loaded.decoders, small.val, config, CPU)}
    # Fewer samples than processes: one process has none.
    outcome["few"] = evaluate(loaded.model, loaded.decoders, small.val, eval_config(max_samples=1), CPU)
    with torch.no_grad():
        loaded.model.projections["text"].weight[0, 0] = torch.nan
    try:
        evaluate(loaded.model, loaded.decoders, small.val, eval_config(), CPU)
    except UserError as error:  # on every rank, not only on the one that finds it
        outcome["error"] = str(error)
    batches = build_eval_loader(small.val, loaded.decoders, 10, rank=distributed.rank(), world=distributed.world_size())
    try:  # only rank 1 cannot read its part
        embed_split(loaded.model, fail_after_one(batches) if distributed.rank() == 1 else batches, loaded.decoders, CPU)
    except UserError as error:
        outcome["lost"] = str(error)
    return outcome


def fail_after_one(batches: EvalLoader) -> Iterator[Batch]:
    yield next(iter(batches))
    raise UserError("the disk went away")


def test_two_processes_return_the_metrics_of_one(small: Small) -> None:
    outcomes = world.run(evaluate_on_rank, 2, small)
    loaded = build_model(small, "captions")
    config = eval_config(tasks=["retrieval", "linear_probe"], probe_train=small.val)
    alone = evaluate(loaded.model, loaded.decoders, small.val, config, CPU)
    few = evaluate(loaded.model, loaded.decoders, small.val, eval_config(max_samples=1), CPU)
    for outcome in outcomes:
        assert outcome["all"] == pytest.approx(alone, abs=1e-9)
        assert outcome["few"] == pytest.approx(few)
        assert "not finite" in outcome["error"]
        assert outcome["lost"] == "the disk went away"


def rewrite_shards(small: Small, folder: Path, change: Any) -> str:
    """Write the validation shards as one shard of members change(name, data); None leaves one out."""
    path = folder / "changed.tar"
    with tarfile.open(path, "w") as out:
        for source in sorted(Path(small.root / "scenes").glob("val-*.tar")):
            with tarfile.open(source) as tar:
                for member in tar.getmembers():
                    file = tar.extractfile(member)
                    assert file is not None
                    data = change(member.name, file.read())
                    if data is not None:
                        member.size = len(data)
                        out.addfile(member, io.BytesIO(data))
    return str(path)


# ---- shards of other tools -------------------------------------------------------------------------------------------


def write_shard(path: Path, images: list[bytes], members: list[dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for i, (image, others) in enumerate(zip(images, members, strict=True)):
            for extension, data in {"webp": image, **others}.items():
                info = tarfile.TarInfo(f"s{i:07d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def images(small: Small) -> list[bytes]:
    with tarfile.open(sorted((small.root / "scenes").glob("val-*.tar"))[0]) as tar:
        members = [m for m in tar if not m.name.endswith((".txt", ".json"))]
        return [tar.extractfile(m).read() for m in members][:12]  # type: ignore[union-attr]


def test_each_line_of_a_clip_benchmark_txt_is_a_caption(
    small: Small, images: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = [[f"a {color} cup {i}" for color in ("red", "blue", "small", "big", "new")] for i in range(12)]
    lines = write_shard(tmp_path / "lines.tar", images, [{"txt": "\n".join(c).encode()} for c in captions])
    field = write_shard(tmp_path / "list.tar", images, [{"json": json.dumps({"all": c}).encode()} for c in captions])
    loaded = build_model(small)
    metrics = evaluate(loaded.model, loaded.decoders, lines, eval_config(), CPU)
    assert (metrics["samples"], metrics["captions"]) == (12, 60)
    by_list = build_model(small, "all")
    assert metrics == evaluate(by_list.model, by_list.decoders, field, eval_config(), CPU)
    assert loaded.decoders["text"].caption == "txt"  # the model's own decoder is unchanged
    assert (
        caplog.text.count("12 of 12 samples looked at hold several lines in KEY.txt: each line is a caption (5.0 a sample") == 1
    )
    for caption, expected in (("txt:whole", 12), ("txt:lines", 60)):
        other = build_model(small, caption)
        assert evaluate(other.model, other.decoders, lines, eval_config(), CPU)["captions"] == expected


def test_a_few_captions_of_several_lines_are_one_caption_and_reported(
    small: Small, images: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard(tmp_path / "x.tar", images, [{"txt": b"a cup\nfor tea" if i < 3 else b" a cup\r\n"} for i in range(12)])
    loaded = build_model(small)
    assert evaluate(loaded.model, loaded.decoders, shard, eval_config(), CPU)["captions"] == 12
    assert "3 of 12 samples looked at hold several lines in KEY.txt, which are read as one caption; the caption setting " in (
        caplog.text
    )


def test_the_classes_of_cls_members_are_scored(small: Small, images: list[bytes], tmp_path: Path) -> None:
    loaded = build_model(small)
    config = eval_config(tasks=["zero_shot"], classes="cup,car,tree")
    scores = {}
    for name, label in (("cls", lambda i: {"cls": b"%d" % (i % 3)}), ("json", lambda i: {"json": b'{"label": %d}' % (i % 3)})):
        shard = write_shard(tmp_path / f"{name}.tar", images, [label(i) for i in range(12)])
        scores[name] = evaluate(loaded.model, loaded.decoders, shard, config, CPU)
    assert scores["cls"] == scores["json"]
    assert (scores["cls"]["samples"], scores["cls"]["bad_samples"]) == (12, 0)


def test_reasons_are_named_where_nothing_can_be_evaluated(small: Small, images: list[bytes], tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", images, [{"json": b'{"title": null}' if i else b"{}"} for i in range(12)])
    loaded = build_model(small, "title")
    with pytest.raises(UserError, match=r"no sample to evaluate in .*x\.tar: 12 were left out .* \(no caption 12\)$"):
        evaluate(loaded.model, loaded.decoders, shard, eval_config(), CPU)


def test_lone_surrogates_in_captions_stop_nothing(small: Small, images: list[bytes], tmp_path: Path) -> None:
    odd, clean = rb'{"captions": ["\ud800 x", "a cup"]}', '{"captions": ["\ufffd x", "a cup"]}'.encode()
    loaded = build_model(small, "captions")
    scores = []
    for name, first in (("odd", odd), ("clean", clean)):
        shard = write_shard(tmp_path / f"{name}.tar", images, [{"json": first if i == 5 else clean} for i in range(12)])
        scores.append(evaluate(loaded.model, loaded.decoders, shard, eval_config(), CPU))
    assert scores[0] == scores[1]
    assert (scores[0]["samples"], scores[0]["captions"], scores[0]["bad_samples"]) == (12, 24, 0)
