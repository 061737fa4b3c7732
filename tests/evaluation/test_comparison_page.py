"""The page of a comparison in a browser: no error, no network, readable, usable by keyboard.

It is shown on a desktop, on a phone and on paper, in light and in dark.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_comparison_report import DESCRIBED, comparison
from test_instance_report import shown as drawn_map
from test_instance_report import summary
from test_surface_plots import bowl

from browser import browser_page
from robustft.evaluation.comparison_report import write_comparison_report
from robustft.evaluation.method_figures import FIGURES, Choice
from robustft.evaluation.report import Panel, method_panels
from robustft.evaluation.surface_plots import surface_figure

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1280, 800), (390, 844)
LEAST_CONTRAST = 4.5
"""Of text to its ground: WCAG 2.2, level AA."""

CONTRASTS = """() => {
  const numbers = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length === 3 ? [...found, 1] : found;
  };
  const over = (top, below) => below.map((value, k) => top[3] * top[k] + (1 - top[3]) * value);
  const linear = value => value <= 10 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const weights = [0.2126, 0.7152, 0.0722];
  const light = color => color.reduce((sum, value, k) => sum + weights[k] * linear(value), 0);
  const ground = element => {
    if (element === null) return [255, 255, 255];
    return over(numbers(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    const drawn = element.closest("svg, script, style") !== null;
    if (text === "" || drawn || !element.checkVisibility()) continue;
    const below = ground(element), color = over(numbers(getComputedStyle(element).color), below);
    const [high, low] = [light(color), light(below)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
  }
  return found;
}"""
"""Gives [contrast to the ground, text] of every text that is shown; drawings are not text."""

FOCUSED = """() => {
  const element = document.activeElement, style = getComputedStyle(element);
  return {
    stop: [...document.querySelectorAll("*")].indexOf(element),
    name: element.tagName,
    role: element.getAttribute("role"),
    outline: style.outlineStyle,
    width: parseFloat(style.outlineWidth),
  };
}"""
"""Gives what has the focus and how that is seen."""


@dataclasses.dataclass
class Shown:
    """The page in a browser, and what was wrong with it."""

    page: Any
    url: str
    errors: list[str]
    requests: list[str]

    def load(self, size: tuple[int, int], **media: str) -> Any:
        """Load it anew at a size, in pixels, for a medium and a colour scheme."""
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.emulate_media(**{"media": "screen", "color_scheme": "light", **media})
        self.page.goto(self.url)
        return self.page


def every_panel() -> list[Panel]:
    """Return all figures that a run can have on this page, of small rows."""
    epochs = [
        {
            "trial": "a",
            "epoch": epoch,
            "train/loss": 1 / epoch,
            "val/clean": 0.7,
            "lr": 0.1 / epoch,
            "lambda1": 0.2 * epoch,
            "lambda2": 6 - epoch,
            "sampler/Linf_share": 0.4,
            "sampler/L1_share": 0.6,
            "sampler/Linf_error": 0.3,
            "sampler/L1_error": 0.9 - 0.1 * epoch,
            "mask/kept": 0.6,
            "mask/kept_attention": 0.5,
            "mask/kept_ffn": 0.7,
            "mask/churn": 0.3 / epoch,
        }
        for epoch in (1, 2, 3)
    ]
    curve = [
        {"trial": "a", "alpha": alpha, "clean": 0.7 + alpha / 10, "robust": 0.5 - alpha / 20}
        for alpha in (0.0, 0.5, 1.0)
    ]
    layers = [
        {"layer": name, "index": index, "criticality": 0.1 * index, "accuracy_drop": 2.0 * index}
        for index, name in enumerate(("conv1", "layer1.0.conv1", "layer2.0.shortcut.0", "linear"))
    ]
    tables = {"epochs": epochs, "interpolation": curve, "criticality": layers}
    panels = list(method_panels(tables, Choice("a", alpha=0.5, tolerance=0.01)))
    surfaces = surface_figure({"start": bowl(), "result": bowl(depth=0.2)})
    panels += [
        Panel("data-map", drawn_map(summary()), "training instances", "Of 30 instances.", None),
        Panel("loss-surface", surfaces, "loss as a surface", "Height and colour: loss.", None),
    ]
    assert [panel.name for panel in panels] == [*FIGURES, "data-map", "loss-surface"]
    return panels


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with browser_page() as page:
        described = {
            "one": DESCRIBED["one"]._replace(panels=every_panel()),
            # A long name shall break, a long command shall not widen the page.
            "two": DESCRIBED["two"]._replace(command="robustft train " + "x" * 300),
            "three": DESCRIBED["three"],
        }
        path = write_comparison_report(
            tmp_path_factory.mktemp("page"),
            comparison(),
            described=described,
            title="three runs",
            command="robustft compare one two three",
        )
        result = Shown(page, path.as_uri(), [], [])
        page.on("pageerror", lambda error: result.errors.append(str(error)))
        page.on(
            "console",
            lambda line: (
                result.errors.append(line.text) if line.type in ("error", "warning") else None
            ),
        )
        page.on("request", lambda request: result.requests.append(request.url))
        yield result
        # What came while the tests sorted, hovered and pressed keys is an error too.
        assert result.errors == []
        assert set(result.requests) == {result.url}


def open_panels(page: Any) -> list[str]:
    return [
        str(one.get_attribute("id"))
        for one in page.locator("section.run").all()
        if one.is_visible()
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_text_has_enough_contrast_and_fits(
    shown: Shown, size: tuple[int, int], scheme: str
) -> None:
    page = shown.load(size, color_scheme=scheme)
    for number in range(3):
        page.locator("[role=tab]").nth(number).click()
        found = page.evaluate(CONTRASTS)
        assert len(found) > 100, "texts were looked at"
        assert [one for one in found if one[0] < LEAST_CONTRAST] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_no_error_and_no_request(shown: Shown) -> None:
    shown.load(DESKTOP)
    shown.load(PHONE, color_scheme="dark")
    shown.load(DESKTOP, media="print")
    assert shown.errors == []
    assert set(shown.requests) == {shown.url}


def test_paper_shows_every_run_and_no_tabs(shown: Shown) -> None:
    page = shown.load(DESKTOP, media="print")
    assert open_panels(page) == ["run-1", "run-2", "run-3"]
    assert not page.locator("[role=tablist]").is_visible()
    assert all(one.is_visible() for one in page.locator("section.run h3").all())
    found = page.evaluate(CONTRASTS)
    assert [one for one in found if one[0] < LEAST_CONTRAST] == []


def test_without_javascript_every_run_is_shown(shown: Shown) -> None:
    context = shown.page.context.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(shown.url)
    assert open_panels(page) == ["run-1", "run-2", "run-3"]
    assert not page.locator("[role=tablist]").is_visible()
    assert all(one.is_visible() for one in page.locator("section.run h3").all())
    context.close()


def test_tabs_by_keyboard(shown: Shown) -> None:
    page = shown.load(DESKTOP)
    assert open_panels(page) == ["run-1"]
    page.locator("[role=tab]").first.focus()
    for key, number in (
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowRight", 1),
        ("ArrowLeft", 3),
        ("Home", 1),
        ("End", 3),
    ):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{number}", key
        assert open_panels(page) == [f"run-{number}"], key
        states = [one.get_attribute("aria-selected") for one in page.locator("[role=tab]").all()]
        assert states == [str(one == number).lower() for one in (1, 2, 3)]
    # Tab leaves the list for the panel that is shown, which the tab names.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "run-3"
    panel = page.locator("#run-3")
    assert (panel.get_attribute("role"), panel.get_attribute("aria-labelledby")) == (
        "tabpanel",
        "tab-3",
    )


def test_tables_sort_by_keyboard(shown: Shown) -> None:
    page = shown.load(DESKTOP)
    table = page.locator("table.sortable").first
    head = table.locator("thead th", has_text="clean (%)").first
    names = table.locator("tbody th")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [text.strip() for text in names.all_inner_texts()] == ["three", "two", "one"]
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert [text.strip() for text in names.all_inner_texts()] == ["one", "two", "three"]
    assert page.locator("th[aria-sort]").count() == 1


def test_what_has_the_focus_is_seen(shown: Shown) -> None:
    page = shown.load(DESKTOP)
    stops = []
    for _ in range(200):
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUSED)
        if stop["name"] == "BODY" or stop["stop"] in [one["stop"] for one in stops]:
            break
        stops.append(stop)
    assert len(stops) > 30
    assert [one for one in stops if one["outline"] == "none" or one["width"] < 2] == []
    assert sum(one["role"] == "tab" for one in stops) == 1, "one stop for all tabs"


def test_every_figure_of_a_run_is_seen(shown: Shown) -> None:
    page = shown.load(DESKTOP)
    figures = page.locator("#run-1 figure")
    assert figures.count() == len(every_panel())
    for figure in figures.all():
        box = figure.locator("svg").first.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 100


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_points_say_their_numbers(shown: Shown, size: tuple[int, int]) -> None:
    page = shown.load(size)
    points, tip = page.locator("#figure-pareto g[role=img]"), page.locator(".tip")
    said = ["three: clean 55.00 %", "one: clean 80.00 %", "two: clean 60.00 %"]
    assert points.count() == len(said)
    for point, text in zip(points.all(), said, strict=True):
        # Of its own accord the pointer would wait until nothing else lies above the point.
        point.hover()
        assert tip.inner_text().startswith(text)
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
        page.locator("h1").hover()
        assert not tip.is_visible(), text
        point.focus()
        assert tip.inner_text().startswith(text)
        page.keyboard.press("Escape")
        assert not tip.is_visible(), text


def test_the_page_is_small(shown: Shown) -> None:
    # One run has every figure there is, which no run of a single method has.
    path = Path(shown.url.removeprefix("file://"))
    assert path.stat().st_size < 600_000
