"""The report of runs in every condition, its charts and gallery, and its escaping of captions."""

import base64
import io
import json
import math
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.explain.heatmap import encode_png
from launch import report
from launch.report import figures, finetuned, gallery
from launch.report.charts import (
    POINTS,
    Series,
    choose_ticks,
    downsample,
    draw_line_chart,
    format_number,
    running_mean,
)
from launch.report.finetuned import FinetunedSection
from launch.report.run_history import read_run
from pretrain import config as configuration
from pretrain import model as models
from pretrain.checkpoints import loading
from pretrain.data.text import load_tokenizer
from pretrain.data.thumbnails import make_thumbnail
from pretrain.embedding.split import EmbeddedSplit
from pretrain.errors import UserError
from pretrain.model import ModelSchema
from pretrain.training.config import TrainConfig
from pretrain.training.spikes import SpikeWatch
from tests.support import TINY_TOWERS, Small

CONFIG = """
run: tiny
data: {train: 'a/train-*.tar', val: 'a/val-*.tar', batch_size: 128}
image: {tower: timm, name: vit_base_patch16_224, size: 96, args: {}}
text: {tower: transformers, name: null, args: {model_type: clip_text_model, hidden_size: 64}, tokenizer: tok}
loss: {name: clip}
train: {steps: 400}
"""


def training_line(step: int, **numbers: Any) -> dict[str, Any]:
    return {
        "step": step, "samples_seen": 128 * step, "time": 1e9 + step, "loss": 4.8 - step / 200, "lr": 1e-3, "logit_scale": 15.0,
        "grad_norm": 1.0, "samples_per_second": 64.0, "data_wait_seconds": 0.1, "data_wait_share": 0.02, "memory_gib": 1.5,
        "mfu": None, "skipped": 0, "bad_samples": 0, **numbers,
    }  # fmt: skip


def evaluation_line(step: int, recall: float) -> dict[str, Any]:
    recalls = {
        f"val/{direction}_R@{k}": min(1.0, recall * k) for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    ranks = {f"val/{direction}_median_rank": 12.0 for direction in ("image_to_text", "text_to_image")}
    return {"step": step, "samples_seen": 128 * step, "time": 1e9, **recalls, **ranks, "val/samples": 500, "val/captions": 500}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps({"command": "clipfuse pretrain tiny.yaml", "versions": {"torch": "2"}}))
    (folder / "status.json").write_text(json.dumps({"state": "done", "why": "", "step": 400}))
    lines = [training_line(step) for step in range(10, 401, 10)] + [evaluation_line(200, 0.05), evaluation_line(400, 0.04)]
    write_lines(folder, lines)
    return folder


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


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
    assert "Gallery There is no gallery:" in page.text  # no checkpoint in this folder
    assert "clipfuse evaluate" in page.text
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert "Loss over steps" in charts
    assert "Image → caption: recall over steps" in charts
    assert "blind guess: ln 128" in page.text
    assert "chance of R@1" in page.text
    assert "by chance 250" in page.text  # the median rank of 500
    assert re.search(r"chance\s+0\.2 1\.0 2\.0", page.text)  # the last row of the table of evaluations


def test_the_page_of_a_run_of_sounds_and_texts(tmp_path: Path) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    (folder / "config.yaml").write_text("image: null\naudio: {name: conv}\ntext: {name: bert}\ndata: {train: shards}\n")
    recalls = {"val/audio_to_text_R@1": 0.5, "val/text_to_audio_R@1": 0.25, "val/samples": 96, "val/captions": 480}
    worse = {**recalls, "val/audio_to_text_R@1": 0.1}
    write_lines(folder, [training_line(10), {"step": 10, **recalls}, training_line(20), {"step": 20, **worse}])
    page = Page(report.write(folder).read_text()).text
    assert "conv and bert learn to match sounds and captions" in page
    for text in ("Sound → caption, R@1", "Caption → sound, R@1", "(96 sounds)", "S→C R@1", "after step 10"):
        assert text in page, text
    for text in ("configuration is missing", "not evaluated", "Image → caption"):
        assert text not in page, text


