"""The report of runs in every condition, its charts, its gallery, and its distrust of captions."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from launch import report
from launch.report import figures, gallery, record
from launch.report.charts import POINTS, Series, downsample, line_chart, number, running_mean, ticks
from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import loading
from pretrain.data.text import load_tokenizer
from pretrain.embedding.split import EmbeddedSplit
from pretrain.errors import UserError
from pretrain.model import ModelSchema
from tests.support import TINY_TOWERS, Small

CONFIG = """
run: tiny
data: {train: 'a/train-*.tar', val: 'a/val-*.tar', batch_size: 128}
image: {tower: timm, name: vit_base_patch16_224, size: 96, args: {}}
text: {tower: transformers, name: null, args: {model_type: clip_text_model, hidden_size: 64}, tokenizer: tok}
loss: {name: clip}
train: {steps: 400}
"""


def training(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "samples_seen": 128 * step, "time": 1e9 + step, "loss": 4.8 - step / 200, "lr": 1e-3, "logit_scale": 15.0,
        "grad_norm": 1.0, "samples_per_second": 64.0, "data_wait_seconds": 0.1, "data_wait_share": 0.02, "memory_gib": 1.5,
        "mfu": None, "skipped": 0, "bad_samples": 0, **more,
    }  # fmt: skip


def evaluation(step: int, recall: float) -> dict[str, Any]:
    ways = {f"val/{way}_R@{k}": min(1.0, recall * k) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    ranks = {f"val/{way}_median_rank": 12.0 for way in ("image_to_text", "text_to_image")}
    return {"step": step, "samples_seen": 128 * step, "time": 1e9, **ways, **ranks, "val/samples": 500, "val/captions": 500}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps({"command": "clipfuse pretrain tiny.yaml", "versions": {"torch": "2"}}))
    (folder / "status.json").write_text(json.dumps({"state": "done", "why": "", "step": 400}))
    lines = [training(step) for step in range(10, 401, 10)] + [evaluation(200, 0.05), evaluation(400, 0.04)]
    write_lines(folder, lines)
    return folder


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.said))


# ---------------------------------------------------------------------------------------------------------------------
# Runs in every condition


def test_page_of_a_finished_run(run: Path) -> None:
    path = report.write(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    assert "done" in page.text
    assert "vit_base_patch16_224 (96 px) and clip_text_model (width 64) learn" in page.text
    assert "5.0 %" in page.text
    assert "after step 200, the best of 2 evaluations" in page.text
    assert "chance 0.2 %" in page.text
    assert "25× chance" in page.text
    assert "13 min 20 s" in page.text  # 400 steps of 128 at 64 a second
    assert "Gallery There is none" in page.text  # no checkpoint in this folder
    assert "clipfuse evaluate" in page.text
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert "Loss over steps" in charts
    assert "Picture → caption: recall over steps" in charts
    assert "blind guess: ln 128" in page.text


def test_page_asks_nothing_of_the_network(run: Path) -> None:
    page = Page(report.write(run).read_text())
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert not (tag == "script" and "src" in attrs)
        for name in ("src", "href"):
            assert (attrs.get(name) or "data:").startswith("data:")


@pytest.mark.parametrize("left", [["config.yaml"], ["metrics.jsonl"], ["status.json"]])
def test_any_one_file_is_enough(run: Path, left: list[str]) -> None:
    for file in run.iterdir():
        if file.name not in left:
            file.unlink()
    text = Page(report.write(run).read_text()).text
    assert "tiny" in text
    assert "How to go on" in text


def test_unfinished_resumed_and_damaged(run: Path) -> None:
    lines = [training(10), training(20, loss=None), training(30), training(20, loss=1.25), training(40)]
    write_lines(run, lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    (run / "status.json").write_text(json.dumps({"state": "stopped", "why": "stopped by SIGTERM", "step": 45}))
    read = record.read(run)
    assert [line["step"] for line in read.steps] == [10, 20, 30, 40]
    assert read.steps[1]["loss"] == 1.25
    assert read.step == 45
    assert read.training_seconds == pytest.approx(40 * 128 / 64)
    text = Page(report.write(run).read_text()).text
    assert "stopped by SIGTERM" in text
    assert "This run was not evaluated" in text
    assert "the same command resumes. clipfuse pretrain tiny.yaml" in text
    assert "of 400" in text


def test_bad_samples_and_classification(run: Path) -> None:
    more = {"bad/image unreadable": 3, "bad/no caption": 8}
    extra = {"val/zero_shot_top1": 0.31, "val/zero_shot_top5": 0.6, "val/zero_shot_classes": 10, "val/linear_probe_top1": 0.9}
    write_lines(run, [training(10, bad_samples=11, skipped=2, **more), {**evaluation(10, 0.1), **extra}])
    text = Page(report.write(run).read_text()).text
    assert "11 of 1,280 samples" in text
    assert text.index("no caption 8") < text.index("image unreadable 3")
    assert "2 steps were skipped" in text
    assert "Zero-shot classification, top 1 31.0 % chance 10.0 %" in text
    assert "Linear probe, top 1 90.0 %" in text


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        report.write(tmp_path)


def test_given_data_needs_a_checkpoint(run: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        report.write(run, data="a/val-*.tar")


def test_read_only_folder_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the report"):
        report.write(run, out=tmp_path / "nowhere" / "report.html")


def test_command_reads_as_typed(run: Path) -> None:
    for given, typed in [
        ("/some/where/launch/cli.py pretrain a.yaml seed=1", "clipfuse pretrain a.yaml seed=1"),
        ("/some/where/pretrain/__main__.py a.yaml", "python -m pretrain a.yaml"),
        ("/some/where/finetune/__main__.py vqa init=a", "python -m finetune vqa init=a"),
        ("clipfuse pretrain a.yaml", "clipfuse pretrain a.yaml"),
    ]:
        (run / "environment.json").write_text(json.dumps({"command": given}))
        assert figures.command(record.read(run)) == typed


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted words


EVIL = '<script>alert("x")</script> "quoted" & <img src=x onerror=alert(1)>'


def small_split() -> tuple[EmbeddedSplit, list[bytes]]:
    """Eight pictures, captions 2 and 3 exchanged, picture 0 with two captions."""
    image = torch.eye(8)
    text = torch.cat([torch.eye(8)[[0, 1, 3, 2, 4, 5, 6, 7]], torch.eye(8)[:1]])
    captions = [f"caption {j} {EVIL}" for j in range(9)]
    image_index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0])
    split = EmbeddedSplit(image, text, image_index, torch.zeros(8, 0), [f"s/{i}" for i in range(8)], captions, [None] * 8)
    grey = [gallery.thumbnail(torch.full((3, 40, 30), 20 * i, dtype=torch.uint8)) for i in range(8)]
    return split, grey


def test_captions_are_escaped_everywhere(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG.replace("run: tiny", f"run: '{EVIL}'").replace("a/train-*.tar", "</pre><script>1"))
    (run / "status.json").write_text(json.dumps({"state": "failed", "why": EVIL, "step": 3}))
    (run / "environment.json").write_text(json.dumps({"command": EVIL, EVIL: [EVIL]}))
    write_lines(run, [training(10, bad_samples=1, **{f"bad/{EVIL}": 1})])
    split, pictures = small_split()
    shown = gallery.Gallery(
        8, 9, EVIL, gallery.by_caption(split, pictures, 12), gallery.by_picture(split, pictures, 6),
        gallery.retrieval_metrics(split.image, split.text, split.image_index),
    )  # fmt: skip
    text = report.render(record.read(run), shown)
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 1  # our own
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.text.count('alert("x")') >= 10  # it is there, as words
    assert "unsafe-eval" not in text
    assert "default-src 'none'" in text


# ---------------------------------------------------------------------------------------------------------------------
# Gallery


def test_gallery_shows_right_and_wrong_with_their_places() -> None:
    split, pictures = small_split()
    queries = gallery.by_caption(split, pictures, 4)
    assert [query.rank == 1 for query in queries] == [True, True, False, False]
    for query in queries:
        assert [answer.right for answer in query.answers].count(True) == 1
        right = next(answer for answer in query.answers if answer.right)
        assert right.place == query.rank
        assert right.picture == query.picture
        assert len(query.answers) == (5 if query.rank <= 5 else 6)
    wrong = queries[-1]
    assert wrong.rank == 8  # equal scores count against it
    assert wrong.answers[0].score == pytest.approx(1.0)
    asked = gallery.by_picture(split, pictures, 8)
    first = next(query for query in asked if query.caption == split.captions[0])
    assert first.rank == 1
    assert [answer.right for answer in first.answers[:2]] == [True, True]


def test_a_run_never_evaluated_shows_what_the_gallery_measured(run: Path) -> None:
    write_lines(run, [training(10)])
    split, pictures = small_split()
    metrics = gallery.retrieval_metrics(split.image, split.text, split.image_index)
    shown = gallery.Gallery(8, 9, "new/*.tar", gallery.by_caption(split, pictures, 2), [], metrics)
    text = Page(report.render(record.read(run), shown)).text
    assert "On pairs from new/*.tar, measured for this page (8 pictures)" in text
    assert "75.0 %" in text  # six of eight pictures find a caption of theirs


def test_gallery_draws_the_same_each_time_and_fills_up() -> None:
    rank = torch.tensor([1.0, 1, 1, 7, 1, 1, 1, 1])
    assert gallery.choose(rank, 6) == gallery.choose(rank, 6)
    assert 3 in gallery.choose(rank, 6)
    assert len(gallery.choose(rank, 6)) == 6
    assert len(gallery.choose(torch.full((20,), 3.0), 6)) == 6
    assert len(gallery.choose(torch.ones(3), 6)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def test_chart_is_well_formed_and_carries_its_numbers() -> None:
    steps = list(range(1, 50))
    svg = line_chart([Series("a <b>", steps, [math.sin(s) for s in steps])], label='x "y" <z>')
    root = ElementTree.fromstring(svg)
    data = json.loads(root.attrib["data-chart"])
    assert root.attrib["aria-label"] == 'x "y" <z>'
    assert data["series"][0]["name"] == "a <b>"
    assert len(data["series"][0]["points"]) == 49
    low, high = data["y"]
    assert low <= min(math.sin(s) for s in steps)
    assert high >= max(math.sin(s) for s in steps)


def test_chart_of_nothing_one_point_and_gaps() -> None:
    assert line_chart([Series("a", [], [])]) == ""
    assert line_chart([Series("a", [1, 2], [None, float("nan")])]) == ""
    assert "circle" in line_chart([Series("a", [5], [0.0])])
    svg = line_chart([Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, None, float("inf"), 3.0])])
    path = re.search(r'class="line c1" d="([^"]*)"', svg)
    assert path is not None
    assert path[1].count("M") == 2


def test_downsampling_keeps_spikes_and_ends() -> None:
    n = 20_000
    values: list[float | None] = [1.0] * n
    values[12_345], values[6_789], values[400] = 99.0, -5.0, None
    points = downsample(Series("a", list(range(n)), values))
    assert len(points) <= POINTS + 2
    assert (12_345, 99.0) in points
    assert (6_789, -5.0) in points
    assert points[0][0] == 0
    assert points[-1][0] == n - 1
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_running_mean_does_not_lag() -> None:
    line: list[float | None] = [2.0 * i for i in range(400)]
    assert running_mean(line) == pytest.approx(line)
    line[50] = None
    assert running_mean(line)[50] is None
    assert running_mean(line)[300] == pytest.approx(600)


def test_ticks_are_round_and_enclose() -> None:
    for low, high in [(0, 1), (0.013, 0.87), (-3, 12000), (4.9999, 5.0001), (2, 2), (0, 0), (1e-5, 3e-4)]:
        found = ticks(low, high, 4)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 8
        assert found == sorted(set(found))


def test_tick_labels_are_exact() -> None:
    svg = line_chart([Series("memory", [1, 2, 3], [0.97, 1.02, 1.03])], zero=True)
    labels = re.findall(r'class="tick end"[^>]*>([^<]*)<', svg)
    assert labels == ["0", "0.25", "0.5", "0.75", "1", "1.25"]
    svg = line_chart([Series("scale", [100_000, 150_000, 200_000], [14.0, 14.1, 14.2])])
    assert re.findall(r'class="tick mid"[^>]*>([^<]*)<', svg) == ["100k", "125k", "150k", "175k", "200k"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0005, "5e-4"), (0.25, "0.25"), (12.5, "12.5"), (999.9, "1,000"), (1234, "1,234"), (52224, "52.2k"),
     (1e6, "1M"), (-3, "-3"), (999_999, "1,000k"), (1.28e9, "1.28G")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


# ---------------------------------------------------------------------------------------------------------------------
# With a model


def test_gallery_of_a_model_holds_pictures_as_it_sees_them(small: Small) -> None:
    config = configuration.load(ModelSchema, None, [*TINY_TOWERS, f"text.tokenizer={small.tokenizer}"])
    tokenizer = load_tokenizer(small.tokenizer)
    model = models.build(models.tower_configs(config), config.model, tokenizer)
    decoders = models.build_decoders(config, tokenizer, model, "txt")
    loaded = loading.LoadedModel(model, config, tokenizer, decoders, Path("step-0000000"), 0)
    shown = gallery.build(loaded, [{"shards": small.val, "weight": 1.0}], torch.device("cpu"), workers=0, pictures=40)
    assert shown is not None
    assert shown.pictures == 40
    assert shown.data == small.val
    assert len(shown.by_caption) == 12
    assert len(shown.by_picture) == 6
    for query in [*shown.by_caption, *shown.by_picture]:
        kind, _, data = query.picture.partition(";base64,")
        assert kind == "data:image/jpeg"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
        assert sum(answer.right for answer in query.answers) == 1
    first = sum(query.rank == 1 for query in shown.by_caption)
    assert (first > 0) == (shown.metrics["text_to_image_R@1"] > 0)
