"""Every page of the book in Chromium, at a desk and on a phone, in light and in dark; and what it weighs."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import AXE, LOOK, ROOT, SLIM, open_page
from playwright.sync_api import Page

SCREENSHOTS = ROOT / "_build/screenshots"
HEAVIEST = 1_500_000  # bytes, without MathJax
STILL = "* { transition: none !important; animation: none !important; }"
# The theme changes colours alone, so in a page's second theme axe looks at these rules alone.
COLOURS = ["color-contrast", "link-in-text-block"]
SIZES = """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
    .map((entry) => [entry.name, entry.encodedBodySize])"""


def set_theme(page: Page, theme: str) -> None:
    """Let the reader's system change between light and dark, which the page follows."""
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)


def too_heavy(page: Page) -> list[str]:
    """A line if what the page loaded, without MathJax, weighs too much."""
    sizes = {name: size for name, size in page.evaluate(SIZES) if "mathjax" not in name.lower()}
    assert len(sizes) > 10 and sizes[page.url], sizes
    largest = sorted(((size, urlsplit(name).path) for name, size in sizes.items()), reverse=True)[:5]
    total = sum(sizes.values())
    return [f"{total} bytes are more than {HEAVIEST}; the largest: {largest}"] if total > HEAVIEST else []


def look(page: Page, theme: str) -> list[str]:
    """What is wrong with the page in a theme."""
    set_theme(page, theme)
    problems: list[str] = page.evaluate(LOOK)
    return problems


def accessibility(page: Page, theme: str, rules: list[str] | None) -> list[str]:
    """Serious and critical violations that axe finds in a theme, by all its rules unless some are named."""
    set_theme(page, theme)
    options: dict[str, Any] = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
    result = page.evaluate("async options => (await axe.run(document, options)).violations", options)
    serious = [violation for violation in result if violation["impact"] in {"serious", "critical"}]
    return [
        f"axe, {violation['id']}: {node['target']} {node['failureSummary'].splitlines()[-1].strip()}"
        for violation in serious
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("width, themes", [(1280, ("light", "dark")), (390, ("dark", "light"))])
def test_the_page_is_in_order(
    page_name: str, width: int, themes: tuple[str, str], site: str, reader: Callable[..., Page]
) -> None:
    page = reader(width, themes[0])
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: noise.append(f"script: {error}"))
    page.on("request", lambda request: noise.append(f"request to {request.url}") if leaves(request.url) else None)
    open_page(page, f"{site}/{page_name}.html")
    noise += too_heavy(page)
    page.add_style_tag(content=STILL)
    found = {theme: look(page, theme) for theme in themes}
    for theme in filter(found.get, themes):
        shoot(page, page_name, width, theme)
    page.evaluate(SLIM)
    page.evaluate(AXE.read_text())
    for theme, rules in zip(reversed(themes), (None, COLOURS), strict=True):
        violations = accessibility(page, theme, rules)
        if violations and not found[theme]:
            shoot(page, page_name, width, theme)
        found[theme] += violations
    lines = [f"{page_name}.html, {width} px, {theme}: {line}" for theme in themes for line in found[theme]]
    lines += [f"{page_name}.html, {width} px: {line}" for line in noise]
    assert not lines, "\n".join(lines)


def leaves(address: str) -> bool:
    """Whether a request goes to another machine."""
    parts = urlsplit(address)
    return parts.scheme not in {"data", "blob"} and parts.hostname != "localhost"


def shoot(page: Page, name: str, width: int, theme: str) -> None:
    """Save a picture of a page with a problem."""
    set_theme(page, theme)
    page.screenshot(path=SCREENSHOTS / f"{name.replace('/', '-')}-{width}-{theme}.png", full_page=True)
