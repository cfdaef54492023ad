"""The Chromium of this machine, in which the book is checked and from which it is printed."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# No name but localhost resolves, so that nothing can leave this machine.
FLAGS = ["--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"]
MISSING = """No Chromium was found. Install it with the system's packages (Debian, Ubuntu: apt-get install chromium),
or let Playwright fetch its own: .venv/bin/playwright install --with-deps chromium"""


def find(playwright: Playwright) -> str | None:
    """Path of the system's Chromium, else of Playwright's own, else None."""
    own = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, NAMES)), None) or (own if Path(own).exists() else None)


def launch(playwright: Playwright) -> Browser:
    """Start Chromium, without a window; FileNotFoundError says how to get it."""
    path = find(playwright)
    if path is None:
        raise FileNotFoundError(MISSING)
    return playwright.chromium.launch(executable_path=path, args=FLAGS)
