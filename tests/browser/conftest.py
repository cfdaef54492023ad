"""What the tests in a browser share: the built book on a local port, one Chromium, and the pages of the book."""

import functools
import http.server
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build/html"
LOOK, SLIM = (Path(__file__).with_name(name).read_text() for name in ("look.js", "slim.js"))
AXE = ROOT / "_vendor/axe-core/axe.min.js"
sys.path.insert(0, str(ROOT / "book/tools"))

import chromium  # noqa: E402
import pdf  # noqa: E402


def pages() -> list[str]:
    """Every page of the book, without its ending: those of the table of contents, the indices and the search."""
    return [*(page for _, part in pdf.contents() for page in part), "genindex", "prf-prf", "search"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a ``page_name`` on every page."""
    if "page_name" in metafunc.fixturenames:
        metafunc.parametrize("page_name", pages())


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """Address of the built book on a free port of localhost."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=HTML))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of a worker; without one the tests are skipped, but fail in CI."""
    with sync_playwright() as playwright:
        try:
            browser = chromium.launch(playwright)
        except FileNotFoundError as missing:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(missing))
        yield browser
        browser.close()


@pytest.fixture
def reader(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an empty page for someone who comes to the book for the first time, by default at a desk in the light."""
    contexts = []

    def come(width: int = 1280, theme: Literal["light", "dark"] = "light", **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        context.set_default_timeout(120_000)  # for busy machines
        contexts.append(context)
        return context.new_page()

    yield come
    for context in contexts:
        context.close()


def open_page(page: Page, address: str) -> None:
    """Go to a page and wait until its formulas are typeset and its fonts are there."""
    page.goto(address, wait_until="load")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")
