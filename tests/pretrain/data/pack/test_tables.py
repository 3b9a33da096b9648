"""Tables as people store them: separators, quotes, several rows per image, COCO's and Karpathy's annotations."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pretrain.data.captions import read_captions
from pretrain.data.pack import PackSummary, delimited, pack
from pretrain.data.pack.grouping import RowGroups
from pretrain.data.pack.table_rows import merge_columns
from pretrain.errors import ConfigError, UserError
from tests.support.packed import make_image, read_shards

UNCLOSED = "row with a quote that is not closed"
UNEVEN = "row with too few or too many values"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images img/000.jpg to img/007.jpg."""
    (tmp_path / "img").mkdir()
    for i in range(8):
        (tmp_path / "img" / f"{i:03}.jpg").write_bytes(make_image(i))
    return tmp_path


def pack_table(table: Path, **options: Any) -> tuple[PackSummary, dict[str, list[str]]]:
    """Pack a table; return the summary, and all captions of each image by its path, in the order of the samples."""
    out = table.parent / "out"
    summary = pack(table, out, **{"workers": 1, **options})
    captions: dict[str, list[str]] = {}
    for members in read_shards(out).values():
        fields = json.loads(members["json"])
        assert members["jpg"] == make_image(int(fields["source"][-7:-4]))
        captions[fields["source"]] = fields.get(options.get("caption_column", "caption"), [members["txt"].decode()])
        assert captions[fields["source"]][0] == members["txt"].decode()
    return summary, captions


