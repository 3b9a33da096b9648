"""Evaluation of a small real model on drawn scenes: against encoding one by one, and over several processes."""

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
from pretrain.evaluation.evaluate import EvalConfig, evaluate, run, summary
from pretrain.model import ModelSchema
from pretrain.runtime import distributed
from tests.support import TINY_TOWERS, Small, read_jsonl, world

CPU = torch.device("cpu")


def build(small: Small, caption: str = "txt", *more: str) -> loading.LoadedModel:
    """An untrained tiny model, the same each time."""
    config = configuration.load(ModelSchema, None, [*TINY_TOWERS, f"text.tokenizer={small.tokenizer}", *more])
    tokenizer = load_tokenizer(small.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.build(models.tower_configs(config), config.model, tokenizer)
    decoders = models.build_decoders(config, tokenizer, model, caption)
    return loading.LoadedModel(model, config, tokenizer, decoders, Path("runs/tiny/checkpoints/step-0000000"), 0)


def settings(**more: Any) -> EvalConfig:
    return EvalConfig(**{"batch_size": 10, "workers": 0, **more})


def one_by_one(loaded: loading.LoadedModel, shards: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Embeddings without the code under test: each sample and each caption alone, through the model's forward()."""
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
def test_each_sample_once_and_the_figures_of_encoding_one_by_one(small: Small, caption: str) -> None:
    loaded = build(small, caption)
    split = embed_split(loaded.model, build_eval_loader(small.val, loaded.decoders, 10), loaded.decoders, CPU)
    image, text, image_index = one_by_one(loaded, small.val)
    assert len(split.keys) == len(set(split.keys)) == len(image) == 64
    assert split.image_index.tolist() == image_index
    assert len(split.captions) == len(text) >= 64
    assert (caption == "captions") == (len(text) > 64)
    torch.testing.assert_close(split.image, image, atol=2e-6, rtol=0)
    torch.testing.assert_close(split.text, text, atol=2e-6, rtol=0)
    got = evaluate(loaded.model, loaded.decoders, small.val, settings(), CPU)
    scores = (split.text.double() @ split.image.double().T).numpy()
    place = np.array(
        [(row > row[i]).sum() + (row == row[i]).sum() / 2 + 0.5 for row, i in zip(scores, image_index, strict=True)]
    )
    assert got["text_to_image_median_rank"] == pytest.approx(np.median(place))
    assert got["samples"] == 64
    assert got["captions"] == len(text)
    assert got["bad_samples"] == 0


def test_training_may_draw_captions_that_evaluation_does_not_read(small: Small, tmp_path: Path) -> None:
    words = small.settings(tmp_path / "run", "train.steps=1", f"data.val={small.val}", "data.caption=captions")
    assert cli.main(["pretrain", "scenes", *words, "data.val_caption=txt"]) == 0
    (line,) = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "val/samples" in line]
    assert line["val/captions"] == line["val/samples"] == 64
    assert loading.load_model(tmp_path / "run").decoders["text"].caption == "txt"
    assert cli.main(["pretrain", "scenes", *words, f"run={tmp_path / 'all'}"]) == 0
    (line,) = [line for line in read_jsonl(tmp_path / "all/metrics.jsonl") if "val/samples" in line]
    assert line["val/captions"] > 2 * line["val/samples"]


def test_mode_and_random_generators_stay_as_they_were(small: Small) -> None:
    loaded = build(small)
    loaded.model.train()
    frozen = loaded.model.towers["image"]
    frozen.eval()
    modes = [module.training for module in loaded.model.modules()]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    tasks = settings(tasks=["retrieval", "zero_shot", "linear_probe"], classes="scenes", probe_train=small.val, workers=1)
    evaluate(loaded.model, loaded.decoders, small.val, tasks, CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert [module.training for module in loaded.model.modules()] == modes
    with suppress(ZeroDivisionError), eval_mode(loaded.model):
        assert not any(module.training for module in loaded.model.modules())
        raise ZeroDivisionError
    assert [module.training for module in loaded.model.modules()] == modes


def test_zero_shot_and_linear_probe_on_scenes(small: Small) -> None:
    loaded = build(small)
    tasks = settings(tasks=["zero_shot", "linear_probe"], classes="scenes", probe_train=small.train)
    got = evaluate(loaded.model, loaded.decoders, small.val, tasks, CPU)
    assert got["linear_probe_train_samples"] == 300
    assert got["captions"] == 0
    assert 0 <= got["zero_shot_top1"] <= got["zero_shot_top5"] <= 1
    assert 0 <= got["linear_probe_top1"] <= got["linear_probe_top5"] <= 1
    assert not any("R@" in name for name in got)


def test_pooled_outputs_come_with_the_same_embeddings(small: Small) -> None:
    loaded = build(small)
    batches = build_eval_loader(small.val, loaded.decoders, 16)
    plain = embed_split(loaded.model, batches, loaded.decoders, CPU)
    pooled = embed_split(loaded.model, batches, loaded.decoders, CPU, texts=False, pooled=True)
    torch.testing.assert_close(pooled.image, plain.image, atol=1e-6, rtol=0)
    assert pooled.pooled.shape == (64, 32)
    assert pooled.text.shape == (0, 16)
    projected = F.normalize(loaded.model.projections["image"](pooled.pooled), dim=-1)
    torch.testing.assert_close(projected.detach(), plain.image)


def test_pictures_without_captions_can_be_classified(small: Small, tmp_path: Path) -> None:
    shard = rewrite(small, tmp_path, lambda name, data: None if name.endswith(".txt") else data)
    loaded = build(small)
    got = evaluate(loaded.model, loaded.decoders, shard, settings(tasks=["zero_shot"], classes="scenes"), CPU)
    assert got["samples"] == 64
    with pytest.raises(UserError, match="no sample to evaluate"):
        evaluate(loaded.model, loaded.decoders, shard, settings(), CPU)


def test_bad_samples_are_left_out_and_counted(small: Small, tmp_path: Path) -> None:
    seen: list[str] = []

    def damage(name: str, data: bytes) -> bytes:
        if name.endswith((".jpg", ".png")):
            seen.append(name)
            return b"" if len(seen) in (3, 40) else data
        return data

    loaded = build(small)
    got = evaluate(loaded.model, loaded.decoders, rewrite(small, tmp_path, damage), settings(), CPU)
    assert got["samples"] == 62
    assert got["bad_samples"] == 2


def test_only_the_first_samples(small: Small) -> None:
    loaded = build(small)
    assert evaluate(loaded.model, loaded.decoders, small.val, settings(max_samples=25), CPU)["samples"] == 25


def test_a_model_that_has_diverged_is_a_clear_error(small: Small) -> None:
    loaded = build(small)
    with torch.no_grad():
        loaded.model.projections["text"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="64 of 64 text embeddings are not finite"):
        evaluate(loaded.model, loaded.decoders, small.val, settings(), CPU)


def test_low_precision_gives_unit_vectors_close_to_full(small: Small) -> None:
    loaded = build(small)
    batches = build_eval_loader(small.val, loaded.decoders, 16)
    full = embed_split(loaded.model, batches, loaded.decoders, CPU)
    half = embed_split(loaded.model, batches, loaded.decoders, CPU, precision="bf16")
    assert half.image.dtype == torch.float32
    torch.testing.assert_close(half.image.norm(dim=1), torch.ones(64))
    assert (half.image * full.image).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": ["retrival"]}, "did you mean 'retrieval'"),
        ({"batch_size": 0}, "eval.batch_size=0 must be at least 1"),
        ({"templates": ["a picture"]}, "no place for the class name"),
        ({"tasks": ["linear_probe"]}, "eval.probe_train"),
    ],
)
def test_wrong_settings(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvalConfig(**given).check()


def test_result_for_machines_and_people(small: Small) -> None:
    result = run(build(small), small.val, settings(tasks=["retrieval", "zero_shot"], classes="scenes"), CPU)
    assert json.loads(json.dumps(result)) == result
    assert result["metrics"]["samples"] == 64
    assert result["chance"]["image_to_text_R@1"] == pytest.approx(1 / 64)
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "image to text R@1" in text
    assert "64 pictures, 64 captions" in text
    assert "1.6 %" in text


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def evaluated(small: Small) -> dict[str, Any]:
    loaded = build(small, "captions")
    tasks = settings(tasks=["retrieval", "linear_probe"], probe_train=small.val)
    got: dict[str, Any] = {"all": evaluate(loaded.model, loaded.decoders, small.val, tasks, CPU)}
    # Fewer samples than processes: one has nothing.
    got["few"] = evaluate(loaded.model, loaded.decoders, small.val, settings(max_samples=1), CPU)
    with torch.no_grad():
        loaded.model.projections["text"].weight[0, 0] = torch.nan
    try:
        evaluate(loaded.model, loaded.decoders, small.val, settings(), CPU)
    except UserError as error:  # on every rank, not only where it was found
        got["error"] = str(error)
    batches = build_eval_loader(small.val, loaded.decoders, 10, rank=distributed.rank(), world=distributed.world_size())
    try:  # only one process cannot read its share
        embed_split(loaded.model, lost(batches) if distributed.rank() == 1 else batches, loaded.decoders, CPU)
    except UserError as error:
        got["lost"] = str(error)
    return got


def lost(batches: EvalLoader) -> Iterator[Batch]:
    yield next(iter(batches))
    raise UserError("the disk went away")


def test_two_processes_find_what_one_finds(small: Small) -> None:
    ranks = world.run(evaluated, 2, small)
    loaded = build(small, "captions")
    tasks = settings(tasks=["retrieval", "linear_probe"], probe_train=small.val)
    alone = evaluate(loaded.model, loaded.decoders, small.val, tasks, CPU)
    few = evaluate(loaded.model, loaded.decoders, small.val, settings(max_samples=1), CPU)
    for got in ranks:
        assert got["all"] == pytest.approx(alone, abs=1e-9)
        assert got["few"] == pytest.approx(few)
        assert "not finite" in got["error"]
        assert got["lost"] == "the disk went away"


def rewrite(small: Small, folder: Path, change: Any) -> str:
    """The validation shards as one shard whose members went through change(name, data); None leaves one out."""
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
