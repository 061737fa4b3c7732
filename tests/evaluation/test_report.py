"""The page and the terminal's table say what was measured, no more, and escape every name."""

import dataclasses
import html.parser
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from robustft.errors import ResourceError
from robustft.evaluation.report import (
    Estimate,
    ReportData,
    Stage,
    SummaryRow,
    console_table,
    summary_lines,
    summary_row,
    verdict,
    write_report,
    write_summary,
)

NO_TABLES: dict[str, Any] = dict.fromkeys(
    ("trials", "criticality", "interpolation", "epochs", "corruptions"), ()
)
EVIL = "<script>alert('x')</script>"


def estimate(value: float, margin: float = 0.01, n: int = 10_000) -> Estimate:
    return Estimate(value=value, low=value - margin, high=value + margin, n=n)


def robust_row(change: float, margin: float, name: str = "PGD-20, Linf 8/255") -> SummaryRow:
    return SummaryRow(
        name=name,
        kind="robust",
        before=estimate(0.5363),
        after=estimate(0.5363 + change),
        change=estimate(change, margin),
    )


CLEAN_ROW = SummaryRow(
    name="Clean",
    kind="clean",
    before=Estimate(value=0.8146, low=0.8069, high=0.8221, n=10_000),
    after=Estimate(value=0.8344, low=0.8270, high=0.8416, n=10_000),
    change=Estimate(value=0.0198, low=0.0150, high=0.0246, n=10_000),
)


def report(**changes: Any) -> ReportData:
    curve = [
        {
            "trial": "t1",
            "alpha": index / 10,
            "clean": 0.8146 + 0.002 * index,
            "robust": 0.5363 - 0.0001 * max(0, index - 6),
        }
        for index in range(11)
    ]
    trials = [
        {"trial": "t0", "layer": "linear", "lr": 0.01, "val/clean": 0.82, "val/robust": 0.536},
        {"trial": "t1", "layer": "layer2.1.conv2", "lr": 0.001, "val/clean": 0.8286,
         "val/robust": 0.5362},
    ]  # fmt: skip
    layers = ("conv1", "layer2.1.conv2", "linear")
    data = ReportData(
        title="rift-cifar10",
        sentence="One layer of an adversarially trained ResNet-18 was fine-tuned.",
        run_id="20260214-101502-3fd2a9",
        created="2026-02-14 10:15 UTC",
        commit="990669d",
        command="robustft search rift-cifar10 --method.lr 0.001",
        versions={"torch": "2.15.0"},
        config={"method": {"name": "rift", "alphas": (0.0, 1.0)}},
        summary=(CLEAN_ROW, robust_row(0.0002, 0.0008)),
        chosen={"trial": "t1", "alpha": 0.7, "layer": "layer2.1.conv2", "lr": 0.001},
        tolerance=0.001,
        stages=(Stage(name="search", seconds=185.2, num_forwards=1_200_000, num_backwards=90),),
        wall_seconds=190.0,
        overhead=0.08,
        trials=trials,
        criticality=[
            {"layer": name, "index": i, "criticality": 0.1 * 9**i, "accuracy_drop": 3.0, "n": 500}
            for i, name in enumerate(layers)
        ],
        interpolation=curve,
        epochs=[{"trial": "t1", "epoch": 1, "train/loss": 0.6, "tuned/clean": 0.83}],
        corruptions=[{"corruption": "fog", "before": 0.45, "after": 0.46}],
        run_directory="runs/rift-cifar10/20260214-101502-3fd2a9",
        report_path="runs/rift-cifar10/20260214-101502-3fd2a9/report.html",
        tracking_url="http://127.0.0.1:5000/#/experiments/1/runs/abc",
    )
    return dataclasses.replace(data, **changes)


class Page(html.parser.HTMLParser):
    """Collects what a test asks about a page."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(tmp_path: Path, data: ReportData) -> Page:
    return Page(write_report(tmp_path, data).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default report, written once."""
    return write_report(tmp_path_factory.mktemp("report"), report()).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_says_the_numbers_the_choice_and_how_to_repeat_it(page: Page, folder: Path) -> None:
    assert page.open == [], "every element is closed"
    for part in (
        "81.46 80.7 to 82.2",
        "83.44 82.7 to 84.2",
        "+1.98 +1.50 to +2.46",
        "10,000",
        "layer2.1.conv2",
        "learning rate 0.001",
        "alpha 0.7",
        "Robustness kept.",
        "robustft search rift-cifar10 --method.lr 0.001",
        "990669d",
        "2.15.0",
        "3 min 05 s",
        "8.0 %",
        "1,200,000",
        "name: rift",
    ):
        assert part in page.text, part
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "corruptions.png",
        "criticality.png",
        "interpolation.png",
        "training.png",
        "trials.png",
    ]