def read_error(source: Path, **options: Any) -> str:
    """Return the message, of one line, with which packing is refused."""
    with pytest.raises(UserError) as caught:
        pack(source, source.parent / "out", **{"workers": 1, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Separators


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.CSV.gz"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "| "])
def test_separator_is_detected_whatever_the_extension(folder: Path, name: str, separator: str) -> None:
    rows = [["filepath", "number", "title"], ["img/000.jpg", "1", "a cat; on a mat"], ["img/001.jpg", "2", "two, three | x\ty"]]
    rows = [[value.replace(separator.strip(" "), "_") if value[0] in "at" else value for value in row] for row in rows]
    content = "".join(separator.join(row) + "\r\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    summary, captions = pack_table(folder / name, image_column="filepath", caption_column="title")
    assert summary.skipped.total() == 0
    assert captions == {row[0]: [" ".join(row[2].split())] for row in rows[1:]}
    assert [json.loads(m["json"])["number"] for m in read_shards(folder / "out").values()] == ["1", "2"]


def test_separator_can_be_named(folder: Path) -> None:
    (folder / "t.csv").write_text("image^^caption\nimg/000.jpg^^a, b; c\n")
    message = read_error(folder / "t.csv")
    assert "no column 'image'" in message
    assert "--separator names another" in message
    assert pack_table(folder / "t.csv", separator="^^")[1] == {"img/000.jpg": ["a, b; c"]}
    with pytest.raises(ConfigError, match=r"^--separator ''"):
        pack(folder / "t.csv", folder / "x", separator="")


def test_options_without_effect_are_refused(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption\nimg/000.jpg,a\n")
    (folder / "t.jsonl").write_text('{"image": "img/000.jpg", "caption": "a"}\n')
    (folder / "t.tar").touch()
    for source, options, message in (
        ("t.csv", {"caption_from": "lines"}, "--caption-from lines is for folders, and {} is a csv table; --caption-column"),
        ("t.jsonl", {"caption_from": "path"}, "--caption-from path is for folders, and {} is a jsonl table; --caption-column"),
        ("t.jsonl", {"separator": ";"}, "--separator ; is for csv, tsv and txt, and {} is a jsonl table"),
        ("img", {"separator": ";"}, "--separator ; is for csv, tsv and txt, and {} is a folder of images"),
        ("img", {"image_root": folder}, "--image-root {folder} is for tables, and {} is a folder of images"),
        ("t.tar", {"image_column": "file"}, "--image-column file is for tables, and {} is a tar"),
    ):
        with pytest.raises(ConfigError) as caught:
            pack(folder / source, folder / "x", **options)
        assert str(caught.value).startswith(message.format(folder / source, folder=folder)), message
    assert not (folder / "x").exists() or not list((folder / "x").glob("*.tar"))


def test_separator_that_excel_declares(folder: Path) -> None:
    (folder / "t.csv").write_text("\ufeffsep=^\r\nimage^caption\r\nimg/000.jpg^a, b; c\r\n")
    assert pack_table(folder / "t.csv")[1] == {"img/000.jpg": ["a, b; c"]}


def test_missing_column_names_the_separator(folder: Path) -> None:
    (folder / "t.csv").write_text("filepath\ttitle\nimg/000.jpg\tx\n")
    message = read_error(folder / "t.csv", image_column="filepath")
    assert "no column 'caption'; it has filepath, title" in message
    assert "separated by tab" in message


def test_file_without_names_of_columns_is_explained(folder: Path) -> None:
    (folder / "t.txt").write_text("img/000.jpg\ta cat\n")
    assert "its first line is read as names" in read_error(folder / "t.txt")


def test_other_line_ends_and_encodings(folder: Path) -> None:
    (folder / "mac.csv").write_bytes(b"image,caption\rimg/000.jpg,one\rimg/001.jpg,two")
    assert pack_table(folder / "mac.csv")[1] == {"img/000.jpg": ["one"], "img/001.jpg": ["two"]}
    (folder / "wide.csv").write_bytes("image\tcaption\nimg/000.jpg\tone\n".encode("utf-16"))
    assert "it is UTF-16; save it as UTF-8" in read_error(folder / "wide.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Quotes

HEADER = "image,caption\n"
FINE = "img/000.jpg,fine\n"


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("lines", "captions", "reason"),
    [
        # one that is never closed
        (["1,fine", '2,"unclosed quote', "3,fine", "4,fine"], {1: "fine", 3: "fine", 4: "fine"}, UNCLOSED),
        # the next quote opens or closes another value
        (['1,"unclosed', '2,"a good; one"', "3,fine"], {2: "a good; one", 3: "fine"}, UNCLOSED),
        (['1,"unclosed', "2,fine", '3,he said "yes"', "4,fine"], {2: "fine", 3: 'he said "yes"', 4: "fine"}, UNCLOSED),
        (['1,"unclosed', "2,fine", '3,"two\nlines"', "4,fine"], {2: "fine", 3: "two lines", 4: "fine"}, UNCLOSED),
        (['1,"unclosed ""doubled""', '2,""', "3,fine"], {3: "fine"}, UNCLOSED),
        (["1,fine", '2,"'], {1: "fine"}, UNCLOSED),
        # quotes that are text
        (['1,"hello" said the man', "2,fine"], {1: '"hello" said the man', 2: "fine"}, None),
        (['1,6" of snow', '2,5"'], {1: '6" of snow', 2: '5"'}, None),
        # quotes of values
        (['1,"a ""big"" dog\nruns, and\nruns"', "2,fine"], {1: 'a "big" dog runs, and runs', 2: "fine"}, None),
        (['1,"\n\nrow after blank lines\n"', "2,fine"], {1: "row after blank lines", 2: "fine"}, None),
        (['"1","quoted"', '"2","unclosed', '"3","quoted"'], {1: "quoted", 3: "quoted"}, UNCLOSED),
    ],
)
def test_unclosed_quote_costs_its_own_row(
    folder: Path, kind: str, lines: list[str], captions: dict[int, str], reason: str | None
) -> None:
    rows = [line.replace(line.strip('"')[0], f"img/00{line.strip(chr(34))[0]}.jpg", 1) for line in lines]
    if kind == "tsv":
        rows = [row.replace(",", "\t", 1) for row in rows]
    separator = "\t" if kind == "tsv" else ","
    (folder / f"t.{kind}").write_text(f"image{separator}caption\n" + "\n".join(rows) + "\n")
    summary, packed = pack_table(folder / f"t.{kind}")
    assert packed == {f"img/00{i}.jpg": [text] for i, text in captions.items()}
    expected = {reason: 1} if reason else {}
    if '2,""' in lines:
        expected["empty caption"] = 1
    assert summary.skipped == expected
    if reason:
        assert "img/00" in summary.examples[reason][0]


def test_caption_column_before_the_image_column(folder: Path) -> None:
    (folder / "t.csv").write_text('caption,image\n"lost,img/000.jpg\nfine,img/001.jpg\nend",img/002.jpg\nfine,img/003.jpg\n')
    summary, captions = pack_table(folder / "t.csv")
    assert captions == {"img/001.jpg": ["fine"], "img/002.jpg": ['end"'], "img/003.jpg": ["fine"]}
    assert summary.skipped == {UNCLOSED: 1}


@pytest.mark.parametrize("names", ["img/00000{}", "{}", "a{}", "3fa9c{}"])
def test_rows_whose_image_names_have_no_extension(folder: Path, names: str) -> None:
    for i in range(12):
        (folder / names.format(i)).write_bytes(make_image(i))
    lines = [f"{names.format(i)},caption {i}" for i in range(12)]
    lines[8] = lines[8].replace("caption", '"lost')
    lines[10] += '"'  # would close the quote of row 8
    (folder / "t.csv").write_text("\n".join(["image,caption", *lines]))
    summary = pack(folder / "t.csv", folder / "out", workers=1)
    assert summary.skipped == {UNCLOSED: 1}
    packed = [(m["jpg"], m["txt"].decode()) for m in read_shards(folder / "out").values()]
    assert packed == [(make_image(i), f"caption {i}" + '"' * (i == 10)) for i in range(12) if i != 8]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            ['000123,"A view.', '2021,which was nice"', '000124,"b"'],
            [("000123", "A view.\n2021,which was nice"), ("000124", "b")],
        ),
        (['12,"A view.', '13,which was nice"', "14,b"], [("12", "A view.\n13,which was nice"), ("14", "b")]),
        (['a1,"x', "a2,y", 'and more"', "a3,b"], [("a1", "x\na2,y\nand more"), ("a3", "b")]),
        (['0001,"x', "2021,y", '2,z"', "0002,b"], [("0001", "x\n2021,y\n2,z"), ("0002", "b")]),
    ],
)
def test_lines_of_a_caption_that_begin_like_names_without_extension(
    tmp_path: Path, rows: list[str], expected: list[tuple[str, str]]
) -> None:
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    layout = delimited.read_layout(tmp_path / "t.csv", None, ("image", "caption"))
    rejected: Counter[str] = Counter()
    values = list(delimited.read_rows(tmp_path / "t.csv", layout, "image", partial(count_rejected, rejected)))
    assert [tuple(value.decode() for value in row) for row in values] == expected
    assert not rejected


def test_random_tables_are_read_as_python_reads_them(tmp_path: Path) -> None:
    """Of tables whose quotes are balanced; the values hold quotes, separators and line breaks."""
    import csv

    rng = np.random.default_rng(0)
    pieces = ["a", " ", '"', ",", ";", "\n", "é", "dog", '""', "|"]
    for _ in range(150):
        rows = [[f"{i}.jpg", "".join(rng.choice(pieces, rng.integers(0, 9))), "z"] for i in range(6)]
        quoting = csv.QUOTE_ALL if rng.random() < 0.3 else csv.QUOTE_MINIMAL
        with open(tmp_path / "t.csv", "w", newline="") as file:
            csv.writer(file, quoting=quoting).writerows([["image", "caption", "more"], *rows])
        layout = delimited.read_layout(tmp_path / "t.csv", None, ("image", "caption"))
        rejected: dict[str, str] = {}
        values = delimited.read_rows(tmp_path / "t.csv", layout, "image", rejected.__setitem__)
        assert [[value.decode() for value in row] for row in values] == rows
        assert not rejected


def count_rejected(counter: Counter[str], reason: str, row: str) -> None:
    counter[reason] += 1


def test_random_quotes_lose_no_line(tmp_path: Path) -> None:
    """Each line of a damaged table is part of a row, or is rejected; lines that are intact and unquoted are always rows."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        lines = []
        for i in range(12):
            stray = "".join(rng.choice(['"', "x", '""', " ", '"\t'], 4))
            lines.append(f"{i}.jpg,{stray}" if rng.random() < 0.4 else f"{i}.jpg,fine {i}")
        (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(lines))
        layout = delimited.read_layout(tmp_path / "t.csv", None, ("image", "caption"))
        rejected: Counter[str] = Counter()
        rows = list(delimited.read_rows(tmp_path / "t.csv", layout, "image", partial(count_rejected, rejected)))
        assert len(rows) + rejected.total() == len(lines)
        intact = {line for line in lines if "fine" in line}
        assert intact <= {",".join(value.decode() for value in row) for row in rows}


def test_search_for_a_closing_quote_is_bounded(tmp_path: Path) -> None:
    """A quote that is open for more than 1 MiB was never closed; a line of 20 MB is no row."""
    fine = "".join(f"{i}.jpg,a caption of some length\n" for i in range(60_000))
    (tmp_path / "t.csv").write_text(f'image,caption\nx.jpg,"open\n{fine}y.jpg,{"z" * 20_000_000}\nlast.jpg,closed"\n')
    layout = delimited.read_layout(tmp_path / "t.csv", None, ("image", "caption"))
    reasons: list[str] = []
    rows = list(delimited.read_rows(tmp_path / "t.csv", layout, "image", lambda reason, row: reasons.append(reason)))
    assert reasons == [UNCLOSED, "row too long"]
    assert len(rows) == 60_001
    assert rows[-1] == [b"last.jpg", b'closed"']


def test_table_without_a_readable_row_is_refused(folder: Path) -> None:
    (folder / "t.csv").write_text(HEADER + 'img/000.jpg,"x\n')
    assert f"no row can be read; 1 have the problem: {UNCLOSED}: img/000.jpg" in read_error(folder / "t.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Several rows per image

ROWS = [(i, n) for i in range(4) for n in range(5)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("order", ["adjacent", "apart", "mixed"])
def test_rows_of_an_image_are_one_sample(folder: Path, kind: str, order: str) -> None:
    rows = {
        "adjacent": ROWS,
        "apart": sorted(ROWS, key=lambda row: row[1]),
        "mixed": [(0, 0), *ROWS[5:10], (0, 1), (3, 0), *ROWS[2:5], *ROWS[10:15], *ROWS[16:]],
    }[order]
    records = [{"image": f"img/00{i}.jpg", "caption": f"caption {n} of {i}", "n": n, "set": "a"} for i, n in rows]
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records), folder / "t.parquet", row_group_size=3)
    elif kind == "jsonl":
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    else:
        lines = [",".join(map(str, record.values())) for record in records]
        (folder / "t.csv").write_text("\n".join(["image,caption,n,set", *lines]))
    summary, captions = pack_table(folder / f"t.{kind}", shard_size=3)
    assert captions == {f"img/00{i}.jpg": [f"caption {n} of {i}" for n in range(5)] for i in range(4)}
    first = list(dict.fromkeys(i for i, _ in rows))
    assert list(captions) == [f"img/00{i}.jpg" for i in first]  # in the order of their first rows
    assert (summary.written, summary.shards) == (4, 2)
    assert "20 rows name 4 images" in str(summary)
    assert "data.caption=caption" in str(summary)
    for members in read_shards(folder / "out").values():
        assert len(read_captions(members, "caption")) == 5
        fields = json.loads(members["json"])
        assert fields["set"] == "a"
        assert list(map(int, fields["n"])) == [0, 1, 2, 3, 4]


def test_table_of_flickr30k(folder: Path) -> None:
    lines = ["image_name| comment_number| comment"]
    for i in range(3):
        lines += [f"img/00{i}.jpg| {n}| A man , {n} , walks ." for n in range(5)]
    lines[9] = "img/001.jpg| 3   A dog runs ."  # as one row of the published table
    (folder / "results.csv").write_text("\n".join(lines))
    summary, captions = pack_table(folder / "results.csv", image_column="image_name", caption_column="comment")
    assert list(map(len, captions.values())) == [5, 4, 5]
    assert captions["img/000.jpg"][1] == "A man , 1 , walks ."
    assert summary.skipped == {UNEVEN: 1}


def test_same_image_under_two_spellings_and_rows_without_images(folder: Path) -> None:
    names = ["img/000.jpg", "./img/000.jpg", "", " img//000.jpg", "", "img/001.jpg"]
    (folder / "t.csv").write_text("image,caption\n" + "".join(f"{name},c{i}\n" for i, name in enumerate(names)))
    summary, captions = pack_table(folder / "t.csv")
    assert captions == {"img/000.jpg": ["c0", "c1", "c3"], "img/001.jpg": ["c5"]}
    assert summary.skipped == {"no image": 2}


def test_image_names_that_no_file_can_have_are_counted(folder: Path) -> None:
    names = ["x" * 5000, "a/" * 3000 + "x.jpg", "img/000.jpg/x", "\0", "\ud800.jpg", "img/loop/x.jpg", "img/001.jpg"]
    (folder / "img" / "loop").symlink_to("loop")
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"image": name, "caption": "c"}) for name in names))
    summary, captions = pack_table(folder / "t.jsonl")
    assert captions == {"img/001.jpg": ["c"]}
    assert summary.skipped == {"no such file": 6}


def test_images_inside_a_table_are_compared_by_content(folder: Path) -> None:
    rows = [{"image": {"bytes": make_image(i % 2), "path": "image.jpg"}, "caption": f"c{i}"} for i in range(4)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    pack(folder / "t.parquet", folder / "out", workers=1)
    samples = list(read_shards(folder / "out").values())
    assert [m["jpg"] for m in samples] == [make_image(0), make_image(1)]
    assert [json.loads(m["json"])["caption"] for m in samples] == [["c0", "c2"], ["c1", "c3"]]


def test_questions_of_the_rows_of_an_image_are_joined(folder: Path) -> None:
    rows = [
        {"image": "img/000.jpg", "caption": "same", "label": 3, "questions": [{"question": f"q{i}", "answers": ["a"]}]}
        for i in range(3)
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    _, captions = pack_table(folder / "t.jsonl")
    assert captions == {"img/000.jpg": ["same"]}
    fields = json.loads(next(iter(read_shards(folder / "out").values()))["json"])
    assert [q["question"] for q in fields["questions"]] == ["q0", "q1", "q2"]
    assert fields["label"] == 3


def test_missing_values_and_labels_of_the_rows_of_an_image(folder: Path) -> None:
    def read_fields(*rows: dict[str, Any]) -> tuple[dict[str, Any], PackSummary]:
        table = folder / f"{len(list(folder.iterdir()))}.jsonl"
        table.write_text("\n".join(json.dumps({"image": "img/000.jpg", "caption": "c", **row}) for row in rows))
        for _ in range(2):  # the second time from the stats of the finished shards
            summary = pack(table, table.with_suffix(""), workers=1)
        return json.loads(next(iter(read_shards(table.with_suffix("")).values()))["json"]), summary

    nan = float("nan")
    fields, summary = read_fields({"score": nan, "n": nan, "label": nan}, {"score": None, "n": 2, "label": 4}, {"score": nan})
    assert (fields["score"], fields["n"], fields["label"]) == (None, [None, 2, None], 4)
    assert "3 rows name 1 image: rows of one image" in str(summary)
    assert summary.label_conflicts == 0
    fields, summary = read_fields({"label": 3}, {"label": 5}, {"label": 3})
    assert fields["label"] == 3
    assert "1 image has rows with different labels: the first label is used" in summary.format_lines()
    (folder / "t.csv").write_text("image,caption,label\nimg/000.jpg,c,\nimg/000.jpg,d,7\n")
    summary, _ = pack_table(folder / "t.csv")
    assert json.loads(next(iter(read_shards(folder / "out").values()))["json"])["label"] == 7
    assert summary.label_conflicts == 0


def test_objects_of_an_image_are_compared_with_few_steps(folder: Path) -> None:
    class Item(dict[str, int]):
        comparisons = 0

        def __eq__(self, other: object) -> bool:
            Item.comparisons += 1
            return super().__eq__(other)

        __hash__ = None  # type: ignore[assignment]

    rows: list[dict[str, Any]] = [{"objects": [Item(a=i % 300, b=n) for i in range(400)]} for n in range(2)]
    merged, _ = merge_columns(rows, ())
    assert merged["objects"] == [{"a": i, "b": n} for n in range(2) for i in range(300)]
    assert Item.comparisons < 2000  # of which 600 by this test


def test_captions_are_listed_where_images_are_scaled_down(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption\nimg/000.jpg,one\nimg/000.jpg,two\nimg/001.jpg,single\n")
    pack(folder / "t.csv", folder / "out", size=16, workers=1)
    assert [read_captions(m, "caption") for m in read_shards(folder / "out").values()] == [["one", "two"], ["single"]]


def test_grouped_rows_are_packed_alike_by_any_number_of_processes(folder: Path) -> None:
    lines = [f"img/00{i}.jpg,caption {n}" for n in range(3) for i in range(8)]
    (folder / "t.csv").write_text("\n".join(["image,caption", *lines]))
    for workers in (1, 2):
        pack(folder / "t.csv", folder / f"out{workers}", shard_size=3, workers=workers)
    tars = [[p.read_bytes() for p in sorted((folder / f"out{n}").glob("*.tar"))] for n in (1, 2)]
    assert tars[0] == tars[1]
    assert len(tars[0]) == 3


def test_groups_of_rows_need_few_bytes_per_row() -> None:
    groups = RowGroups(b"%d" % (i % 1000) for i in range(3000))
    assert (groups.rows, groups.count, groups.repeats) == (3000, 1000, True)
    rows = [("", {"i": i}) for i in range(3000)]
    expected = [(i, [i, i + 1000, i + 2000]) for i in range(1000)]
    packed = [(i, [row["i"] for _, row in group]) for i, group in groups.iterate_groups(lambda: iter(rows), ("image",))]
    assert packed == expected
    assert RowGroups(iter([])).count == 0


# ---------------------------------------------------------------------------------------------------------------------
# Captions that are missing


def test_missing_captions_are_counted(folder: Path) -> None:
    values = ["fine", float("nan"), None, "", [None, float("nan")], {"a": 1}, True, ["x", float("nan"), ""]]
    rows = [{"image": f"img/00{i}.jpg", "caption": value} for i, value in enumerate(values)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary, captions = pack_table(folder / "t.jsonl")
    assert captions == {"img/000.jpg": ["fine"], "img/007.jpg": ["x"]}
    assert summary.skipped == {"no caption": 3, "empty caption": 1, "caption not text": 2}
    assert dict(summary.dropped) == {"no caption": 1, "empty caption": 1}  # of the last row, which has another one


def test_missing_captions_of_a_parquet_file_are_counted(folder: Path) -> None:
    table = pa.table({"image": [f"img/00{i}.jpg" for i in range(3)], "caption": pa.array([float("nan"), None, 7.0])})
    pa.parquet.write_table(table, folder / "t.parquet")
    summary, captions = pack_table(folder / "t.parquet")
    assert captions == {"img/002.jpg": ["7.0"]}
    assert summary.skipped == {"no caption": 2}


def test_captions_left_out_of_an_image_are_counted(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption\nimg/000.jpg,one\nimg/000.jpg,\nimg/000.jpg,three\nimg/001.jpg,\n")
    for _ in range(2):  # the second time from the stats of the finished shards
        summary, captions = pack_table(folder / "t.csv")
        assert captions == {"img/000.jpg": ["one", "three"]}
        assert summary.skipped == {"empty caption": 1}
        assert "captions left out of samples that have others: 1 empty caption" in summary.format_lines()
        assert "4 rows name 2 images" in str(summary)


# ---------------------------------------------------------------------------------------------------------------------
# Annotation files


def make_coco(prefix: str = "") -> dict[str, Any]:
    """Return COCO annotations of the images 000.jpg to 004.jpg, with 0 to 4 captions."""
    images = [{"id": 100 + i, "file_name": f"{prefix}00{i}.jpg", "width": 40, "height": 30} for i in range(5)]
    annotations = [{"id": n, "image_id": 100 + i, "caption": f"caption {n} of {i}\n"} for n in range(4) for i in range(n, 5)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


COCO_CAPTIONS = {i: [f"caption {n} of {i}" for n in range(min(i, 3) + 1)] for i in range(5)}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("folder_name", ["", "images", "val2017", "../val2017", "../images/val2017"])
def test_annotations_of_coco(folder: Path, indent: int | None, folder_name: str) -> None:
    annotations = folder / "annotations"
    annotations.mkdir()
    images = annotations / folder_name
    images.parent.mkdir(exist_ok=True)
    images.mkdir(exist_ok=True)
    for image in (folder / "img").iterdir():
        image.rename(images / image.name)
    content = make_coco()
    content["images"].append({"id": 1, "file_name": "007.jpg"})
    content["annotations"].append({"image_id": 2, "caption": "of no image"})
    (annotations / "captions_val2017.json").write_text(json.dumps(content, indent=indent))
    summary, captions = pack_table(annotations / "captions_val2017.json", shard_size=4)
    assert captions == {f"00{i}.jpg": texts for i, texts in COCO_CAPTIONS.items()}
    assert summary.skipped == {"no caption": 1}
    assert "1 captions of captions_val2017.json name an image that the file does not list" in str(summary)
    for members in read_shards(annotations / "out").values():
        assert len(read_captions(members, "caption")) == len(COCO_CAPTIONS[json.loads(members["json"])["image_id"] - 100])


def test_folder_of_the_images_can_be_named(folder: Path) -> None:
    (folder / "table").mkdir()
    path = folder / "table" / "coco.json"
    path.write_text(json.dumps(make_coco()))
    assert "name their folder with --image-root" in read_error(path)
    with pytest.raises(ConfigError, match=r"^--image-root .*there is no such folder"):
        pack(path, folder / "out", image_root=folder / "nowhere")
    _, captions = pack_table(path, image_root=folder / "img", caption_column="texts")
    assert captions == {f"00{i}.jpg": texts for i, texts in COCO_CAPTIONS.items()}
    (folder / "table" / "t.csv").write_text("image,caption\n000.jpg,x\n../secret.jpg,x\n")
    summary = pack(folder / "table" / "t.csv", folder / "out2", image_root=folder / "img", workers=1)
    assert (summary.written, summary.skipped) == (1, {"path outside the table's folder": 1})


def make_karpathy() -> dict[str, Any]:
    splits = ["train", "restval", "val", "test", "train"]
    images = [
        {
            "filepath": "img",
            "filename": f"00{i}.jpg",
            "imgid": i,
            "split": split,
            "sentences": [{"raw": f"Caption {n}.", "tokens": ["caption", str(n)], "imgid": i} for n in range(5)],
        }
        for i, split in enumerate(splits)
    ]
    return {"images": images, "dataset": "coco"}


@pytest.mark.parametrize("indent", [None, 1])
def test_splits_of_karpathy(folder: Path, indent: int | None) -> None:
    (folder / "dataset.json").write_text(json.dumps(make_karpathy(), indent=indent))
    summary, captions = pack_table(folder / "dataset.json")
    assert captions == {f"img/00{i}.jpg": [f"Caption {n}." for n in range(5)] for i in range(5)}
    assert "(2 train, 1 restval, 1 val, 1 test): --split NAME packs one" in str(summary)
    summary = pack(folder / "dataset.json", folder / "train", splits=["train", "restval"], workers=1)
    assert summary.written == 3
    assert {json.loads(m["json"])["split"] for m in read_shards(folder / "train").values()} == {"train", "restval"}
    assert "has the splits restval, test, train, val" in read_error(folder / "dataset.json", splits=["dev"])


def test_rows_with_the_fields_of_annotation_files(folder: Path) -> None:
    row = {"image": "img/000.jpg", "caption": "x"}
    first = row | {"images": [{"sentences": ["y"]}], "annotations": [{"caption": "z"}]}
    second = {"image": "img/001.jpg", "caption": "x"}
    for name, rows in (
        ("a.jsonl", [first, second]),
        ("b.json", [first, second]),
        ("c.jsonl", [first]),
        ("d.ndjson.gz", [first]),
    ):
        content = "\n\n".join(map(json.dumps, rows)).encode() + b"\n\n"
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        pack(folder / name, folder / name.partition(".")[0], workers=1)
        sources = [json.loads(m["json"])["source"] for m in read_shards(folder / name.partition(".")[0]).values()]
        assert sources == [r["image"] for r in rows]


def test_other_json_is_named(folder: Path) -> None:
    instances = make_coco() | {"annotations": [{"image_id": 100, "bbox": [0, 0, 1, 1]}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    assert "COCO annotations without captions (fields image_id, bbox): give captions_*.json" in read_error(
        folder / "instances.json"
    )
    (folder / "object.json").write_text(json.dumps({"a.jpg": "x", "b.jpg": "y"}, indent=1))
    assert "one json object with the fields a.jpg, b.jpg: pack reads COCO's" in read_error(folder / "object.json")
    (folder / "lines.json").write_text('{"image": "img/000.jpg", "caption": "x", "images": ["y"]}\n')
    assert pack_table(folder / "lines.json")[1] == {"img/000.jpg": ["x"]}
    assert "has no splits" in read_error(folder / "lines.json", splits=["train"])


@pytest.mark.parametrize(
    "content",
    [
        {"images": [], "annotations": []},
        {"images": [1, None, {"id": 1}, {"file_name": 5}, {"file_name": "000.jpg", "id": [1]}], "annotations": [2, {}, []]},
        {"images": [{"sentences": 5, "filename": ["x"]}, 3, {"sentences": [1, None, {}]}]},
    ],
)
def test_broken_annotations_are_one_line(folder: Path, content: Any) -> None:
    (folder / "img" / "coco.json").write_text(json.dumps(content))
    assert "coco.json" in read_error(folder / "img" / "coco.json", image_root=folder / "img")
