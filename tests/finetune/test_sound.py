"""Fine-tuning with sounds in place of images: texts attend to cells of time and frequency."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import finetune
from finetune import evaluate, export
from finetune.config import load_config
from finetune.evaluate import summary
from finetune.explain.examples import sample_examples
from finetune.explain.token_spans import TokenSpans, average_words
from finetune.explain.word_maps import compute_token_maps, compute_word_maps, find_text_decoder
from finetune.tasks import EvalConfig
from launch import report
from pretrain.config import find_config
from pretrain.data.text import train_tokenizer
from tests.support import run_clipfuse

RATE, SECONDS = 8000, 1.0
PITCHES = {"low": 300.0, "high": 2400.0}
TIMES = {"early": 0.1, "late": 0.6}
QUESTIONS = {"how high is the tone?": "pitch", "when is the tone?": "time"}
COMMON = [
    "data.batch_size=16",
    "data.workers=0",
    "data.max_bad_rate=0",
    "train.log_every=1",
    "train.trackers=[]",
    "train.epochs=0",
    "train.samples=0",
    "train.eval_every=0",
    "train.threads=1",
]


def make_sound(pitch: str, time: str, seed: int) -> bytes:
    """Return a FLAC of a tone of 0.3 s in faint noise."""
    t = np.arange(round(RATE * SECONDS)) / RATE
    is_on = (t >= TIMES[time]) & (t < TIMES[time] + 0.3)
    wave = 0.5 * is_on * np.sin(2 * np.pi * PITCHES[pitch] * t + seed) + 0.002 * np.random.default_rng(seed).normal(size=len(t))
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format="FLAC")
    return out.getvalue()


def write_shard(path: Path, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            pitch, time = list(PITCHES)[i % 2], list(TIMES)[i // 2 % 2]
            questions = [
                {"question": "how high is the tone?", "answers": [pitch], "type": "pitch"},
                {"question": "when is the tone?", "answers": [time], "type": "time"},
            ]
            content = {"questions": questions, "label": pitch}
            members = {
                "flac": make_sound(pitch, time, i),
                "txt": f"a {pitch} tone number {i} comes {time}".encode(),
                "json": json.dumps(content).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.tar, val.tar and runs/encoders, an audio and a text tower after three steps."""
    root = tmp_path_factory.mktemp("sound")
    write_shard(root / "train.tar", 48)
    write_shard(root / "val.tar", 12)
    train_tokenizer(str(root / "train.tar"), root / "tokenizer", vocab=300)
    settings = [
        "run=runs/encoders",
        "data.train=train.tar",
        "data.val=val.tar",
        "image=null",
        f"audio={{tower: audio, name: conv, widths: [8, 16, 16], rate: {RATE}, seconds: {SECONDS}}}",
        "text.args={model_type: clip_text_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
        "num_attention_heads: 2}",
        "text.length=24",
        f"text.tokenizer={root / 'tokenizer'}",
        "model.dim=16",
        "train.steps=3",
        "optim.warmup=1",
    ]
    run_clipfuse("pretrain", "scenes", *COMMON, *settings, cwd=root)
    return root


