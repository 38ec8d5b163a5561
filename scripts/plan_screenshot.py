"""Photographs a page that `longtake plan --html` wrote, with the chromium that is on the PATH.

python scripts/plan_screenshot.py plan.html docs/plan-page.png --height 1660
python scripts/plan_screenshot.py plan.html dark.png --dark --height 1400
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1200


def photograph(page_file: Path, picture: Path, dark: bool = False, height: int = 0) -> None:
    """Writes the page as a PNG, WIDTH pixels across and `height` down, 0 for all; raises FileNotFoundError."""
    browser_path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser_path is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        size = {"width": WIDTH, "height": height or 900}
        page = browser.new_page(viewport=size, color_scheme="dark" if dark else "light")
        page.goto(page_file.resolve().as_uri())
        page.screenshot(path=picture, full_page=not height)
        browser.close()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Photograph a page that `longtake plan --html` wrote.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--height", type=int, default=0, help="pixels from the top; 0: the whole page")
    given = parser.parse_args()
    try:
        photograph(given.page, given.picture, given.dark, given.height)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
