"""The pages in a real browser, from disk: nothing fails, nothing is fetched, nothing is cut off, nothing is unreadable.

Skipped where there is no Chromium, unless SPARRING_REQUIRE_BROWSER=1: then a missing one is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report_fixtures import HOSTILE, write_comparison, write_run
from sparring.report import write_report

pytestmark = pytest.mark.slow

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
KINDS = ("run", "comparison")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests: $SPARRING_CHROMIUM, or what the system has."""
    found = os.environ.get("SPARRING_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        message = "no Chromium: `apt-get install chromium`, or SPARRING_CHROMIUM=FILE"
        if os.environ.get("SPARRING_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, and one of a run whose warm start was exported."""
    run, comparison, kept = (tmp_path_factory.mktemp(name) for name in ("run", "comparison", "kept"))
    write_run(run)
    write_comparison(comparison)
    write_run(kept, best="warm start", evidence=False, audit=False)
    return {"run": write_report(run), "comparison": write_report(comparison), "kept": write_report(kept)}


@pytest.fixture
def look(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Open a page; at the end, no console message, no error and no request but the page's own may have happened."""
    heard: list[str] = []
    opened = []

    def open_page(kind: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("requestfailed", lambda request: heard.append(f"failed: {request.url}"))
        address = pages[kind].as_uri()
        page.on("request", lambda request: request.url in (address, "data:,") or heard.append(f"asked: {request.url}"))
        page.goto(address)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert heard == []


def show_all(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize(
    ("kind", "scheme"), [*((kind, "light") for kind in (*KINDS, "kept")), *((kind, "dark") for kind in KINDS)]
)
def test_no_accessibility_rule_is_broken(kind: str, scheme: str, look: Any) -> None:
    """axe-core with everything unfolded: all its rules in the light, contrast again in the dark."""
    from axe_playwright_python.sync_playwright import Axe

    page = look(kind, color_scheme=scheme)
    show_all(page)
    only = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}
    result = Axe().run(page, options={"resultTypes": ["violations"], **only})
    found = [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in result.response["violations"]]
    assert found == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(kind: str, width: int, look: Any) -> None:
    page = look(kind, viewport={"width": width, "height": 800})
    show_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('svg, p, li, summary, h1, h2, h3, figcaption')]"
    wide += ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.scroll'))"
    wide += ".map(e => e.outerHTML)"
    assert page.evaluate(wide) == []


def luminance(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(", "))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("kind", KINDS)
def test_both_colour_schemes_reach_the_figures(kind: str, look: Any) -> None:
    style = "e => getComputedStyle(document.querySelector(e[0]))[e[1]]"
    for scheme, darker in (("light", False), ("dark", True)):
        page = look(kind, color_scheme=scheme)
        back = luminance(page.evaluate(style, ["body", "backgroundColor"]))
        text = luminance(page.evaluate(style, ["svg text", "fill"]))
        assert (back < 60, text > 180) == (darker, darker), scheme


@pytest.mark.parametrize("kind", KINDS)
def test_printing_shows_what_is_folded(kind: str, look: Any) -> None:
    """On paper nothing can be opened: passages of a folded query are there, on white, in black."""
    page = look(kind, color_scheme="dark")
    seen = "[...document.querySelectorAll('.query-body')].filter(e => e.checkVisibility()).length"
    assert page.evaluate(seen) == 0
    page.emulate_media(media="print")
    assert page.evaluate(seen) == page.locator(".query-body").count() > 10
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
    assert len(page.pdf(format="A4")) > 50_000


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_is_shown_as_text(kind: str, look: Any) -> None:
    page = look(kind)
    show_all(page)
    assert HOSTILE in page.inner_text("body")
    assert page.locator("script").count() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_drawn(kind: str, look: Any) -> None:
    page = look(kind)
    sizes = page.evaluate("[...document.querySelectorAll('.panel svg')].map(e => e.getBoundingClientRect().height)")
    assert len(sizes) >= 8
    assert min(sizes) > 60
    inside = "[...document.querySelectorAll('.panel svg')].flatMap(s => { const b = s.getBoundingClientRect();"
    inside += "return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
    inside += "return r.left < b.left - 2 || r.right > b.right + 2 }).map(t => t.textContent) })"
    assert page.evaluate(inside) == [], "labels that are cut off"


def test_links_of_the_contents_lead_to_sections(look: Any) -> None:
    page = look("run")
    for link in page.locator("nav a").all():
        link.click()
        target = page.evaluate("location.hash").removeprefix("#")
        assert page.locator(f"section#{target} h2").count() == 1
