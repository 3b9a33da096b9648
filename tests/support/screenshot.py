r"""A screenshot of the page, with a word pressed: what the README shows.

    clipfuse serve shop.index --rerank runs/retrieval --port 8000
    python -m tests.support.screenshot "http://127.0.0.1:8000/?q=a+red+car&k=9" launch/search.png --word car \
        --width 900 --height 1000

Needs Playwright, and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image


def main() -> None:
    """Write the screenshot as a PNG of 256 colors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a page of results")
    parser.add_argument("out", type=Path)
    parser.add_argument("--word", help="the word to press")
    parser.add_argument("--width", type=int, default=1000, help="of the window in px")
    parser.add_argument("--height", type=int, default=0, help="of the picture in px; 0 = all of the page")
    parser.add_argument("--dark", action="store_true", help="in dark colors")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        size = {"width": args.width, "height": args.height or 800}
        page = browser.new_page(viewport=size, color_scheme="dark" if args.dark else "light")
        page.goto(args.url)
        if args.word:
            page.locator(".words").get_by_text(args.word, exact=True).click()
        page.wait_for_load_state("networkidle")
        picture = Image.open(io.BytesIO(page.screenshot(full_page=not args.height)))
        browser.close()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"wrote {args.out}: {picture.width} x {picture.height} px, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
