"""`import clipfuse`: every kind of source and of image, held against transformers, onnxruntime and closed forms."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from launch import cli
from tests.support import ONE_BLOCK, ROOT, Small, environment

TEXTS = ["a red car", "a large green sofa on grass", "two dogs"]
README = (ROOT / "README.md").read_text().split("## In Python")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/first (pretrained), runs/vqa (fine-tuned from it), exports of the first, and two images."""
    root = tmp_path_factory.mktemp("api")
    quiet = ["data.workers=0", "eval.workers=0", "train.trackers=[]", "train.threads=1", "train.steps=2", "train.epochs=0"]
    with contextlib.chdir(root):
        assert cli.main(["pretrain", "scenes", *small.settings("first", "train.steps=2", *ONE_BLOCK)]) == 0
        shards = [f"data.train={small.train}", "data.val=null", "train.eval_every=0", "data.batch_size=8"]
        assert cli.main(["finetune", "vqa", "init=runs/first", "run=vqa", *shards, *quiet]) == 0
        for form in ("hf", "open_clip", "onnx"):
            assert cli.main(["export", "runs/first", f"first-{form}", "--format", form]) == 0
        for name, data in zip(("sofa.jpg", "car.jpg"), jpegs(small, 2), strict=True):
            Path(name).write_bytes(data)
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def jpegs(small: Small, count: int) -> list[bytes]:
    """The first images of the validation shard, as files."""
    import tarfile

    with tarfile.open(next(small.root.glob("scenes/val-*.tar"))) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")][:count]
        return [file.read() for name in names if (file := tar.extractfile(name)) is not None]


# ---------------------------------------------------------------------------------------------------------------------
# What can be loaded


def test_embeddings_are_those_of_transformers(here: Path, small: Small) -> None:
    """The reference loads the exported folder by transformers alone, with its own preprocessing of the same pixels."""
    reference = AutoModel.from_pretrained(here / "first-hf")
    tokenizer = AutoTokenizer.from_pretrained(here / "first-hf")
    processor = AutoImageProcessor.from_pretrained(here / "first-hf")
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in jpegs(small, 5)]
    with torch.no_grad():
        out = reference(
            **tokenizer(TEXTS, padding=True, return_tensors="pt"),
            pixel_values=processor(images, return_tensors="pt")["pixel_values"],
        )
    for source in ("runs/first", "first", "first-hf", "first-open_clip", "first-onnx"):
        model = clipfuse.load(source)
        ours, texts = model.encode_images(images), model.encode_texts(TEXTS)
        assert ours.dtype == texts.dtype == np.float32
        assert (ours.shape, texts.shape) == ((5, model.dim), (3, model.dim))
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(ours, out.image_embeds.numpy(), atol=2e-5, err_msg=source)
        np.testing.assert_allclose(texts, out.text_embeds.numpy(), atol=2e-5, err_msg=source)


def test_kinds_of_models(here: Path) -> None:
    assert type(clipfuse.load("runs/first")) is clipfuse.Model
    assert type(clipfuse.load("first-onnx")) is clipfuse.OnnxModel
    tuned = clipfuse.load(Path("runs/vqa"))
    assert isinstance(tuned, clipfuse.FinetunedModel)
    assert tuned.task == "vqa"
    assert "runs/vqa" in repr(tuned)
    checkpoint = next((here / "runs/first/checkpoints").glob("step-*"))
    assert clipfuse.load(checkpoint).logit_scale == pytest.approx(1 / 0.07, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Forms of images and texts


def test_every_form_of_an_image_gives_the_same_embedding(here: Path) -> None:
    model = clipfuse.load("runs/first")
    image = Image.open("car.jpg").convert("RGB")
    png = io.BytesIO()
    image.save(png, "PNG")
    pixels = np.asarray(image)
    Path("car.png").write_bytes(png.getvalue())
    forms: list[Any] = [
        "car.png",
        here / "car.png",
        image,
        pixels,
        png.getvalue(),
        bytearray(png.getvalue()),
        torch.tensor(pixels),
    ]
    rows = model.encode_images(forms, batch_size=2)
    np.testing.assert_allclose(rows, np.repeat(rows[:1], len(forms), axis=0), atol=1e-6)
    for form in (forms[0], image, pixels, png.getvalue()):  # one image, without a list around it
        np.testing.assert_allclose(model.encode_images(form), rows[:1], atol=1e-6)
    np.testing.assert_allclose(model.encode_images(np.stack([pixels] * 3)), rows[:3], atol=1e-6)


def test_modes_and_orientation_are_those_of_a_file(here: Path) -> None:
    model = clipfuse.load("runs/first")
    image = Image.open("sofa.jpg").convert("RGB")
    gray = np.asarray(image.convert("L"))
    np.testing.assert_allclose(model.encode_images(gray), model.encode_images(np.stack([gray] * 3, axis=-1)), atol=1e-6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = model.encode_images(
        [file.getvalue(), Image.open(io.BytesIO(file.getvalue())), image.transpose(Image.Transpose.ROTATE_270)]
    )
    np.testing.assert_allclose(turned, np.repeat(turned[2:], 3, axis=0), atol=1e-6)
    assert np.abs(turned[0] - model.encode_images(image)[0]).max() > 1e-3


def test_batches_do_not_change_a_row(here: Path, small: Small) -> None:
    model = clipfuse.load("runs/first")
    data = jpegs(small, 7)
    whole = model.encode_images(data, batch_size=7)
    np.testing.assert_allclose(model.encode_images(data, batch_size=3, progress=True), whole, atol=1e-5)
    np.testing.assert_allclose(model.encode_texts(TEXTS, batch_size=1), model.encode_texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode_images(iter(data)), whole, atol=1e-5)  # any iterable
    assert model.encode_images([]).shape == (0, model.dim)
    assert model.encode_texts("a red car").shape == (1, model.dim)


def test_similarity_is_the_cosine() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 8)), rng.normal(size=(3, 8))
    expected = [[x @ y / np.sqrt((x @ x) * (y @ y)) for y in b] for x in a]
    np.testing.assert_allclose(clipfuse.similarity(a, b), expected, atol=1e-6)
    with pytest.raises(clipfuse.UserError, match=re.escape("not (4, 8) and (3, 7)")):
        clipfuse.similarity(a, b[:, :7])


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuned runs


