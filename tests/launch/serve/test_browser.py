"""The page in headless Chromium. Without Chromium or Playwright these are skipped; test_page.py holds the same over HTTP."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def origin(client: TestClient) -> Iterator[str]:
    """The address of the page on a port of this machine."""
    with listen(client) as address:
        yield address


@contextlib.contextmanager
def listen(client: TestClient) -> Iterator[str]:
    """Serve a page on a port of this machine, and yield its address."""
    server = uvicorn.Server(uvicorn.Config(client.app, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(here: Path, chromium: Any, origin: str) -> Iterator[Any]:
    """An open page, see open_page."""
    with open_page(chromium, origin) as page:
        yield page


@contextlib.contextmanager
def open_page(chromium: Any, origin: str) -> Iterator[Any]:
    """Open a page. At the end: nothing was asked of another machine, and the console is empty but for refused requests."""
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    requests: list[str] = []
    messages: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("dialog", lambda dialog: messages.append(f"dialog {dialog.message}"))
    page.set_default_timeout(60_000)
    page.goto(origin)
    yield page
    page.close()
    assert requests
    assert all(url.startswith(origin) for url in requests)
    assert [message for message in messages if "status of 400" not in message] == []


def search(page: Any, text: str) -> None:
    page.get_by_label("Images that show").fill(text)
    with page.expect_navigation():
        page.keyboard.press("Enter")


def upload(page: Any, name: str, data: bytes) -> None:
    page.get_by_label("Images like this file").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": data})
    with page.expect_navigation():
        page.get_by_text("Search by image").click()


def test_words_are_pressed_by_mouse_and_by_keyboard(page: Any) -> None:
    search(page, "a red car")
    assert page.locator(".results li").count() == 12
    assert page.locator("img.m2").first.is_hidden()
    page.locator(".words").get_by_text("car", exact=True).click()
    page.wait_for_function("() => document.querySelector('img.m2').naturalWidth > 0")
    assert page.locator("img.m2").first.is_visible()
    page.keyboard.press("ArrowLeft")  # to the word before
    assert page.locator("img.m2").first.is_hidden()
    assert page.locator("img.m1").first.is_visible()
    assert page.locator("svg.along").is_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_all_by_keyboard(page: Any) -> None:
    """The search box has the focus; Tab reaches the filters, which a key opens, and the links of results."""
    page.keyboard.type("a red car")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "To the results"
    with_focus = "() => document.activeElement.tagName + ' ' + document.activeElement.textContent.trim().slice(0, 40)"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate(with_focus).startswith("SUMMARY"):
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.name") == "from.price"
    links = 0
    for _ in range(60):
        page.keyboard.press("Tab")
        links += page.evaluate(with_focus) == "A more like this"
    assert links >= 10


def test_a_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for text in ("a red car", "donaudampfschifffahrtsgesellschaftskapitaen" * 4):
        search(page, text)
        assert page.locator("svg.down").is_visible()
        assert page.locator("svg.along").is_hidden()
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    with page.expect_navigation():
        page.get_by_text("ask about it").first.click()
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_filters_and_more_like_this(page: Any) -> None:
    search(page, "a red car")
    page.get_by_text("Filters and options").click()
    page.get_by_label("price to").fill("900")
    page.get_by_label("room").select_option("living")
    with page.expect_navigation():
        page.get_by_role("button", name="Search", exact=True).click()
    assert page.locator(".results li").count() == 3
    assert page.get_by_label("price to").input_value() == "900"
    with page.expect_navigation():
        page.get_by_text("more like this").first.click()
    assert "Images like" in page.inner_text("main")
    assert page.locator(".results li").count() == 3


def test_questions(page: Any) -> None:
    search(page, "a red car")
    with page.expect_navigation():
        page.get_by_text("ask about it").first.click()
    page.keyboard.type("what colour is the car?")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert page.locator(".answers li").count() >= 1
    page.locator(".words").get_by_text("colour", exact=True).click()
    page.wait_for_function("() => document.querySelector('img.m1').naturalWidth > 0")
    assert page.locator("img.m1").first.is_visible()


def test_uploads_good_broken_and_large(page: Any) -> None:
    upload(page, "p07.jpg", Path("products/p07.jpg").read_bytes())
    assert page.locator(".results li").count() == 12
    page.wait_for_function("() => document.querySelector('.asked img').naturalWidth > 0")
    upload(page, "broken.jpg", b"\xff\xd8\xff no image")
    assert "is not a usable image" in page.locator("[role=alert]").inner_text()
    large = io.BytesIO()
    Image.new("RGB", (8192, 6144), "red").save(large, "JPEG")
    upload(page, "large.jpg", large.getvalue())
    assert page.locator(".results li").count() == 12


def test_empty_and_endless_queries_and_a_script_in_a_caption(page: Any) -> None:
    search(page, "   ")
    assert "holds 24 images" in page.inner_text("main")
    page.get_by_label("Images that show").fill("alert")
    page.get_by_text("Filters and options").click()
    page.get_by_label("where").fill('caption like "%script%"')
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert "<script>alert(1)</script>" in page.locator(".results").inner_text()
    page.get_by_label("where").fill("")
    search(page, "red car " * 500)
    assert "what comes after them does not count" in page.locator(".note").inner_text()
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_sounds_are_heard_and_searched_by(sound_folder: Path, chromium: Any, sound_client: TestClient) -> None:
    """The policy of the page lets the browser load sounds from it; a file that is chosen is a query."""
    with listen(sound_client) as origin, open_page(chromium, origin) as page:
        page.get_by_label("Sounds of").fill("a green thing")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert page.locator(".results audio").count() == 12
        length = "() => { const a = document.querySelector('.results audio'); a.preload = 'auto'; a.load() }"
        page.evaluate(length)
        page.wait_for_function("() => document.querySelector('.results audio').duration > 0")
        assert page.evaluate("() => document.querySelector('.results audio').duration") in (0.3, 0.8)
        page.locator(".words").get_by_text("green", exact=True).click()
        page.wait_for_function("() => document.querySelector('img.m1').naturalWidth > 0")
        assert page.locator("img.m1").first.is_visible()
        page.goto(origin)  # without the text
        name = "00007.flac"
        file = {"name": name, "mimeType": "audio/flac", "buffer": (sound_folder / "sounds" / name).read_bytes()}
        page.get_by_label("Sounds like this file").set_input_files(file)
        with page.expect_navigation():
            page.get_by_text("Search by sound").click()
        assert "cosine 1.000" in page.locator(".results li").first.inner_text()
        assert page.locator(".asked audio").count() == 1
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
