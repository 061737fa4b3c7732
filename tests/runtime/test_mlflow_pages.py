"""What a user sees in MLflow of runs of several methods: table, charts, comparison, registry.

With ROBUSTFT_PICTURES=docs/images these tests renew the pictures of docs/mlflow.md:

    ROBUSTFT_PICTURES=docs/images python -m pytest -m browser tests/runtime/test_mlflow_pages.py
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from recorded import METHOD_NUMBERS, record_comparison
from serving import closed_port, served

from browser import browser_page, picture
from robustft.runtime.tracking import UI_VIEW
from robustft.runtime.views import view_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # SQLAlchemy 2.1 deprecates a loader that MLflow 3.17 uses.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

MODEL = "robustft-fashion_mnist_mini-Linf-0.1"


@dataclasses.dataclass
class Pages:
    """The UI on a store of one searched run per method, in a browser."""

    page: Any
    base: str
    experiment: str
    runs: dict[str, str]  # name of a parent run -> its id
    loads: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def open(self, path: str, *texts: str) -> str:
        """Go to a page, wait until it shows all ``texts``, and return everything that it says."""
        # Another query each time: else only what is behind the # changes and nothing is loaded.
        self.page.goto(f"{self.base}/?load={next(self.loads)}{path}")
        self.page.get_by_text(texts[0]).first.wait_for()
        # It opens by itself and covers a quarter of the page.
        assistant = self.page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
        if assistant.count():
            assistant.first.click()
        for text in texts:
            self.page.get_by_text(text).first.wait_for()
        # Drawings come after texts.
        self.page.wait_for_timeout(2000)
        return str(self.page.inner_text("body"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    with browser_page(width=1600, height=800) as page:
        storage = tmp_path_factory.mktemp("runs")
        record_comparison(storage)
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
        experiment = client.get_experiment_by_name("compare")
        found = client.search_runs([experiment.experiment_id], "tags.kind = 'experiment'")
        runs = {run.info.run_name: run.info.run_id for run in found}
        with closed_port() as port:
            pass
        with served(storage, port):
            yield Pages(page, f"http://127.0.0.1:{port}", experiment.experiment_id, runs)


def test_the_table_shows_one_named_run_per_method(pages: Pages, tmp_path: Path) -> None:
    path = view_page(pages.experiment, "robustft-runs")
    text = pages.open(path, *pages.runs, "test/clean", "method.lr", "table 1")
    assert sorted(name.split()[0] for name in pages.runs) == sorted(METHOD_NUMBERS)
    for column in ("test/robust", "val/clean", "val/robust"):
        assert column in text
    # Trials have a view of their own.
    assert "lr=0.01" not in text
    picture(pages.page, "mlflow_runs", tmp_path)


def test_the_table_of_trials(pages: Pages, tmp_path: Path) -> None:
    path = view_page(pages.experiment, "robustft-trials")
    text = pages.open(path, "autolora lr=0.01", "val/robust")
    assert "method.lr" in text
    assert not [name for name in pages.runs if name in text]


def test_the_charts_show_the_trade_off_and_parallel_coordinates(
    pages: Pages, tmp_path: Path
) -> None:
    path = view_page(pages.experiment, "robustft-runs")
    text = pages.open(f"{path}&compareRunsMode=CHART", "Comparison")
    pages.page.locator(".scatterlayer .point").first.wait_for()
    for name in ("test/clean", "test/robust"):
        assert name in text
    picture(pages.page, "mlflow_charts", tmp_path)


def test_the_compare_page_shows_parameters_and_metrics(pages: Pages, tmp_path: Path) -> None:
    runs, experiments = (
        quote(json.dumps(list(pages.runs.values()))),
        quote(json.dumps([pages.experiment])),
    )
    path = f"#/compare-runs?runs={runs}&experiments={experiments}&{UI_VIEW[1:]}"
    text = pages.open(path, "Parallel Coordinates Plot", "change/clean", "method.lr")
    # The table of metrics draws only its first rows until it is scrolled.
    for name in (*pages.runs, "task.eps.Linf", "change/Linf/apgd", "start/robust"):
        assert name in text
    # What is drawn before anything is chosen: validation, not the first name of the alphabet.
    plot = text[: text.index("Run details")]
    assert "val/clean" in plot
    assert "start/clean" not in plot
    picture(pages.page, "mlflow_compare", tmp_path)


def test_a_run_shows_its_table(pages: Pages, tmp_path: Path) -> None:
    (run,) = (run for name, run in pages.runs.items() if name.startswith("rift"))
    text = pages.open(
        f"#/experiments/{pages.experiment}/runs/{run}{UI_VIEW}", "corruptions", "change"
    )
    assert "Linf/apgd" in text
    picture(pages.page, "mlflow_run", tmp_path)


def test_the_registry_shows_the_aliases(pages: Pages, tmp_path: Path) -> None:
    version = f"Version {len(METHOD_NUMBERS)}"
    text = pages.open(f"#/models/{MODEL}{UI_VIEW}", version)
    # The description, above, names the aliases as well.
    versions = text[text.index(version) :]
    assert ": autolora" in versions
    newest, _, older = versions.partition("Version 4")
    for alias in ("best-robust", "best-union", "newest"):
        assert alias in newest
    assert "best-clean" not in newest
    assert "best-clean" in older
    picture(pages.page, "mlflow_registry", tmp_path)
