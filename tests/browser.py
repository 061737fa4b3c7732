"""A headless Chromium for tests that look at pages, and small pictures of what it shows.

The system's browser is used, not one of playwright's own, which would have to be downloaded.
Tests that use it carry the mark ``browser``.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

PICTURES_VARIABLE = "ROBUSTFT_PICTURES"
"""Environment variable with the folder for pictures: docs/images renews those of the manual."""

PATIENCE_MS = 120_000.0
MAX_BYTES = 150_000


@contextlib.contextmanager
def browser_page(*, width: int = 1280, height: int = 720) -> Iterator[Any]:
    """Open a playwright ``Page`` of that size, in pixels; skip the test without a browser.

    Its requests to other hosts than this one are refused, so that a page that needs the network
    shows it here.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    # A container has no user namespaces and little shared memory.
    options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=options, timeout=PATIENCE_MS
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE_MS)
        try:
            yield page
        finally:
            browser.close()


def picture(page: Any, name: str, folder: Path) -> Path:
    """Save what ``page`` shows as ``<name>.png`` of few colours; return its path.

    Args:
        page: a playwright ``Page``.
        name: of the picture.
        folder: where it goes, unless ``ROBUSTFT_PICTURES`` names another folder.
    """
    folder = Path(os.environ.get(PICTURES_VARIABLE) or folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    with Image.open(io.BytesIO(page.screenshot(animations="disabled"))) as image:
        image.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES
    return path
