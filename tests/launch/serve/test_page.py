"""The page over HTTP: results, maps of words, filters, uploads and what it refuses; the same in a browser: test_browser.py."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import clipfuse
import numpy as np
from PIL import Image
from starlette.testclient import TestClient

MAPS_OF_A_PAGE = 24


def keys_of(page: str) -> list[str]:
    """The keys of the results, in the order of the page."""
    return re.findall(r'<img class="image" src="/thumbnail\?key=([^"&]+)"', page)


def test_the_page_shows_results_and_where_each_word_looked(here: Path, client: TestClient) -> None:
    empty = client.get("/")
    assert empty.status_code == 200
    assert "holds 24 images" in empty.text
    page = client.get("/", params={"q": "a red car", "k": "24"})
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "media-src" not in page.headers["content-security-policy"]  # of a model without sounds
    records = client.get("/api/search", params={"q": "a red car", "k": "24"}).json()["results"]
    keys = keys_of(page.text)
    assert keys == [record["key"] for record in records]
    assert len(keys) == 24
    assert {record["rank_by_embedding"] for record in records} == set(range(1, 25))
    assert [record["match"] for record in records] == sorted((record["match"] for record in records), reverse=True)

    assert "<script>alert" not in page.text  # captions are escaped
    assert "&lt;script&gt;alert(1)" in page.text
    assert not re.search(r"<script|javascript:|\son\w+=|https?://|\sstyle=", page.text)  # no script, and nothing from elsewhere

    thumbnail = client.get("/thumbnail", params={"key": keys[0]})
    assert (thumbnail.headers["content-type"], Image.open(io.BytesIO(thumbnail.content)).format) == ("image/jpeg", "JPEG")
    words = re.findall(r'<label for="w\d+">([^<]+)</label>', page.text)
    assert words == ["a", "red", "car"]
    assert page.text.count("The circle marks where a word attends most.") == 1
    reranker = clipfuse.load("runs/retrieval")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    expected = dict(reranker.attend(f"hostile/{keys[0]}", "a red car").tiles(320))
    for number, word in enumerate(words):
        drawn = Image.open(io.BytesIO(client.get("/map", params={"key": keys[0], "q": "a red car", "word": number}).content))
        difference = np.asarray(drawn, float) - np.asarray(expected[word].convert("RGB").resize(drawn.size), float)
        assert np.abs(difference).mean() < 8
    assert f"body:has(#w{len(words) - 1}:checked)" in client.get("/style.css").text


def test_both_orders_stand_side_by_side(here: Path, client: TestClient) -> None:
    """The drawing has the order by embeddings, the re-ranked one, and a line for each image of either."""
    page = client.get("/", params={"q": "a red car", "k": "5"}).text
    records = client.get("/api/search", params={"q": "a red car", "k": "24"}).json()["results"]
    by_embedding = [record["key"] for record in sorted(records, key=lambda record: record["rank_by_embedding"])]
    reranked = [record["key"] for record in records]
    drawing = page[page.index('<svg class="orders along"') : page.index('<svg class="orders down"')]
    assert re.findall(r'<image href="/thumbnail\?key=([^"]+)"', drawing) == by_embedding[:5] + reranked[:5]
    moves = re.findall(r'<path class="(\w+)"', drawing)
    expected = []
    for position, key in enumerate(reranked[:5]):
        before = by_embedding.index(key)
        expected.append("in" if before >= 5 else "up" if position < before else "down" if position > before else "same")
    assert moves == expected + ["out"] * len(set(by_embedding[:5]) - set(reranked[:5]))
    assert re.findall(r"from place (\d+)", page) == [str(by_embedding.index(key) + 1) for key in reranked[:5]]
    for stage in ("encode", "search", "fetch", "rerank"):
        assert re.search(rf"</i>{stage} <b>[\d.]+ ms</b>", page)
    assert '<svg class="orders' not in client.get("/", params={"like": "products/p07.jpg"}).text  # nothing was re-ranked


def test_filters_from_the_fields(here: Path, client: TestClient) -> None:
    """The inputs of the page against the products themselves: product i has no fields where 5 divides i."""
    page = client.get("/").text
    assert 'name="from.price"' in page
    assert 'name="to.price"' in page
    rooms = re.search(r'<select name="is.room">(.*?)</select>', page, re.S)
    assert rooms is not None
    assert set(re.findall(r'<option value="([^"]*)"', rooms[1])) == {"", "living", "bed", "o&#34;b&#39;c"}
    with_fields = [i for i in range(24) if i % 5]
    for parameters, expected in (
        ({"to.price": "300"}, [i for i in with_fields if i <= 3]),
        ({"from.price": "1e3", "to.price": " 1500.0 "}, [i for i in with_fields if 10 <= i <= 15]),
        ({"is.room": "living"}, [i for i in with_fields if i % 3 == 0]),
        ({"is.room": "o\"b'c"}, [i for i in with_fields if i % 3 == 2]),
        ({"is.room": '" or key != "'}, []),
        ({"is.room": "\\"}, []),
        ({"condition": "price < 300 or price > 2200", "is.room": "bed"}, [1]),
        ({"condition": "price < 300"}, [1, 2]),
    ):
        asked = {"q": "a red car", "k": "24", **parameters}
        found = client.get("/api/search", params=asked).json()["results"]
        assert {record["key"] for record in found} == {f"products/p{i:02d}.jpg" for i in expected}, parameters
    for k in ("0", "101", "000001" + "9" * 5, "1" + "0" * 5000, "x"):  # beyond the limits, or no number: the default
        assert len(client.get("/api/search", params={"q": "car", "k": k}).json()["results"]) == 12
    page = client.get("/", params={"q": "car", "to.price": "300", "is.room": "bed"}).text
    assert 'name="to.price" value="300"' in page
    assert '<option value="bed" selected>' in page
    like = re.search(r'href="(/\?like=[^"]+)"', page)
    assert like is not None
    assert len(keys_of(client.get(like[1].replace("&amp;", "&")).text)) == 1  # the filters stay
    upload = {"image": ("p07.jpg", Path("products/p07.jpg").read_bytes())}
    assert len(client.post("/api/search", files=upload, data={"to.price": "300"}).json()["results"]) == 3
    for parameters, message in (
        ({"condition": "price < 300) or (price > 0", "is.room": "bed"}, "column 12"),
        ({"from.price": "cheap"}, "price: 'cheap' is no number"),
        ({"from.price": "nan"}, "price: 'nan' is no number"),
    ):
        refused = client.get("/api/search", params={"q": "car", **parameters})
        assert refused.status_code == 400
        assert message in refused.json()["error"]


def test_uploads_and_more_like_this(here: Path, client: TestClient) -> None:
    like = client.get("/api/search", params={"like": "products/p07.jpg", "k": "1"}).json()["results"]
    assert like[0]["key"] == "products/p07.jpg"
    page = client.get("/", params={"q": "car", "k": "3"}).text
    more = re.findall(r'<a href="(/\?like=[^"]+)">more like this</a>', page)
    assert keys_of(client.get(more[1].replace("&amp;", "&")).text)[0] == keys_of(page)[1]
    upload = {"image": ("p07.jpg", Path("products/p07.jpg").read_bytes())}
    assert client.post("/api/search", files=upload).json()["results"][0]["key"] == "products/p07.jpg"
    page = client.post("/", files=upload, data={"q": "a red car", "k": "24"}).text
    assert "products/p07.jpg" in keys_of(page)
    shown = re.search(r'src="/thumbnail\?upload=(\w+)"', page)
    assert shown is not None
    picture = Image.open(io.BytesIO(client.get("/thumbnail", params={"upload": shown[1]}).content))
    original = Image.open("products/p07.jpg").convert("RGB").resize(picture.size)
    assert np.abs(np.asarray(picture, float) - np.asarray(original, float)).mean() < 8


def test_captions_and_the_log_of_the_page(here: Path, client: TestClient, records: list[dict[str, Any]]) -> None:
    asked = {"q": "a red car", "hybrid": "1", "k": "5"}
    page = client.get("/", params=asked)
    assert 'name="hybrid" value="1" checked' in page.text
    assert "By embeddings and captions" in page.text
    assert 'value="1" checked' not in client.get("/", params={"q": "a red car", "k": "5"}).text
    answer = client.get("/api/search", params=asked).json()
    assert any(result["rank_by_captions"] for result in answer["results"])
    assert list(answer["milliseconds"]) == ["encode", "search", "captions", "fetch", "rerank", "total"]
    assert [record["hybrid"] for record in records[-3:]] == [True, False, True]
    assert records[-1] == {"text": "a red car", "like": None, "not": [], "filter": None, "hybrid": True, **answer}


def test_what_the_page_refuses(here: Path, client: TestClient) -> None:
    large = io.BytesIO()
    Image.new("1", (40000, 10000)).save(large, "PNG")  # 400 megapixels in a few kilobytes
    for answer, message in (
        (client.get("/", params={"q": "car", "condition": "prise < 9"}), "did you mean &#39;price&#39;?"),
        (client.get("/", params={"q": "car", "condition": "price <"}), "column 8"),
        (client.get("/", params={"like": "<b>gone</b>"}), "no image &lt;b&gt;gone&lt;/b&gt;"),
        (client.post("/", files={"image": ("a.jpg", b"no image")}), "is not a usable image"),
        (client.post("/", files={"image": ("a.jpg", b"")}), "the file is empty"),
        (client.post("/", files={"image": ("a.png", large.getvalue())}), "image too large"),
        (client.post("/", files={"image": ("a.jpg", bytes((64 << 20) + 1))}), "more than 64 MB"),
        (client.get("/api/search"), "the query is empty: give q, image, audio, or several"),
        (client.get("/api/search", params={"q": "car", "condition": "prise < 9"}), "condition: the index has no field"),
        (client.get("/api/search", params={"q": "car", "condition": "price <"}), "condition 'price <': column 8"),
        (client.post("/api/search", files={"picture": ("a.jpg", b"no image")}), '{"error":"picture is not a usable image: '),
        (client.post("/api/search", files={"picture": ("a.jpg", b"")}), '{"error":"picture is empty: choose another file"}'),
        (client.post("/api/search", data={"q": "car"}), '{"error":"the form holds no file: add one"}'),
    ):
        assert answer.status_code == 400
        assert message in answer.text
    for path, parameters in (("/thumbnail", {"key": "gone"}), ("/map", {"key": "gone", "q": "car", "word": "0"}), ("/x", {})):
        assert client.get(path, params=parameters).status_code == 404
    for parameters in ({"key": "products/p01.jpg", "word": "9"}, {"upload": "gone", "word": "0"}):
        assert client.get("/map", params={"q": "car", **parameters}).status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400  # a page elsewhere that points at this machine


def test_an_image_of_fifty_megapixels(here: Path, client: TestClient) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8192, 6144), "red").save(picture, "JPEG")
    answer = client.post("/api/search", files={"image": ("large.jpg", picture.getvalue())}, data={"k": "24"})
    assert answer.status_code == 200
    assert len(answer.json()["results"]) == 24


def test_a_query_of_a_thousand_words(here: Path, client: TestClient) -> None:
    query = " ".join(["red", "car"] * 500)
    page = client.get("/", params={"q": query})
    assert page.status_code == 200
    assert "what comes after them does not count" in page.text
    words = re.findall(r'<label for="w\d+">([^<]+)</label>', page.text)
    assert 0 < len(words) <= MAPS_OF_A_PAGE
    assert len(page.text) < 500_000
    addresses = re.findall(r'src="(/map\?[^"]+)"', page.text)
    assert max(map(len, addresses)) < 400  # of the words that the model reads
    asked = {"key": keys_of(page.text)[0], "word": "1"}
    whole = client.get("/map", params={**asked, "q": query})
    first = client.get(unquote(addresses[1].replace("&amp;", "&")))
    assert whole.content == first.content != b""