def test_the_page_of_a_tower_of_the_users_own_names_it(tmp_path: Path) -> None:
    """Recalls of every tower are shown, and a fine-tuned run is about what texts attend to."""
    folder = tmp_path / "depths"
    folder.mkdir()
    (folder / "config.yaml").write_text("image: null\ndepth: {tower: mine.depth}\ntext: {name: bert}\n")
    recalls = {"val/depth_to_text_R@1": 0.5, "val/text_to_depth_R@1": 0.25, "val/chance_depth_to_text_R@1": 0.1}
    worse = {**recalls, "val/depth_to_text_R@1": 0.1}
    write_lines(folder, [{"step": 10, **recalls}, {"step": 20, **worse}])
    page = Page(report.write(folder).read_text()).text
    for text in ("Depth → caption, R@1", "Caption → depth, R@1", "D→C R@1", "after step 10"):
        assert text in page, text
    assert "chance depth" not in page.lower()
    (folder / "config.yaml").write_text("task: {name: vqa}\nfusion: {name: cross, query: text, context: depth}\n")
    assert finetuned.describe_run(read_run(folder)).startswith("Questions about depths: ")


def test_the_page_makes_no_network_requests(run: Path) -> None:
    page = Page(report.write(run).read_text())
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert not (tag == "script" and "src" in attrs)
        for name in ("src", "href"):
            assert (attrs.get(name) or "data:").startswith("data:")


@pytest.mark.parametrize("names", [["config.yaml"], ["metrics.jsonl"], ["status.json"]])
def test_any_one_file_is_enough(run: Path, names: list[str]) -> None:
    for file in run.iterdir():
        if file.name not in names:
            file.unlink()
    text = Page(report.write(run).read_text()).text
    assert "tiny" in text
    assert "What to do next" in text


