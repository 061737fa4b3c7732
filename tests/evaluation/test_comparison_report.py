"""The page of a comparison shows its numbers, escapes every name and needs nothing from outside."""

import dataclasses
import html.parser
import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_comparison import SETTINGS, images, run

from robustft.evaluation.comparison import ComparedRun, Comparison, Cost, compare_runs
from robustft.evaluation.comparison_report import (
    RunFacts,
    comparison_lines,
    pareto_plane,
    verdict_text,
    write_comparison_report,
)
from robustft.evaluation.intervals import mean_interval
from robustft.evaluation.method_figures import Choice
from robustft.evaluation.outcome import Flag
from robustft.evaluation.report import method_panels

EVIL = "<script>alert('x')</script>"


class Page(html.parser.HTMLParser):
    """Collects the tags and the words of a page and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def comparison(first: str = "one", second: str = "two", **changes: object) -> Comparison:
    cost = Cost(forwards=1234567, backwards=890, seconds=61.0, wall_seconds=185.0, num_trials=3)
    seeds = (images(158, 99), images(162, 101))
    runs: list[ComparedRun] = [
        run(first, *seeds, cost=cost, **changes),
        run(second, images(120, 150), **changes),
        run("three", images(110, 98), **changes),
    ]
    return compare_runs(runs)


def about(name: str, lr: float) -> RunFacts:
    return RunFacts(
        facts={"method": name, "commit": "4f8a10c"},
        command=f"robustft train {name}",
        config={"name": name, "method": {"name": "rft", "lr": lr, "epochs": 5}},
        versions={"torch": "2.15.0"},
    )


DESCRIBED = {"one": about("one", 0.1), "two": about("two", 0.02), "three": about("three", 0.1)}


def interval() -> str:
    """Return Student's interval of run "one": 158 always right, 4 in one of two seeds."""
    low, high = mean_interval([1.0] * 158 + [0.5] * 4 + [0.0] * 38)
    return f"{100 * low:.1f} to {100 * high:.1f}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = write_comparison_report(
        tmp_path_factory.mktemp("page"),
        comparison(),
        described=DESCRIBED,
        title="three runs",
        command="robustft compare one two three",
    )
    assert (path.parent / "plots" / "pareto.png").is_file()
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_says_numbers_facts_and_how_to_repeat_them(page: Page) -> None:
    for part in (
        f"80.00 {interval()} seeds 79.0 to 81.0",
        "\u221220.00",
        "first better",
        "1,234,567",
        "890 backwards",
        "1 min 01 s",
        "3 min 05 s",
        "On the front of clean and Linf/pgd: one, two.",
        "method.lr 0.1 0.02 0.1",
        "4f8a10c",
        "torch 2.15.0",
        "robustft train two",
        "robustft compare one two three",
        "one seed: how much another seed would change is not known of two, three",
        "pgd steps 20",
    ):
        assert part in page.text, part
    # The same in all three runs, or a name: no difference of settings.
    assert "method.epochs" not in page.text


def test_the_page_needs_nothing_from_outside(page: Page) -> None:
    policy = next(m for m in page.named("meta") if m.get("http-equiv"))["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.tags
                   if "xlink:href" not in attributes)  # fmt: skip
    assert page.named("link") == []