def test_page_needs_nothing_from_outside(page: Page) -> None:
    policy = next(m for m in page.named("meta") if m.get("http-equiv"))["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert not any("src" in attributes for _, attributes in page.tags)
    assert page.named("link") == []
    assert [a["href"] for a in page.named("a")] == [report().tracking_url]


def test_page_is_accessible(page: Page) -> None:
    assert page.named("html") == [{"lang": "en"}]
    assert any(m.get("name") == "viewport" for m in page.named("meta"))
    assert all(head.get("scope") in ("col", "row") for head in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    images = [a for a in page.named("div") if a.get("role") == "img"]
    assert len(images) == len(page.named("svg")) == 5
    assert all(image["aria-label"] for image in images)
    regions = [a for a in page.named("div") if a.get("role") == "region"]
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_name_is_escaped(tmp_path: Path) -> None:
    clean = report()
    evil = report(
        title=EVIL,
        sentence=EVIL,
        run_id=EVIL,
        created=EVIL,
        commit=EVIL,
        command=EVIL,
        versions={EVIL: EVIL},
        config={EVIL: EVIL},
        summary=(dataclasses.replace(CLEAN_ROW, name=EVIL), robust_row(0, 0, EVIL)),
        chosen={"trial": EVIL, "alpha": 0.7, "layer": EVIL, EVIL: EVIL},
        selection_split=EVIL,
        report_split=EVIL,
        warnings=(EVIL,),
        stages=(Stage(name=EVIL, seconds=1.0),),
        trials=[{**row, "trial": f"{EVIL}{i}", EVIL: i} for i, row in enumerate(clean.trials)],
        criticality=[{**row, "layer": EVIL} for row in clean.criticality],
        interpolation=[{**row, "trial": EVIL, EVIL: EVIL} for row in clean.interpolation],
        epochs=[{**row, "stage": EVIL, "trial": EVIL} for row in clean.epochs],
        corruptions=[{**row, "corruption": EVIL} for row in clean.corruptions],
        run_directory=EVIL,
        tracking_url="javascript:alert(1)",
    )
    text = write_report(tmp_path, evil).read_text(encoding="utf-8")
    assert text.count("<script") == 1, "only our own"
    assert EVIL in Page(text).text
    assert Page(text).named("a") == [], "only http(s) becomes a link"
    assert "javascript:alert(1)" in Page(text).text


def test_chosen_trial_and_constant_columns(tmp_path: Path) -> None:
    trials = [{**row, "bn_mode": "frozen", "error": None} for row in report().trials]
    page = page_of(tmp_path, report(trials=trials))
    assert page.text.count("t1 chosen") == 1
    assert "The same in all rows: bn mode frozen." in page.text


def test_leaky_numbers_carry_a_badge(page: Page, tmp_path: Path) -> None:
    leaky = report(leaky=True)
    marked = page_of(tmp_path, leaky)
    badges = [a for a in marked.named("span") if a.get("class") == "badge"]
    # Warning, verdict, choice, 2 rows x (after, change), 3 figures, trials heading, 2 columns.
    assert len(badges) == 3 + 4 + 3 + 1 + 2
    assert "83.44 leaky 82.7 to 84.2" in marked.text
    assert "+1.98 leaky" in marked.text
    clean_line = next(line for line in summary_lines(leaky).splitlines() if "Clean" in line)
    assert clean_line.count("(leaky)") == 2
    assert not [a for a in page.named("span") if a.get("class") == "badge"]
    assert "leaky" not in page.text + summary_lines(report())


def test_warnings_come_before_the_numbers(tmp_path: Path) -> None:
    page = page_of(tmp_path, report(warnings=("the attack may be too weak",), **NO_TABLES))
    assert page.text.index("the attack may be too weak") < page.text.index("81.46")


def test_a_run_without_search_or_tables_has_a_page(tmp_path: Path) -> None:
    bare = report(
        chosen={},
        stages=(),
        wall_seconds=None,
        overhead=None,
        tracking_url=None,
        summary=(dataclasses.replace(CLEAN_ROW, before=None, change=None),),
        **NO_TABLES,
    )
    page = page_of(tmp_path, bare)
    assert "not measured" in page.text
    assert "How it came about" not in page.text
    assert "What it cost" not in page.text
    assert page.named("svg") == []
    assert "nothing" in summary_lines(bare)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ([(0.0002, 0.0008)], "kept"),
        ([(-0.0005, 0.0005)], "kept"),
        ([(0.0, 0.002)], "open"),
        ([(-0.01, 0.002)], "lost"),
        ([(0.01, 0.002), (-0.01, 0.002)], "lost"),
        ([(0.01, 0.002), (0.0, 0.002)], "open"),
        ([(0.0, float("inf"))], "open"),
    ],
)
def test_verdict_follows_the_intervals(changes: list[tuple[float, float]], state: str) -> None:
    rows = tuple(robust_row(change, margin) for change, margin in changes)
    assert verdict(report(summary=rows)).state == state


