"""The report in a real browser, Chromium: on a desktop, on a phone, in dark mode, on paper. Skips without Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import make_bank
from report_pages import page_of

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.report.sweep import render_sweep
from rb_gpu.learn.sweep import Member

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
DESK, PHONE, PAPER = {"width": 1280, "height": 800}, {"width": 400, "height": 800}, {"width": 703, "height": 1000}

# pairs of texts in one chart whose boxes touch, and texts that leave the chart's box
COLLISIONS = """() => [...document.querySelectorAll("svg.chart")].flatMap((chart) => {
  const frame = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
  const out = texts.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1
    || b.bottom > frame.bottom + 1).map(([text]) => `${text} leaves its chart`);
  texts.forEach(([text, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
    if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) out.push(`${text} on ${other}`);
  }));
  return out;
})"""
# elements that extend beyond the right edge, except inside a box that scrolls by itself
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((one) =>
  one.getBoundingClientRect().right > innerWidth + 1 && !one.parentElement.closest(".wide"))
  .map((one) => one.outerHTML.slice(0, 80))"""
UNFOLD = "document.querySelectorAll('details').forEach((one) => { one.open = true })"


@dataclass
class Shown:
    """A page, the browser's complaints, and its network requests."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def show(browser) -> Iterator[Callable[..., Shown]]:
    contexts = []

    def opened(path: Path, viewport: dict[str, int] = DESK, **options: Any) -> Shown:
        contexts.append(browser.new_context(viewport=viewport, **options))
        shown = Shown(contexts[-1].new_page())
        shown.page.on("console", lambda message: shown.complaints.append(message.text))
        shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        shown.page.on("dialog", lambda dialog: shown.complaints.append(f"a dialog: {dialog.message}"))
        shown.page.on("request", lambda request: shown.requests.append(request.url))
        shown.page.goto(path.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def every_page(pages, tmp_path_factory) -> dict[str, Path]:
    """The reports of the trainings, one with 4,096 patterns, one with long and hostile names, and one of a sweep."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "large.html").write_text(page_of(ReasoningBank(make_bank(leaves=4096, configs=8)), pages.facts()))
    name, facts = "<script>alert(1)</script>" + 200 * "x", pages.facts()
    facts["data"] |= {"path": name, "files": [name] * 20, "bad_rows": {name: 3, "NaN": 5_000_000}}
    facts["gate"] |= {"promote": False, "refusals": [name, name]}
    facts["drift"]["warnings"] = [name]
    facts["evaluation"]["values"][0]["name"] = "default"
    facts["evaluation"]["warnings"], facts["evaluation"]["tradeoffs"]["configs"][0]["name"] = [name], name
    facts["config"]["registry"]["path"] = name
    (folder / "hostile.html").write_text(page_of(pages.bank, facts))
    members = [
        Member(str(run), [f"cluster.k={2**run}", "judge.cost_weight=0.2"], None, "", 1.0, "default", 0.8, 0.7, 0.9,
               0.01 * run, 0.01 * run - 0.005, 0.01 * run + 0.005, 2**run, run, run > 0, "", 1.5 * run, 500.0)
        for run in range(6)
    ]  # fmt: skip
    members.append(Member("6", ["cluster.k=99999", "judge.cost_weight=0.2"], f"cluster.k=99999 exceeds {name}"))
    (folder / "sweep.html").write_text(render_sweep("night1", members))
    return {"promoted": pages.promoted, "refused": pages.refused, "plain": pages.plain,
            "large": folder / "large.html", "hostile": folder / "hostile.html",
            "sweep": folder / "sweep.html"}  # fmt: skip


@pytest.mark.parametrize("name", ["promoted", "refused", "plain", "large", "hostile", "sweep"])
def test_the_page_is_whole_wide_and_narrow(show, every_page, name):
    for viewport in (PHONE,) if name == "large" else (DESK, PHONE):  # the large report is slow to lay out when unfolded
        shown = show(every_page[name], viewport)
        assert shown.complaints == []
        assert [url for url in shown.requests if not url.startswith(("file:", "data:"))] == []
        assert shown.page.evaluate(OVERFLOWING) == []
        shown.page.evaluate(UNFOLD)
        # regression: captions were as wide as their tables, most of which is reached only by scrolling
        ends = shown.page.evaluate(
            "[...document.querySelectorAll('caption span')].map(e => e.getBoundingClientRect().right)"
        )
        assert max(ends) <= viewport["width"]
        assert shown.page.evaluate(OVERFLOWING) == [] and shown.page.evaluate(COLLISIONS) == []
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(show, every_page, scheme):
    """Checks WCAG AA contrast among other things, with everything unfolded."""
    # the page's own security policy allows no scripts but its own
    for name in ("refused", "sweep"):
        page = show(every_page[name], color_scheme=scheme, bypass_csp=True).page
        page.evaluate(UNFOLD)
        found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]})
        assert [(one["id"], one["nodes"][0]["html"][:120]) for one in found.response["violations"]] == []
        assert any(one["id"] == "color-contrast" for one in found.response["passes"])


