"""What a reader does with the pages: search, unfold, copy, change the theme, move a slider, filter the ledger."""

from collections.abc import Callable

import pytest
from conftest import open_page
from playwright.sync_api import Page, expect

CHAPTER = "notebooks/hermite-twin"


@pytest.fixture
def chapter(site: str, reader: Callable[..., Page]) -> Page:
    """A chapter, in the light and at a desk."""
    page = reader(permissions=["clipboard-read", "clipboard-write"])
    open_page(page, f"{site}/{CHAPTER}.html")
    return page


def test_the_search_lists_the_chapter_of_a_word(site: str, reader: Callable[..., Page]) -> None:
    page = reader()
    open_page(page, f"{site}/search.html?q=twin")
    expect(page.locator(f"#search-results li a[href*='{CHAPTER}.html']").first).to_be_visible()
    expect(page.locator("#search-results li .context").first).to_contain_text("twin", ignore_case=True)
    open_page(page, f"{site}/search.html?q=xylophone")
    expect(page.locator("#search-results")).to_contain_text("did not match any documents")


def test_the_keyboard_opens_the_search(chapter: Page) -> None:
    box = chapter.locator(".search-button__wrapper input[type=search]")
    expect(box).to_be_hidden()
    chapter.keyboard.press("Control+k")
    expect(box).to_be_focused()
    chapter.keyboard.type("twin")
    chapter.keyboard.press("Enter")
    chapter.wait_for_url("**/search.html?q=twin")
    expect(chapter.locator("#search-results li a").first).to_be_visible()


def test_solutions_and_hints_unfold(chapter: Page) -> None:
    solution = chapter.locator(".tag_solution").first
    expect(solution.locator(".cell_input")).to_be_hidden()
    solution.locator("summary").click()
    expect(solution.locator(".cell_input")).to_be_visible()
    hint = chapter.locator(".dropdown.admonition").first
    expect(hint.locator("> p").last).to_be_hidden()
    hint.locator(".admonition-title").click()
    expect(hint.locator("> p").last).to_be_visible()


def test_the_copy_button_copies_the_code(chapter: Page) -> None:
    cell = chapter.locator(".cell:not(.tag_hide-input) > .cell_input").first
    cell.hover()
    cell.locator("button.copybtn").click()
    expect(cell.locator("button.copybtn.success")).to_be_visible()
    code = cell.locator("pre").inner_text()
    assert chapter.evaluate("() => navigator.clipboard.readText()").strip() == code.strip() != ""


def test_the_theme_switch_works_and_is_remembered(chapter: Page) -> None:
    def background() -> str:
        colour: str = chapter.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return colour

    themes = {chapter.locator("html").get_attribute("data-theme"): background()}
    while len(themes) < 2:
        chapter.locator("button.theme-switch-button:visible").first.click()
        themes[chapter.locator("html").get_attribute("data-theme")] = background()
        assert chapter.locator("html").get_attribute("data-mode") != "auto" or len(themes) > 1
    assert set(themes) == {"light", "dark"} and len(set(themes.values())) == 2
    last = background()
    chapter.reload()
    assert background() == last


def test_the_menu_opens_on_a_phone(site: str, reader: Callable[..., Page]) -> None:
    page = reader(width=390)
    open_page(page, f"{site}/{CHAPTER}.html")
    entry = page.locator(".bd-sidebar-primary a[href$='grokking.html']")
    expect(entry).not_to_be_in_viewport()
    page.locator(".primary-toggle:visible").click()
    entry.scroll_into_view_if_needed()
    expect(entry).to_be_in_viewport()
    entry.click()
    page.wait_for_url("**/grokking.html")


def test_sliders_move_the_curve(site: str, reader: Callable[..., Page]) -> None:
    """Each slider, moved with the keyboard, changes a drawing of its page."""
    page = reader()
    open_page(page, f"{site}/book/explore.html")
    sliders = page.locator("main input[type=range]")
    sliders.first.wait_for()
    drawing = "() => [...document.querySelectorAll('main svg')].map((svg) => svg.innerHTML).join()"
    for number in range(sliders.count()):
        before, value = page.evaluate(drawing), sliders.nth(number).input_value()
        sliders.nth(number).focus()
        page.keyboard.press("ArrowLeft")
        if sliders.nth(number).input_value() == value:  # it stood at its left end
            page.keyboard.press("ArrowRight")
        page.wait_for_function(f"before => ({drawing})() !== before", arg=before)


def test_filters_narrow_the_ledger(site: str, reader: Callable[..., Page]) -> None:
    """Verdicts and lists hide rows, a word that no claim has hides all of them, and the address keeps the state."""
    page = reader()
    open_page(page, f"{site}/book/ledger.html")
    rows = page.locator("table.icl-ledger tbody tr:visible")
    everything = rows.count()
    assert everything > 100
    verdicts, choices = page.locator("main .icl-toggle"), page.locator("main select")
    assert verdicts.count() == 4 and choices.count() == 2
    for number in range(4):
        verdicts.nth(number).click()
        expect(rows).to_have_count(int(verdicts.nth(number).locator(".icl-count").inner_text()))
        verdicts.nth(number).click()
        expect(rows).to_have_count(everything)
    for number in range(2):
        choices.nth(number).select_option(index=1)
        expect(rows).not_to_have_count(everything)
        assert rows.count() > 0
        choices.nth(number).select_option(index=0)
        expect(rows).to_have_count(everything)
    page.locator("main input[type=search]").fill("xylophone")
    expect(rows).to_have_count(0)
    page.locator("main .icl-reset").click()
    expect(rows).to_have_count(everything)
    verdicts.last.click()
    few = rows.count()
    page.reload()
    expect(rows).to_have_count(few)


def test_a_count_on_the_landing_page_leads_to_its_claims(site: str, reader: Callable[..., Page]) -> None:
    page = reader()
    open_page(page, f"{site}/book/index.html")
    count = page.locator("main a[href*='#verdict-']").last
    number = int("".join(filter(str.isdigit, count.inner_text())))
    count.click()
    expect(page.locator("table.icl-ledger tbody tr:visible")).to_have_count(number)


def test_links_preview_what_they_lead_to(chapter: Page) -> None:
    """The pointer on a link to an equation shows it, typeset; leaving hides it."""
    chapter.locator("main article a.reference[href^='#equation-']").first.hover()
    preview = chapter.locator(".tippy-content")
    expect(preview.locator("mjx-container").first).to_be_visible()
    chapter.mouse.move(1, 1)
    expect(preview).to_have_count(0)