def test_the_page_is_accessible(page: Page) -> None:
    assert page.named("html") == [{"lang": "en"}]
    assert all(head.get("scope") in ("col", "row") for head in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    regions = [a for a in page.named("div") if a.get("role") == "region"]
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    sortable = [a for a in page.named("table") if a.get("class") == "sortable"]
    assert len(sortable) == 3


def test_points_of_the_figure_say_their_numbers(tmp_path: Path) -> None:
    path = write_comparison_report(tmp_path, comparison(), described={}, title="t")
    text = path.read_text(encoding="utf-8")
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    titles = [node.text for node in ET.fromstring(svg).iter() if node.tag.endswith("title")]
    # In the order of drawing: what is on the front lies on top.
    assert titles == [
        "three: clean 55.00 %, Linf/pgd 49.00 %; beaten by another run",
        "one: clean 80.00 %, Linf/pgd 50.00 %, mean of 2 seeds; on the front",
        "two: clean 60.00 %, Linf/pgd 75.00 %; on the front",
    ]


def test_every_run_is_labelled_even_where_a_name_is_part_of_another() -> None:
    figure = pareto_plane(comparison("rift", "rift-embedded"))
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert {"rift", "rift-embedded"} <= shown


def test_every_name_is_escaped(tmp_path: Path) -> None:
    flag = Flag(name=EVIL, raised=True, value=1.0, text=EVIL)
    runs = [
        run(EVIL, images(160, 100, flags=[flag]), data=EVIL),
        run("b", images(150, 112), data=EVIL),
    ]
    facts = RunFacts({EVIL: EVIL}, EVIL, {EVIL: EVIL}, {EVIL: EVIL})
    described = {EVIL: facts, "b": about("b", 1.0)}
    path = write_comparison_report(
        tmp_path, compare_runs(runs), described=described, title=EVIL, command=EVIL
    )
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 1, "only our own"
    assert EVIL in Page(text).text


def test_every_run_is_a_tab_with_its_own_figures(tmp_path: Path) -> None:
    rows = [{"trial": EVIL, "stage": EVIL, "epoch": e, "train/loss": 1 / e} for e in (1, 2)]
    panels = list(method_panels({"epochs": rows}, Choice(EVIL)))
    described = {
        EVIL: about("a", 0.1)._replace(panels=panels),
        "two": about("b", 0.2)._replace(panels=panels),
    }
    path = write_comparison_report(
        tmp_path, comparison(EVIL), described={**described, "three": about("c", 0.3)}, title="t"
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<script") == 1, "only our own"
    tabs = [a for a in page.named("button") if a.get("role") == "tab"]
    sections = [a for a in page.named("section") if a.get("class") == "run"]
    assert [tab["aria-controls"] for tab in tabs] == [one["id"] for one in sections]
    # The script shows the tabs: without it the sections stand below one another.
    assert [a for a in page.named("div") if a.get("role") == "tablist" and "hidden" in a]
    assert not any("hidden" in section for section in sections)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {"figure-run-1-training", "figure-run-2-training"} <= set(ids)
    alts = [a["aria-label"] for a in page.named("div") if a.get("role") == "img"]
    assert f"{EVIL}: loss and accuracy against the epoch" in alts
    assert sorted(one.name for one in (tmp_path / "plots").iterdir()) == ["pareto.png"]


def test_labels_of_close_runs_stand_apart() -> None:
    """Twelve runs within a point of each other: all named, on no other label and no other point."""
    found = comparison()
    scores, runs = [], []
    for number in range(12):
        name = f"method-{number}"
        runs.append(dataclasses.replace(found.runs[1], name=name))
        for metric, value in (("clean", 0.60 + 0.004 * (number % 4)), ("Linf/pgd", 0.7)):
            score = found.score("two", metric)
            value += 0.006 * (number // 4)
            estimate = dataclasses.replace(score.estimate, value=value)
            scores.append(score._replace(run=name, estimate=estimate))
    close = dataclasses.replace(found, runs=runs, scores=scores, front=("method-11",))
    figure = pareto_plane(close)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}
    assert set(boxes) == {run.name for run in runs}
    assert not [
        pair for pair in itertools.combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])
    ]
    spots = axes.transData.transform(
        [[100 * close.score(run.name, m).estimate.value for m in ("clean", "Linf/pgd")]
         for run in runs]
    )  # fmt: skip
    assert not [name for name, box in boxes.items() if any(box.contains(*s) for s in spots)]


def test_leaky_runs_and_what_is_left_out_come_first(tmp_path: Path) -> None:
    weaker = images(150, 112, settings={**SETTINGS, "pgd_steps": 10})
    found = compare_runs([run("a", images(160, 100), leaky=True), run("b", weaker)])
    page = Page(
        write_comparison_report(tmp_path, found, described={}, title="t").read_text("utf-8")
    )
    assert page.text.index("leaky: test examples") < page.text.index("Below each number")
    assert "Linf/pgd is not compared: measured in different ways (pgd_steps 20 and 10)" in page.text
    assert page.named("svg") == []
    assert "note: leaky" in comparison_lines(found)


def test_nothing_is_said_where_the_test_and_the_mean_disagree() -> None:
    found = comparison()
    difference = found.differences[0]
    assert verdict_text(found, difference) == "first better"
    assert verdict_text(found, difference._replace(adjusted=0.06)) == "not decided"
    turned = dataclasses.replace(difference.change, value=0.1)
    assert verdict_text(found, difference._replace(change=turned)) == "not decided"


def test_plain_text_is_aligned_ascii() -> None:
    text = comparison_lines(comparison())
    assert text.isascii()
    table = text.split("\n\n")[0].splitlines()
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    assert f"80.00 ({interval()}; seeds 79.0 to 81.0)" in text
