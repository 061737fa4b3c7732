"""``robustft compare`` and ``robustft report`` on small stored runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from robustft.compare_verb import Compare, Report, compare_stored, report_again
from robustft.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent / "runtime"))
from test_stored_runs import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    storage = tmp_path_factory.mktemp("runs") / "toy"
    one, other = storage / "20260101-000000-abcdef", storage / "20260102-000000-fedcba"
    write_run(one)
    shutil.copytree(one, other)
    (other / "masks" / "seed-0.parquet").unlink()
    shutil.copy(one / "masks" / "start.parquet", other / "masks" / "seed-0.parquet")
    summary = json.loads((other / "summary.json").read_text(encoding="utf-8"))
    summary["run_id"] = other.name
    (other / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return one, other


def test_compare_writes_a_page_and_a_document(runs: tuple[Path, Path], tmp_path: Path) -> None:
    answer = compare_stored(Compare(runs=runs, output=tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "plots" / "pareto.png").is_file()
    document = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert document["folders"] == {"toy abcdef": str(runs[0]), "toy fedcba": str(runs[1])}
    clean = document["differences"][0]
    # Of the two seeds only the first differs: 40 right in place of 41.
    assert (clean["metric"], clean["lost"], clean["gained"]) == ("clean", 1, 0)
    assert clean["change"]["value"] == pytest.approx(-1 / 120)
    assert document["runs"][0]["cost"]["num_trials"] == 4
    assert isinstance(answer.text, str)
    assert answer.text.rstrip().endswith("report.html")
    assert "toy fedcba" in answer.text
    json.dumps(answer.document)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for number in (1, 2):
        # As on the page of the run, whose stored rows these are.
        for name in ("interpolation", "criticality", "training"):
            assert f'id="figure-run-{number}-{name}"' in text
    assert "Measured on the val split." in text


def test_names_and_metrics_can_be_chosen(runs: tuple[Path, Path], tmp_path: Path) -> None:
    verb = Compare(runs=runs, names=("old", "new"), metrics=("Linf/pgd",), output=tmp_path)
    document = compare_stored(verb).document
    assert list(document["folders"]) == ["old", "new"]
    assert {one["metric"] for one in document["scores"]} == {"Linf/pgd"}


def test_report_makes_the_pages_again(runs: tuple[Path, Path]) -> None:
    page = runs[0] / "report.html"
    page.unlink()
    answer = report_again(Report(runs=runs[:1]))
    assert page.is_file()
    assert answer.document == {"reports": [{"report": str(page)}]}
    assert "stays as it is" in str(answer.text)


def test_a_wrong_folder_stops_before_anything_is_written(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    page = runs[0] / "report.html"
    before = page.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="nowhere is no run folder"):
        report_again(Report(runs=(runs[0], tmp_path / "nowhere")))
    assert page.stat().st_mtime_ns == before


def test_bad_options_are_one_sentence(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="at least two runs"):
        compare_stored(Compare(runs=runs[:1], output=out))
    with pytest.raises(ConfigError, match="2 runs need as many different names"):
        compare_stored(Compare(runs=runs, names=("a", "a"), output=out))
    with pytest.raises(ConfigError, match="is named twice"):
        compare_stored(Compare(runs=(runs[0], runs[0]), output=out))
    with pytest.raises(ConfigError, match="name at least one run"):
        report_again(Report(runs=()))
    assert not out.exists()