def test_verdict_without_data_claims_nothing() -> None:
    bare = dataclasses.replace(robust_row(0.0, 0.0), change=None)
    assert verdict(report(summary=(CLEAN_ROW,))).state == "unmeasured"
    assert verdict(report(summary=(bare,))).state == "open"


def test_alpha_zero_is_the_start() -> None:
    same = (robust_row(0.0, 0.05),)
    assert verdict(report(summary=same, chosen={"alpha": 0.0})).state == "unchanged"
    assert verdict(report(summary=same, chosen={"alpha": 0.1})).state == "open"


def test_summary_row_from_masks() -> None:
    before = np.array([True] * 800 + [False] * 200)
    after = np.array([True] * 780 + [False] * 20 + [True] * 50 + [False] * 150)
    row = summary_row("Clean", "clean", before, after)
    assert row.before is not None
    assert row.after is not None
    assert row.change is not None
    assert (row.before.value, row.after.value) == (0.8, 0.83)
    assert row.change.value == pytest.approx(0.03)
    assert row.change.low < 0.03 < row.change.high
    width = row.change.high - row.change.low
    assert width < 0.8 * (row.after.high - row.after.low), "pairing must pay"


def test_summary_row_from_means_per_image() -> None:
    generator = np.random.default_rng(0)
    before = generator.random(500)
    row = summary_row("Corruptions", "corruptions", before, np.clip(before + 0.02, 0, 1))
    assert row.before is not None
    assert 0 <= row.before.low < row.before.value < row.before.high <= 1
    assert row.change is not None
    assert row.change.low > 0


def test_no_disagreement_is_not_certainty() -> None:
    mask = np.arange(300) % 3 > 0
    change = summary_row("PGD", "robust", mask, mask).change
    assert change is not None
    assert change.value == 0
    assert change.high == pytest.approx(3 / 300, rel=0.01)
    assert change.low == -change.high


def test_plain_summary_is_aligned_ascii() -> None:
    text = summary_lines(report())
    assert text.isascii()
    header, *rows = text.splitlines()[1:4]
    assert all(len(row) == len(header) for row in rows)
    assert "83.44 [82.7 to 84.2]" in text
    assert "+1.98 [+1.50 to +2.46]" in text
    assert "chosen: layer layer2.1.conv2, learning rate 0.001, alpha 0.7" in text
    assert "report: runs/rift-cifar10/20260214-101502-3fd2a9/report.html" in text
    assert "MLflow run: http://127.0.0.1:5000" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_table_and_a_pipe_gets_text() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    write_summary(report(), pipe)
    write_summary(report(), terminal)
    assert pipe.getvalue() == summary_lines(report())
    assert "\u2502" in terminal.getvalue()


def test_console_table_fits_80_columns_and_reads_no_markup() -> None:
    stream = io.StringIO()
    rows = (dataclasses.replace(CLEAN_ROW, name="[b]Clean[/b]"), robust_row(0.0, 0.001))
    console = Console(file=stream, width=80)
    console.print(console_table(report(summary=rows, leaky=True)))
    text = stream.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "[b]Clean[/b]" in text
    assert re.search(r"\[\+1\.50 to \+2\.46\]", text)
    assert text.count("(leaky)") == 4


def test_an_unwritable_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ResourceError, match=r"cannot write .*report\.html"):
        write_report(tmp_path, report(**NO_TABLES))
