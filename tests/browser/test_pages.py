"""Every page of the book in Chromium, at a desk and on a phone, in light and in dark; and what it weighs."""

from collections.abc import Callable
from urllib.parse import urlsplit

from conftest import AXE, LOOK, ROOT, SLIM, open_page
from playwright.sync_api import Page

SCREENSHOTS = ROOT / "_build/screenshots"
HEAVIEST = 1_500_000  # bytes, without MathJax
STILL = "* { transition: none !important; animation: none !important; }"
View = tuple[int, str]
# A desk and a phone; axe looks at the first and the last of these.
VIEWS: list[View] = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
SIZES = """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
    .map((entry) => [entry.name, entry.encodedBodySize])"""


def arrange(page: Page, width: int, theme: str) -> None:
    """Make the window so wide, and let the reader's system change its theme, which the page follows."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def too_heavy(page: Page) -> list[str]:
    """A line if what the page loaded, without MathJax, weighs too much."""
    sizes = {name: size for name, size in page.evaluate(SIZES) if "mathjax" not in name.lower()}
    assert len(sizes) > 10 and sizes[page.url], sizes
    largest = sorted(((size, urlsplit(name).path) for name, size in sizes.items()), reverse=True)[:5]
    total = sum(sizes.values())
    return [f"{total} bytes are more than {HEAVIEST}; the largest: {largest}"] if total > HEAVIEST else []


def violations(page: Page) -> list[str]:
    """Serious and critical violations of accessibility that axe finds."""
    result = page.evaluate("async () => (await axe.run(document, { resultTypes: ['violations'] })).violations")
    serious = [violation for violation in result if violation["impact"] in {"serious", "critical"}]
    return [
        f"axe, {violation['id']}: {node['target']} {node['failureSummary'].splitlines()[-1].strip()}"
        for violation in serious
        for node in violation["nodes"]
    ]


def test_the_page_is_in_order(page_name: str, site: str, reader: Callable[..., Page]) -> None:
    page = reader(*VIEWS[0])
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: noise.append(f"script: {error}"))
    page.on("request", lambda request: noise.append(f"request to {request.url}") if leaves(request.url) else None)
    open_page(page, f"{site}/{page_name}.html")
    noise += too_heavy(page)
    page.add_style_tag(content=STILL)
    found: dict[View, list[str]] = {}
    for view in VIEWS:
        arrange(page, *view)
        found[view] = page.evaluate(LOOK)
        if found[view]:
            shoot(page, page_name, *view)
    page.evaluate(SLIM)
    page.evaluate(AXE.read_text())
    for view in (VIEWS[-1], VIEWS[0]):
        arrange(page, *view)
        found[view] += violations(page)
    lines = [f"{page_name}.html: {line}" for line in noise]
    for (width, theme), faults in found.items():
        lines += [f"{page_name}.html, {width} px, {theme}: {line}" for line in faults]
    assert not lines, "\n".join(lines)


def leaves(address: str) -> bool:
    """Whether a request goes to another machine."""
    parts = urlsplit(address)
    return parts.scheme not in {"data", "blob"} and parts.hostname != "localhost"


def shoot(page: Page, name: str, width: int, theme: str) -> None:
    """Save a picture of a page with a problem."""
    page.screenshot(path=SCREENSHOTS / f"{name.replace('/', '-')}-{width}-{theme}.png", full_page=True)
