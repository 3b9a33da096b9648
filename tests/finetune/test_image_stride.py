"""image.stride in fine-tuning from a checkpoint that was trained without it: finer tokens, the same embeddings and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import finetune
from launch import cli
from pretrain.checkpoints import export
from pretrain.checkpoints.loading import load_model
from pretrain.embedding.dataset import fingerprint_model
from tests.support import Small

RESNET = ["image.name=resnet10t", "image.args={}", "image.size=64", "image.tower=timm"]


@pytest.fixture(scope="module")
def encoders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("encoders") / "run"
    assert cli.main(["pretrain", "clipart-conv", *small.settings(run, *RESNET, "train.steps=1")]) == 0
    return run


@pytest.fixture(scope="module")
def reranker(small: Small, encoders: Path) -> Path:
    run = encoders.parent / "reranker"
    settings = [
        f"run={run}", f"init={encoders}", "image.stride=16", f"data.train={small.train}", f"data.val={small.val}",
        "data.batch_size=8", "data.workers=0", "eval.workers=0", "eval.max_samples=8", "train.steps=1", "train.save_every=1",
        "train.trackers=[]", "train.threads=1", "task.foils=null", "task.pool=null",
    ]  # fmt: skip
    assert cli.main(["finetune", "retrieval", *settings]) == 0
    return run


@torch.no_grad()
def test_tokens_are_finer_and_embeddings_the_same(encoders: Path, reranker: Path) -> None:
    before, after = load_model(encoders), finetune.load(reranker)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    coarse = before.model.tower("image")(pixels)
    tokens, embedding = after.model.tokens_and_embedding("image", pixels)
    assert (coarse.grid, tokens.grid) == ((2, 2), (4, 4))
    assert tokens.states.shape == (3, 16, after.model.widths["image"])
    torch.testing.assert_close(embedding, before.model.encode("image", pixels), atol=1e-6, rtol=1e-5)


def test_transformers_loads_the_same_embeddings(reranker: Path, tmp_path: Path) -> None:
    """The model that it builds has no dilation; export() compares it with the run."""
    export.export(load_model(reranker), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())["vision_config"]
    assert "output_stride" not in config["model_args"]


def test_an_index_of_a_model_without_it_stays_valid(encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint of models that have no such setting is that of before the setting was there."""
    loaded = load_model(encoders)
    now = fingerprint_model(loaded)
    fields = dict(type(loaded.config.image).__dataclass_fields__)
    del fields["stride"]
    monkeypatch.setattr(type(loaded.config.image), "__dataclass_fields__", fields)
    assert fingerprint_model(loaded) == now


def test_a_run_does_not_resume_with_another_stride(
    small: Small, encoders: Path, reranker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"run={reranker}", f"init={encoders}", f"data.train={small.train}", "data.val=null", "data.batch_size=8"]
    more = ["image.stride=8", "data.workers=0", "train.steps=2", "train.trackers=[]", "task.foils=null", "task.pool=null"]
    assert cli.main(["finetune", "retrieval", *settings, *more]) != 0
    assert "image.stride is 8 now and was 16; set image.stride=16" in capsys.readouterr().err