def test_predictions_are_probabilities_of_the_vocabulary(here: Path) -> None:
    model = clipfuse.load("runs/vqa")
    assert isinstance(model, clipfuse.FinetunedModel)
    everything = model.predict(["car.jpg", "sofa.jpg"], "what color is the car?", top=10_000)
    assert len(everything) == 2
    for answers in everything:
        scores = [score for _, score in answers]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-4)
    two = ["what color is the car?", "how many dogs are there?"]
    rows = model.predict(["car.jpg", "car.jpg"], two, top=2, batch_size=1)
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0] == [(name, pytest.approx(score, abs=1e-5)) for name, score in everything[0][:2]]


def test_attend_gives_a_map_for_each_word(here: Path) -> None:
    model = clipfuse.load("runs/vqa")
    assert isinstance(model, clipfuse.FinetunedModel)
    maps = model.attend("car.jpg", "what color is the car?", out="attended.png")
    assert maps.words == ["what", "color", "is", "the", "car?"] or maps.words == ["what", "color", "is", "the", "car"]
    assert maps.maps.shape[0] == len(maps.words)
    assert (maps.maps >= 0).all()
    with Image.open("attended.png") as figure:
        assert figure.size == maps.figure().size


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, in one line


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.jpg", "images[0] cannot be read: missing.jpg: No such file or directory"),
        (b"no image", "images[0] is not a usable image: image unreadable"),
        (np.zeros((3, 8, 8), np.uint8), "images[0] is an array of shape (3, 8, 8); give (height, width)"),
        (np.zeros((8, 8, 3), np.float32), "images[0] is ndarray of float32; give a path"),
        ([None], "images[0] is NoneType"),
        (np.zeros((0, 8, 3), np.uint8), "images[0] is an array of shape (0, 8, 3)"),
    ],
)
def test_a_bad_image_is_named(here: Path, image: Any, message: str) -> None:
    with pytest.raises(clipfuse.UserError, match=re.escape(message)):
        clipfuse.load("runs/first").encode_images(image)


def test_other_mistakes_are_named(here: Path) -> None:
    model = clipfuse.load("runs/first")
    Path("bad.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(clipfuse.UserError, match=re.escape("images[1] (bad.jpg) is not a usable image")):
        model.encode_images(["car.jpg", "bad.jpg"])
    with pytest.raises(clipfuse.UserError, match=re.escape("texts[1] is int, not a string")):
        model.encode_texts(["a", 2])  # type: ignore[list-item]
    with pytest.raises(clipfuse.UserError, match="batch_size=0 must be at least 1"):
        model.encode_texts(["a"], batch_size=0)
    for name in ("runs/first", "first-hf", "first-onnx"):
        for method, words in (("predict", ["car.jpg"]), ("attend", ["car.jpg", "a red car"])):
            with pytest.raises(clipfuse.UserError, match=f"{name} holds encoders alone: .* not {method}; load a"):
                getattr(clipfuse.load(name), method)(*words)
    with pytest.raises(clipfuse.UserError, match="no run or checkpoint at runs/other"):
        clipfuse.load("runs/other")
    with pytest.raises(clipfuse.UserError, match="precision='int8' must be one of fp32, bf16, fp16"):
        clipfuse.load("runs/first", precision="int8")
    tuned = clipfuse.load("runs/vqa")
    assert isinstance(tuned, clipfuse.FinetunedModel)
    with pytest.raises(clipfuse.UserError, match="2 images and 1 text: give one text for each image"):
        tuned.predict(["car.jpg", "sofa.jpg"], ["what color is the car?"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(here: Path) -> None:
    with pytest.raises(clipfuse.UserError, match="device='cuda:0': there is no GPU here"):
        clipfuse.load("runs/first", device="cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_embeddings_of_the_cpu(here: Path) -> None:
    fast, slow = clipfuse.load("runs/first"), clipfuse.load("runs/first", device="cpu")
    np.testing.assert_allclose(fast.encode_images("car.jpg"), slow.encode_images("car.jpg"), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The README, and the import itself


def test_the_readme_runs_as_typed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [
        "\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
    ]
    assert len(blocks) == 2
    assert len(blocks[0].splitlines()) == 6
    scope: dict[str, Any] = {}
    exec(blocks[0], scope)
    printed = capsys.readouterr().out
    assert scope["images"].shape == scope["texts"].shape == (2, scope["model"].dim)
    assert printed.startswith(str(scope["model"].similarity(scope["images"], scope["texts"])))
    exec(blocks[1], scope)
    assert re.match(r"\[\[\('\w+', 0\.\d+\)", capsys.readouterr().out)
    assert Path("attended.png").exists()


def test_importing_it_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, clipfuse; dir(clipfuse); print(clipfuse.__version__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True, check=True
    )
    version, torch_too = done.stdout.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert torch_too == "False"
    with pytest.raises(AttributeError, match="has no attribute 'encode'"):
        clipfuse.encode  # noqa: B018


def test_python_m_clipfuse_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipfuse", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: clipfuse")