def test_an_unfinished_resumed_and_damaged_run_is_read(run: Path) -> None:
    lines = [
        training_line(10),
        training_line(20, loss=None),
        training_line(30),
        training_line(20, loss=1.25),
        training_line(40),
    ]
    write_lines(run, lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    (run / "status.json").write_text(json.dumps({"state": "stopped", "why": "stopped by SIGTERM", "step": 45}))
    history = read_run(run)
    assert [line["step"] for line in history.steps] == [10, 20, 30, 40]
    assert history.steps[1]["loss"] == 1.25
    assert history.step == 45
    assert history.training_seconds == pytest.approx(40 * 128 / 64)
    text = Page(report.write(run).read_text()).text
    assert "stopped by SIGTERM" in text
    assert "This run was not evaluated" in text
    assert "Resume where it stopped, with the same command. clipfuse pretrain tiny.yaml" in text
    assert "of 400" in text


def test_the_page_shows_bad_samples_and_classification(run: Path) -> None:
    reasons = {"bad/image unreadable": 3, "bad/no caption": 8, "filtered_samples": 70, "filtered/not kept": 70}
    classification = {
        "val/zero_shot_top1": 0.31,
        "val/zero_shot_top5": 0.6,
        "val/zero_shot_classes": 10,
        "val/linear_probe_top1": 0.9,
    }
    write_lines(run, [training_line(10, bad_samples=11, skipped=2, **reasons), {**evaluation_line(10, 0.1), **classification}])
    text = Page(report.write(run).read_text()).text
    assert "11 of 1,280 samples" in text
    assert text.index("no caption 8") < text.index("image unreadable 3")
    assert "2 steps were skipped because the gradient was not finite: steps 1 to 10." in text
    assert "70 samples were passed over" in text
    assert text.index("not kept 70") < text.index("no caption 8")
    assert "Zero-shot classification, top 1 31.0 % chance 10.0 %" in text
    assert "Linear probe, top 1 90.0 %" in text
    line = {"step": 20, "val/linear_probe_top1": 0.9, "val/linear_probe_classes": 4}
    write_lines(run, [line, {**line, "step": 30}])
    assert "Linear probe, top 1 90.0 % chance 25.0 %" in Page(report.write(run).read_text()).text


def test_the_page_shows_spikes_rollbacks_and_skipped_steps_with_where_they_were(run: Path) -> None:
    watch = SpikeWatch(TrainConfig(on_spike="rollback"), torch.device("cpu"))
    names = list(watch.metrics())  # as runs write them
    assert names == ["spikes", "rollbacks", "undone_steps"]
    counts = {10: (0, 0, 0, 0), 20: (1, 0, 0, 0), 21: (2, 1, 11, 0), 30: (2, 1, 11, 3), 40: (2, 1, 11, 3)}
    lines = [
        training_line(step, skipped=skipped, **dict(zip(names, values, strict=True)))
        for step, (*values, skipped) in counts.items()
    ]
    write_lines(run, lines)
    text = Page(report.write(run).read_text()).text
    assert "2 steps were a loss spike: steps 11 to 20, step 21." in text
    assert "1 rollback undid the updates of 11 steps: step 21." in text
    assert "3 steps were skipped because the gradient was not finite: steps 22 to 30." in text
    write_lines(run, lines[:1])
    text = Page(report.write(run).read_text()).text
    assert "loss spike" not in text
    assert "rollback" not in text
    assert "no step was skipped" in text
    write_lines(run, [training_line(step, spikes=step) for step in range(1, 10)])
    assert (
        "9 steps were a loss spike: step 1, step 2, step 3, step 4, step 5, step 6 and 3 places more."
        in Page(report.write(run).read_text()).text
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        report.write(tmp_path)


def test_data_without_a_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        report.write(run, data="a/val-*.tar")


def test_a_folder_that_cannot_be_written_is_a_clear_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the report"):
        report.write(run, out=tmp_path / "nowhere" / "report.html")


def test_the_command_is_shown_as_a_person_types_it(run: Path) -> None:
    for command, typed in [
        ("/some/where/launch/cli.py pretrain a.yaml seed=1", "clipfuse pretrain a.yaml seed=1"),
        ("/some/where/launch/cli/__main__.py pretrain a.yaml", "clipfuse pretrain a.yaml"),
        ("/some/where/launch/api/__main__.py pretrain a.yaml", "clipfuse pretrain a.yaml"),
        ("/some/where/pretrain/__main__.py a.yaml", "python -m pretrain a.yaml"),
        ("/some/where/finetune/__main__.py vqa init=a", "python -m finetune vqa init=a"),
        ("clipfuse pretrain a.yaml", "clipfuse pretrain a.yaml"),
    ]:
        (run / "environment.json").write_text(json.dumps({"command": command}))
        assert figures.format_command(read_run(run)) == typed


def test_rows_of_a_retrieval_run_pair_both_orders_and_ranks_are_no_fractions() -> None:
    metrics = {
        "image_to_text_R@1": 0.2, "image_to_text_median_rank": 1.0, "text_to_image_R@1": 0.1, "reranked_image_to_text_R@1": 0.4,
        "chance_reranked_image_to_text_R@1": 0.25, "R@1": 0.15, "reranked_R@1": 0.3, "rerank_ms": 0.5, "samples": 10,
        "captions": 20,
    }  # fmt: skip
    section = FinetunedSection("retrieval", "reranked_R@1")
    rows = section.build_rows({"step": 1, **{f"val/{name}": value for name, value in metrics.items()}})
    assert [(row["name"], row["chance"]) for row in rows] == [
        ("R@1, re-ranked", None),
        ("R@1", pytest.approx(0.1)),
        ("image to text R@1", pytest.approx(0.1)),
        ("image to text R@1, re-ranked", 0.25),
        ("text to image R@1", pytest.approx(0.1)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted captions


EVIL = '<script>alert("x")</script> "quoted" & <img src=x onerror=alert(1)>'


def build_small_split() -> tuple[EmbeddedSplit, list[bytes]]:
    """Build eight images with captions; captions 2 and 3 are exchanged, and image 0 has two."""
    image = torch.eye(8)
    text = torch.cat([torch.eye(8)[[0, 1, 3, 2, 4, 5, 6, 7]], torch.eye(8)[:1]])
    captions = [f"caption {j} {EVIL}" for j in range(9)]
    image_index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0])
    keys = [f"s/{i}" for i in range(8)]
    split = EmbeddedSplit({"image": image}, text, image_index, torch.zeros(8, 0), keys, captions, [None] * 8)
    thumbnails = [make_thumbnail(encode_png(Image.new("RGB", (30, 40), (20 * i, 0, 0)))) for i in range(8)]
    return split, thumbnails


def test_captions_are_escaped_everywhere(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG.replace("run: tiny", f"run: '{EVIL}'").replace("a/train-*.tar", "</pre><script>1"))
    (run / "status.json").write_text(json.dumps({"state": "failed", "why": EVIL, "step": 3}))
    (run / "environment.json").write_text(json.dumps({"command": EVIL, EVIL: [EVIL]}))
    write_lines(run, [training_line(10, bad_samples=1, **{f"bad/{EVIL}": 1})])
    split, thumbnails = build_small_split()
    built = gallery.Gallery(
        8, 9, EVIL, gallery.build_caption_queries(split, thumbnails, 12), gallery.build_image_queries(split, thumbnails, 6),
        gallery.retrieval_metrics(split.image, split.text, split.image_index),
    )  # fmt: skip
    text = report.render(read_run(run), built)
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 1  # the page's own script
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.text.count('alert("x")') >= 10  # it is there, as text
    assert "unsafe-eval" not in text
    assert "default-src 'none'" in text


# ---------------------------------------------------------------------------------------------------------------------
# Gallery


def test_the_gallery_shows_right_and_wrong_answers_with_their_ranks() -> None:
    split, thumbnails = build_small_split()
    queries = gallery.build_caption_queries(split, thumbnails, 4)
    assert [query.rank == 1 for query in queries] == [True, True, False, False]
    for query in queries:
        assert [answer.is_right for answer in query.answers].count(True) == 1
        right = next(answer for answer in query.answers if answer.is_right)
        assert right.rank == query.rank
        assert right.image == query.image
        assert len(query.answers) == (5 if query.rank <= 5 else 6)
    wrong = queries[-1]
    assert wrong.rank == 8  # equal scores count against it
    assert wrong.answers[0].score == pytest.approx(1.0)
    queries = gallery.build_image_queries(split, thumbnails, 8)
    first = next(query for query in queries if query.caption == split.captions[0])
    assert first.rank == 1
    assert [answer.is_right for answer in first.answers[:2]] == [True, True]


def test_a_run_never_evaluated_shows_the_metrics_of_the_gallery(run: Path) -> None:
    write_lines(run, [training_line(10)])
    split, thumbnails = build_small_split()
    metrics = gallery.retrieval_metrics(split.image, split.text, split.image_index)
    built = gallery.Gallery(8, 9, "new/*.tar", gallery.build_caption_queries(split, thumbnails, 2), [], metrics)
    text = Page(report.render(read_run(run), built)).text
    assert "On pairs from new/*.tar, measured for this page (8 images)" in text
    assert "75.0 %" in text  # six of eight images find one of their captions


def test_the_choice_of_queries_is_fixed_and_fills_up_from_one_kind() -> None:
    ranks = torch.tensor([1.0, 1, 1, 7, 1, 1, 1, 1])
    assert gallery.choose_queries(ranks, 6) == gallery.choose_queries(ranks, 6)
    assert 3 in gallery.choose_queries(ranks, 6)
    assert len(gallery.choose_queries(ranks, 6)) == 6
    assert len(gallery.choose_queries(torch.full((20,), 3.0), 6)) == 6
    assert len(gallery.choose_queries(torch.ones(3), 6)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def test_chart_is_well_formed_and_carries_its_numbers() -> None:
    steps = list(range(1, 50))
    svg = draw_line_chart([Series("a <b>", steps, [math.sin(s) for s in steps])], label='x "y" <z>')
    root = ElementTree.fromstring(svg)
    data = json.loads(root.attrib["data-chart"])
    assert root.attrib["aria-label"] == 'x "y" <z>'
    assert data["series"][0]["name"] == "a <b>"
    assert len(data["series"][0]["points"]) == 49
    low, high = data["y"]
    assert low <= min(math.sin(s) for s in steps)
    assert high >= max(math.sin(s) for s in steps)


def test_charts_of_no_value_one_point_and_gaps() -> None:
    assert draw_line_chart([Series("a", [], [])]) == ""
    assert draw_line_chart([Series("a", [1, 2], [None, float("nan")])]) == ""
    assert "circle" in draw_line_chart([Series("a", [5], [0.0])])
    svg = draw_line_chart([Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, None, float("inf"), 3.0])])
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
    values: list[float | None] = [2.0 * i for i in range(400)]
    assert running_mean(values) == pytest.approx(values)
    values[50] = None
    assert running_mean(values)[50] is None
    assert running_mean(values)[300] == pytest.approx(600)


def test_ticks_are_round_and_enclose() -> None:
    for low, high in [(0, 1), (0.013, 0.87), (-3, 12000), (4.9999, 5.0001), (2, 2), (0, 0), (1e-5, 3e-4)]:
        values = choose_ticks(low, high, 4)
        assert values[0] <= low
        assert values[-1] >= high
        assert 2 <= len(values) <= 8
        assert values == sorted(set(values))


def test_tick_labels_are_exact() -> None:
    svg = draw_line_chart([Series("memory", [1, 2, 3], [0.97, 1.02, 1.03])], zero=True)
    labels = re.findall(r'class="tick end"[^>]*>([^<]*)<', svg)
    assert labels == ["0", "0.25", "0.5", "0.75", "1", "1.25"]
    svg = draw_line_chart([Series("scale", [100_000, 150_000, 200_000], [14.0, 14.1, 14.2])])
    assert re.findall(r'class="tick mid"[^>]*>([^<]*)<', svg) == ["100k", "125k", "150k", "175k", "200k"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0005, "5e-4"), (0.25, "0.25"), (12.5, "12.5"), (999.9, "1,000"), (1234, "1,234"), (52224, "52.2k"),
     (1e6, "1M"), (-3, "-3"), (999_999, "1,000k"), (1.28e9, "1.28G")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


# ---------------------------------------------------------------------------------------------------------------------
# With a model


def test_the_gallery_of_a_model_shows_whole_images_and_stays_small(small: Small, tmp_path: Path) -> None:
    """Noise compresses worst; each third image is tall, each third one wide, and the model sees a square of 32 px."""
    sizes = [(400, 400), (100, 700), (800, 200)]
    noise = np.random.default_rng(0).integers(0, 256, (700, 800, 3), dtype=np.uint8)
    with tarfile.open(tmp_path / "noise-0000.tar", "w") as tar:
        for i in range(40):
            width, height = sizes[i % 3]
            image = encode_png(Image.fromarray(np.roll(noise, 7 * i, axis=0)[:height, :width]))
            for extension, data in (("png", image), ("txt", f"صورة {i} of a dog".encode())):
                member = tarfile.TarInfo(f"{i:04}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = f"{tmp_path}/noise-0000.tar"
    config = configuration.load(ModelSchema, None, [*TINY_TOWERS, f"text.tokenizer={small.tokenizer}"])
    tokenizer = load_tokenizer(small.tokenizer)
    model = models.build(models.tower_configs(config), config.model, tokenizer)
    decoders = models.build_decoders(config, tokenizer, model, "txt")
    loaded = loading.LoadedModel(model, config, tokenizer, decoders, Path("step-0000000"), 0)
    built = gallery.build_gallery(loaded, [{"shards": shards, "weight": 1.0}], torch.device("cpu"), workers=0)
    assert built is not None
    assert built.images == 40
    assert built.data == shards
    assert len(built.by_caption) == 12
    assert len(built.by_image) == 6
    for query in [*built.by_caption, *built.by_image]:
        kind, _, data = query.image.partition(";base64,")
        assert kind == "data:image/jpeg"
        width, height = sizes[int(query.caption.split()[1]) % 3]
        shown = Image.open(io.BytesIO(base64.b64decode(data))).size
        assert shown[0] / shown[1] == pytest.approx(width / height, rel=0.05)
        assert max(shown) >= 200
        assert sum(answer.is_right for answer in query.answers) == 1
    found_first = sum(query.rank == 1 for query in built.by_caption)
    assert (found_first > 0) == (built.metrics["text_to_image_R@1"] > 0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    text = report.render(read_run(run), built)
    assert len(text) < 5e6
    page = Page(text)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("dir") == "auto" for tag, attrs in page.tags if tag == "q")
