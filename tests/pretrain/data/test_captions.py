"""Captions and json of samples as other tools write them: marks, null, lines, lone surrogates, names with dots."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pretrain.data import BadSample
from pretrain.data.captions import caption_id, normalize_whitespace, read_captions
from pretrain.data.check import check_shards
from pretrain.data.config import DataConfig
from pretrain.data.images import ImageDecoder
from pretrain.data.loader import build_loader
from pretrain.data.sample_json import read_fields, read_json
from pretrain.data.text import TextDecoder
from pretrain.data.train_tokenizer import train_tokenizer_on
from pretrain.errors import ConfigError


def image_bytes(format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(out, format)
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def assert_bad(members: dict[str, bytes], source: str, reason: str, detail: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_captions(members, source)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


# ---- lone surrogates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (rb'{"captions": ["\ud800 x"]}', "\ufffd x"),
        (rb'{"captions": "a\uDFFFb"}', "a\ufffdb"),
        (rb'{"captions": ["\ude00\ud83d"]}', "\ufffd\ufffd"),  # the halves in the wrong order
        (rb'{"captions": ["\ud83d\ude00"]}', "\U0001f600"),
        (b'{"captions": ["a \xed\xa0\x80 b"]}', "a \ufffd b"),  # encoded, as Java and MySQL do
        ('\ufeff{"captions": ["\\ud800 \uac00 \ud558"]}'.encode(), "\ufffd \uac00 \ud558"),
        ('{"captions": ["x\ud800"]}'.encode("utf-16", "surrogatepass"), "x\ufffd"),
        (r'{"captions": ["\ud800"]}'.encode("utf-16-le"), "\ufffd"),
    ],
)
def test_a_lone_surrogate_is_replaced(data: bytes, caption: str) -> None:
    (text,) = read_captions({"json": data}, "captions")
    assert text == caption
    assert text.encode("utf-8").decode() == caption


def test_lone_surrogates_are_replaced_in_every_text_of_the_json() -> None:
    data = rb'{"na\ud800me": 1, "questions": [{"question": "\udc00?", "answers": ["\ud811", 2, null]}], "n": 3.5}'
    expected = {"na\ufffdme": 1, "questions": [{"question": "\ufffd?", "answers": ["\ufffd", 2, None]}], "n": 3.5}
    assert read_json({"json": data}) == expected
    assert normalize_whitespace(" a\udfff\n b") == "a\ufffd b"
    assert caption_id("A \ud800") == caption_id("a \udfff") == caption_id("a \ufffd")


# ---- null, marks, other kinds of json --------------------------------------------------------------------------------


def test_captions_that_are_null_are_named_for_what_they_are() -> None:
    assert_bad({"json": b'{"caption": null}'}, "caption", "no caption", "the field caption of the json is null")
    assert_bad({"json": b'{"caption": []}'}, "caption", "no caption", "the field caption of the json is an empty list")
    assert_bad({"json": b'{"caption": [null]}'}, "caption", "no caption", "the field caption of the json is a list of null")
    assert_bad({"json": b'{"title": "x"}'}, "caption", "no caption", "json has no caption, but fields title")
    assert_bad({"json": b"{}"}, "caption", "no caption", "json has no caption, but no fields")
    for data, kind in (
        (b"null", "null"),
        (b"[1]", "a list"),
        (b'"x"', "a text"),
        (b"1", "a number"),
        (b"true", "true or false"),
    ):
        assert_bad({"json": data}, "caption", "no caption", f"the json is {kind}, not an object with a field caption")
    assert read_captions({"json": b'{"caption": ["a", null, " b"]}'}, "caption") == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_byte_order_mark_of_a_json_is_skipped(encoding: str) -> None:
    members = {"json": '{"caption": "caf\u00e9", "label": 2}'.encode(encoding)}
    assert read_captions(members, "caption") == ["caf\u00e9"]
    assert read_fields(members)["label"] == 2


def test_the_cls_member_is_the_label() -> None:
    assert read_fields({"cls": b"7\n"}) == {"label": 7}
    assert read_fields({"cls": b"\xef\xbb\xbfcat "}) == {"label": "cat"}
    assert read_fields({"cls": b"7", "json": b'{"width": 3}'}) == {"width": 3, "label": 7}
    assert read_fields({"cls": b"7", "json": b'{"label": 0}'}) == {"label": 0}
    assert read_fields({"cls": b" "}) == {}
    assert read_json({"cls": b"7", "json": b"[1]"}) == [1]


# ---- one caption a line ----------------------------------------------------------------------------------------------


def test_the_lines_of_a_txt_are_captions_where_asked_for() -> None:
    data = "\ufeffa red  cup\r\n\r\n two\u2028cups \n".encode()
    assert read_captions({"txt": data}, "txt:lines") == ["a red cup", "two cups"]
    assert read_captions({"txt": data}) == read_captions({"txt": data}, "txt:whole") == ["a red cup two cups"]
    assert_bad({"txt": b"\n \r\n"}, "txt:lines", "empty caption", "txt:lines holds ['', ' ', '']")
    assert_bad({"json": b"{}"}, "txt:whole", "no caption", "no txt member, only json; a field of the json is read where the "
               "caption setting names it")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer_on(["a b c"], tmp_path_factory.mktemp("tokenizer"), vocab=260)


HOLD_LINES = "samples looked at hold several lines in KEY.txt"
AS_ONE = f"{HOLD_LINES}, which training reads as one caption; data.caption=txt:lines draws one of the lines each time"


@pytest.mark.parametrize(
    ("texts", "settings", "expected"),
    [
        (["a\nb\nc", "d\n\ne", "f"], {}, f"a.tar: 2 of 3 {AS_ONE}\n"),
        (["a\nb\nc", "d"], {"caption": "txt:whole"}, f"a.tar: 1 of 2 {AS_ONE}\n"),
        (
            ["a\nb\nc", "d\ne"],
            {"caption": "txt:lines"},
            f"a.tar: 2 of 2 {HOLD_LINES}: each line is a caption (2.5 a sample), of which one is drawn each time; "
            "data.caption=txt reads them as one\n",
        ),
        (["a\nb\nc", "d\ne"], {"caption": "txt:lines", "draw": 2}, "of which 2 are drawn each time; data.caption=txt reads"),
        (["a\n", "b", "c\r\n \n"], {}, ""),
        (["a\nb", "c"], {"caption": "captions"}, ""),
    ],
)
def test_training_says_how_lines_of_a_txt_are_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokenizer: Any,
    texts: list[str],
    settings: dict[str, Any],
    expected: str,
) -> None:
    members = [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]
    data = DataConfig(**{"train": write_tar(tmp_path / "a.tar", members), "batch_size": 2, "workers": 0, **settings})
    data.check()
    decoder = TextDecoder(tokenizer, 8, data.caption, draw=data.draw)
    for rank in range(2):
        build_loader(data, {"text": decoder}, seed=1, rank=rank, world=2)
        error = capsys.readouterr().err
        assert error.count("\n") == (1 if expected and rank == 0 else 0)
        assert (expected if rank == 0 else "") in error
    build_loader(data, {"image": ImageDecoder(8)}, seed=1)  # captions are not read
    assert capsys.readouterr().err == ""


# ---- names and formats of members ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extension", "format"),
    [
        ("gif", "GIF"),
        ("bmp", "BMP"),
        ("tiff", "TIFF"),
        ("tif", "TIFF"),
        ("jpe", "JPEG"),
        ("jfif", "JPEG"),
        ("JPEG", "JPEG"),
        ("avif", "AVIF"),
    ],
)
def test_images_under_other_extensions_are_read(tmp_path: Path, extension: str, format: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"x.{extension}", image_bytes(format)), ("x.txt", b"red")])
    report = check_shards([shard], workers=1)
    assert (report.samples, dict(report.bad)) == (1, {})


@pytest.mark.parametrize("decode", [True, False])
def test_check_names_the_rule_that_names_with_dots_break(tmp_path: Path, decode: bool) -> None:
    def check(name: str, members: list[tuple[str, bytes]]) -> dict[str, list[str]]:
        return check_shards([write_tar(tmp_path / name, members)], decode=decode, workers=1).names

    pairs = [(f"photo.{i}.v2.{e}", d) for i in range(8) for e, d in (("jpg", image_bytes()), ("txt", b"red"))]
    names = check("a.tar", pairs)
    assert names["no image"] == [
        "a/photo: members: 0.v2.jpg, 0.v2.txt, 1.v2.jpg, 1.v2.txt, 2.v2.jpg, 2.v2.txt and 10 more; "
        "KEY ends at the first dot of a file name: rename KEY.0.v2.jpg to KEY-0-v2.jpg"
    ]
    assert names["no caption"][0].endswith("first dot of a file name: rename KEY.0.v2.txt to KEY-0-v2.txt")
    names = check("b.tar", [("0.input.jpg", image_bytes()), ("0.output.txt", b"red")])
    rule = "KEY ends at the first dot of a file name: rename"
    assert names["no image"] == [f"b/0: members: input.jpg, output.txt; {rule} KEY.input.jpg to KEY.jpg"]
    assert names["no caption"] == [f"b/0: no txt member, only input.jpg, output.txt; {rule} KEY.output.txt to KEY.txt"]
    names = check("c.tar", [("0.heic", b"..."), ("0.txt", b"red")])
    assert names == {"no image": ["c/0: members: heic, txt; .heic is not read: convert it to .jpg, .png or .webp"]}


def test_captions_under_other_extensions_are_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.jpg", image_bytes()), ("0.text", b"red"), ("0.json", b"{}")])
    assert_bad({"txt": b"x"}, "title", "no caption", "no json member, only txt; the caption setting txt reads KEY.txt")
    report = check_shards([shard], workers=1)
    assert report.names == {"no caption": ["a/0: no txt member, only jpg, json, text; .text is not read: name it KEY.txt"]}


def test_a_tokenizer_is_trained_on_lines_and_lone_surrogates(tmp_path: Path) -> None:
    from pretrain.data.train_tokenizer import iterate_captions

    fields = {"alt": "x \ud800", "questions": [{"question": "q\udc00", "answers": ["a"]}]}
    members = [("0.txt", b"one\ntwo"), ("0.json", json.dumps(fields).encode())]
    shard = write_tar(tmp_path / "a.tar", members)
    assert list(iterate_captions([shard], "txt:lines,alt,questions")) == ["one", "two", "x \ufffd", "q\ufffd"]
    for read in (lambda: list(iterate_captions([shard], "alt,txt:line")), lambda: check_shards([shard], caption="txt:line")):
        with pytest.raises(ConfigError, match=r"^--caption=txt:line: valid are txt, txt:lines "):
            read()
    with pytest.raises(ConfigError, match=r"^data\.val_caption=txt:all: valid are txt, txt:lines "):
        DataConfig(val_caption="txt:all").check()