def test_no_other_script_runs(show, every_page):
    shown = show(every_page["promoted"])
    shown.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    shown.page.wait_for_timeout(200)
    assert shown.complaints and all("Content Security Policy" in one for one in shown.complaints)


def test_dark_and_paper_have_colours_of_their_own(show, every_page):
    page = show(every_page["promoted"], color_scheme="dark").page
    background = "getComputedStyle(document.body).backgroundColor"
    assert sum(map(int, page.evaluate(background).strip("rgb()").split(","))) < 150
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(background) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("name", ["promoted", "refused", "plain", "hostile"])
def test_on_paper_everything_is_unfolded_and_inside(show, every_page, name):
    page = show(every_page[name], PAPER).page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not(.node):not([open])').length") == 0
    assert page.evaluate("[...document.querySelectorAll('body *')].filter((one) => "
                         "one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"
                         ) == []  # fmt: skip
    assert not page.locator("nav").is_visible() and not page.locator(".filter input").is_visible()
    assert page.locator(".filter output").is_visible()  # the number of verdicts that are printed
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details:not(.node):not([open])').length") > 0
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def column(page: Any, number: int) -> list[str]:
    return page.locator(f"#verdict-table tbody tr > :nth-child({number})").all_text_contents()


def test_the_verdict_table_sorts_by_keyboard(show, every_page):
    page = show(every_page["promoted"]).page
    page.locator("select[name=rows]").select_option("0")
    head = page.locator("#verdict-table th", has_text="trajectories")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    counts = [int(text.replace(",", "")) for text in column(page, 8)]
    assert head.get_attribute("aria-sort") == "descending" and counts == sorted(counts, reverse=True)
    assert len(counts) > 10 and counts[0] > counts[-1]
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [int(text.replace(",", "")) for text in column(page, 8)] == counts[::-1] or sorted(counts)
    # unknown values come last in both directions
    for _ in range(2):
        page.locator("#verdict-table th button", has_text="interval").click()
        known = [text != "–" for text in column(page, 6)]
        assert known == sorted(known, reverse=True)
    assert page.locator("#verdict-table th[aria-sort]").count() == 1


def test_the_verdict_table_filters_and_pages(show, every_page):
    page = show(every_page["large"]).page
    output = page.locator(".filter output")
    assert output.text_content() == "1 to 25 of 4096 patterns" and len(column(page, 1)) == 25
    page.get_by_role("button", name="Next").click()
    assert output.text_content() == "26 to 50 of 4096 patterns"
    page.locator("select[name=verdict]").select_option("acts")
    acting = int(output.text_content().split()[-2])
    assert 0 < acting < 4096 and set(column(page, 2)) == {"acts"}
    page.get_by_label("Find").fill("ef_search=128 ")
    assert 0 < int(output.text_content().split()[-2]) < acting
    assert all("ef_search=128 " in text for text in column(page, 3))
    page.locator("select[name=verdict]").select_option("")
    page.get_by_label("Find").fill("137")
    assert column(page, 1) == ["137"]
    page.get_by_label("Find").fill("no such thing")
    assert output.text_content() == "0 to 0 of 0 patterns" and page.get_by_role("button", name="Back").is_disabled()


def test_the_runs_of_a_sweep_sort(show, every_page):
    page = show(every_page["sweep"]).page
    page.locator("#runs th button", has_text="utility").first.click()
    page.locator("#runs th button", has_text="seconds").click()
    seconds = page.locator("#runs tbody tr > :nth-child(9)").all_text_contents()
    assert seconds == ["7.50", "6.00", "4.50", "3.00", "1.50", "0", "–"]


def test_a_pattern_of_the_map_leads_to_its_row_and_the_tree_folds(show, every_page):
    page = show(every_page["promoted"]).page
    mark = page.locator("#map .chart .dot").last
    title = mark.locator("title").text_content()
    mark.click(force=True)
    assert column(page, 1) == [title.split()[1].rstrip(":")]
    first = page.locator(".tree details").first
    assert first.get_attribute("open") is not None
    first.locator("summary").first.press("Enter")
    assert first.get_attribute("open") is None


def test_without_scripts_every_row_is_there(show, every_page):
    page = show(every_page["promoted"], java_script_enabled=False).page
    assert page.locator("#verdict-table tbody tr").count() > 10 and not page.locator(".filter").is_visible()