def run_task(root: Path, task: str, name: str, *settings: str) -> Path:
    fixed = ["init=runs/encoders", f"run=runs/{name}", "data.train=train.tar", "data.val=val.tar"]
    run_clipfuse("finetune", task, *COMMON, *fixed, *settings, cwd=root)
    return root / "runs" / name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_questions_about_sounds_are_learned_and_maps_are_drawn(pretrained: Path) -> None:
    more = ["fusion.context=audio", "train.steps=80", "optim.lr=5e-3", "optim.warmup=5", "data.batch_size=16"]
    run = run_task(pretrained, "vqa", "vqa", *more)
    tuned = finetune.load(run)
    assert tuned.model.subject == tuned.task.subject == "audio"
    assert set(tuned.model.encoder.towers) == {"audio", "text"}
    cases = [(p, t, make_sound(p, t, 100 + i)) for i, (p, t) in enumerate((p, t) for p in PITCHES for t in TIMES)]
    for question, position in (("how high is the tone?", 0), ("when is the tone?", 1)):
        prediction = tuned.predict([data for *_, data in cases], [question] * len(cases))
        assert [row[0][0] for row in prediction.best] == [case[position] for case in cases], question
    done = run_clipfuse("evaluate", run, "--data", "val.tar", "--json", cwd=pretrained)
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["accuracy"] == 1.0
    assert metrics["questions"] == 24
    # The same cells of the spectrogram, in time and frequency, as in the picture that is drawn.
    for *_, data in cases[:2]:
        inputs, masks = tuned.encode_inputs([data], ["how high is the tone?"])
        maps, _ = compute_token_maps(tuned.model, tuned.task, inputs["audio"], inputs["text"], masks["text"], "relevance")
        drawn = compute_word_maps(tuned, data, "how high is the tone?", "relevance")
        words = TokenSpans(find_text_decoder(tuned.decoders), "how high is the tone?").find_words()
        np.testing.assert_allclose(drawn.maps[:, ::-1], average_words(maps[0], words).double(), rtol=1e-6)
    (pretrained / "a.flac").write_bytes(cases[1][2])
    run_clipfuse("attend", run, "a.flac", "when is the tone?", "--out", "maps.png", cwd=pretrained)
    with Image.open(pretrained / "maps.png") as figure:
        assert figure.width > 300


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("task", "settings", "metric"),
    [
        ("retrieval", ["fusion.context=audio", "task.foils=null", "task.pool=null"], "reranked_audio_to_text_R@1"),
        ("captioning", ["fusion.context=audio", "task.generate=false"], "likelihood"),
        ("classification", ["fusion=null", "task.features=embedding", "task.field=label"], "top1"),
        ("vqa", ["fusion.context=audio", "fusion.name=merged", "adapt.contrastive=0.5", "data.caption=txt"], "accuracy"),
    ],
)
def test_every_task_takes_sounds(pretrained: Path, task: str, settings: list[str], metric: str) -> None:
    run = run_task(pretrained, task, f"{task}-{len(settings)}", "train.steps=2", "optim.warmup=1", "eval.workers=0", *settings)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(last[f"val/{metric}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pretrained)
        page = report.write(run, workers=0).read_text()
    if task == "classification":
        assert "There is nothing to show: " in page
        assert finetune.load(run).task.describe_chance().endswith("whatever the sound (majority)")
        return
    assert page.count('<article class="query looks">') == 8
    assert "Sounds from val.tar, drawn by a fixed seed" in page
    assert "A sound is drawn as its spectrogram: time to the right, high frequencies at the top." in page
    assert f"clipfuse attend runs/{run.name} SOUND" in page
    assert ("the order of 12 sounds, shown as spectrograms: by embeddings" in page) == (task == "retrieval")
    shown = page.partition("<header>")[2].partition("<details")[0]
    assert "image" not in re.sub(r'"data:image/[^"]*"', "", shown)


@pytest.fixture(scope="module")
def tiny(pretrained: Path) -> Path:
    return run_task(pretrained, "vqa", "tiny", "fusion.context=audio", "train.steps=1", "optim.warmup=0")


def test_examples_of_a_report_are_drawn_as_attend_draws_them(
    pretrained: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is of a sound of the shard, with a question of it and the right answer."""
    monkeypatch.chdir(pretrained)
    tuned = finetune.load(tiny)
    with tarfile.open("val.tar") as tar:
        sounds = [tar.extractfile(member).read() for member in tar if member.name.endswith(".flac")]  # type: ignore[union-attr]
    drawn = {text: [compute_word_maps(tuned, data, text) for data in sounds] for text in QUESTIONS}
    examples = sample_examples(tuned, "val.tar", 6)
    assert [example.text for example in examples] == [*QUESTIONS] * 3  # the types of questions take turns
    chosen = []
    for example in examples:
        same = [i for i, maps in enumerate(drawn[example.text]) if np.allclose(maps.maps, example.maps, rtol=1e-4)]
        chosen += same[:1]
        assert list(example.image.getdata()) == list(drawn[example.text][same[0]].image.getdata())
        assert example.truth == [[*PITCHES][same[0] % 2], [*TIMES][same[0] // 2 % 2]][[*QUESTIONS].index(example.text)]
    assert len(set(chosen)) == 6
    table = summary(evaluate.run(tuned, "val.tar", torch.device("cpu"), EvalConfig(workers=0)))
    assert [column.header for column in table.columns] == ["metric", "result", "chance", "without sound"]


def test_a_head_is_given_the_tokens_of_the_sound(tiny: Path) -> None:
    """The logits are those of the fusion of text and audio, written out here."""
    tuned = finetune.load(tiny)
    model, data = tuned.model, make_sound("low", "late", 7)
    inputs, masks = tuned.encode_inputs([data], ["when is the tone?"])
    with torch.no_grad():
        audio = model.encoder.tower("audio")(inputs["audio"])
        text = model.encoder.tower("text")(inputs["text"], masks["text"])
        sources: dict[str, Any] = {}
        for name, tokens in (("audio", audio), ("text", text)):
            is_aligned = model.token_sources[name] == "aligned"
            sources[name] = tokens._replace(states=model.encoder.projection(name)(tokens.states)) if is_aligned else tokens
        fused = model.fuse(sources)["text"].pooled
        head = model.head
        expected = head.out(torch.nn.functional.gelu(head.up(head.norm(fused))))  # type: ignore[operator, union-attr]
        torch.testing.assert_close(model(inputs, masks)["logits"][:, 0], expected)
    encoders = export.prepare_encoders(tuned)
    error = export.find_error(model, tuned.task, tuned.config, encoders)
    assert error == "a fine-tuned model with an audio tower"


def test_python_takes_sounds_as_encode_audio_does(tiny: Path, tmp_path: Path) -> None:
    model, question = clipfuse.load(tiny), "when is the tone?"
    (tmp_path / "a.flac").write_bytes(make_sound("low", "late", 7))
    array = soundfile.read(tmp_path / "a.flac", dtype="float32")  # (samples, rate)
    answers = model.predict([tmp_path / "a.flac", array], question)
    assert answers[0] == answers[1]
    assert [word for word, _ in model.predict(array, question)[0]] == [word for word, _ in answers[0]]
    drawn = [model.attend(sound, question).maps for sound in (tmp_path / "a.flac", array)]
    np.testing.assert_array_equal(*drawn)
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    for call, message in (
        (lambda: model.predict(picture, question), r"audio\[0\] is not a usable sound: audio unreadable: none of WAV"),
        (lambda: model.predict([array, picture], question), r"one of audio\[0\] to audio\[1\] is not a usable sound"),
        (lambda: model.predict(array[0], question), r"audio\[0\] is ndarray; give a path, the bytes of a sound file, or"),
        (lambda: model.predict([array] * 2, [question] * 3), "2 sounds and 3 texts: give one text for each sound"),
        (lambda: model.attend(picture, question), r"the sound cannot be used: audio unreadable"),
        (lambda: model.attend(array[0], question), r"audio is ndarray; give a path"),
        (lambda: model.attend("none.wav", question), r"audio cannot be read: none\.wav"),
    ):
        with pytest.raises(clipfuse.UserError, match=message):
            call()
    done = run_clipfuse("attend", tiny, "none.wav", question, "--out", "x.png", cwd=tmp_path, check=2)
    assert "cannot read the sound none.wav" in done.stderr


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_fusion_with_a_tower_that_is_not_there_is_refused(pretrained: Path, task: str) -> None:
    settings = ["init=runs/encoders", "data.train=train.tar", "data.val=null", *COMMON]
    done = run_clipfuse("finetune", task, *settings, "run=runs/none", cwd=pretrained, check=2)
    assert "fusion.context='image' is no modality of this model; it has text, audio: fusion.context=audio" in done.stderr


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["fusion.context=audio"], {"image": 0.15, "audio": 0.15, "text": 0.3, "heads": 0.15}),
        (["fusion.context=audio", "optim.lr_scale.audio=0.5"], {"image": 0.15, "audio": 0.5, "text": 0.3, "heads": 0.15}),
        ([], {"image": 0.15, "text": 0.3, "heads": 0.15}),
    ],
)
def test_shipped_rates_of_images_hold_for_sounds_that_texts_are_about(more: list[str], expected: dict[str, float]) -> None:
    towers = ["image={tower: timm}", "text={tower: transformers, name: any}", "audio={tower: audio, name: conv, widths: [8]}"]
    assert load_config(find_config("vqa", "finetune"), [*towers, *more]).optim.lr_scale == expected
