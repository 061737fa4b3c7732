"""The verbs ``robustft compare`` and ``robustft report``: finished runs, read from their folders.

Nothing is trained or evaluated again, but by ``robustft compare --preset``, which hands over to the
script ``experiments/compare_methods.py`` of a checkout. torch is imported only when they run, so
that ``robustft --help`` is quick.
"""

import collections
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustft.errors import ConfigError, ResourceError
from robustft.verbs import Answer, Flag, Options

if TYPE_CHECKING:
    from robustft.evaluation.comparison_report import RunFacts
    from robustft.runtime.stored_runs import StoredRun

__all__ = ["Compare", "Report", "compare_stored", "report_again"]

SCRIPT = Path("experiments") / "compare_methods.py"
"""What trains and compares all methods by one protocol; in a checkout, not in the wheel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Options):
    """Compare finished runs example by example: differences, tests, Pareto front, cost.

    With --preset all methods are trained and compared by one protocol (docs/comparison.md).

    Example: robustft compare runs/rift-embedded/RUN_ID runs/at-embedded/RUN_ID --output compared/
    """

    runs: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN_DIR RUN_DIR [RUN_DIR ...]")]
    ] = ()
    """Folders of at least two finished runs on the same data: runs/<experiment>/<run-id>, or URIs
    at which they are published."""
    preset: str | None = None
    """In place of runs: embedded (images, half an hour on two cores) or text. Only in a
    checkout; its options: python experiments/compare_methods.py --help."""
    names: tuple[str, ...] = ()
    """What the runs are called in tables and pictures, one each; none: their experiments."""
    metrics: tuple[str, ...] = ()
    """What is compared (clean, robust, Linf/apgd, ...): fewer metrics mean fewer tests. None: every
    accuracy that all runs measured in the same way."""
    with_first: Flag = False
    """Compare every run with the first one only, not all with all: fewer tests."""
    output: Path | None = None
    """Folder for report.html, comparison.json and plots/pareto.png; with --preset also table.md,
    results.json and all runs. None: comparison, with --preset a folder of its name beside the
    runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Options):
    """Make the pages of finished runs again, from what the runs have stored.

    The folder of compare --preset is read likewise: tables, tests, pictures and page are made anew.

    Example: robustft report runs/rift-embedded/RUN_ID
    """

    runs: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN_DIR [RUN_DIR ...]")]
    ]
    """Folders of finished runs: runs/<experiment>/<run-id>, or URIs at which they are published;
    pages of these are published again. Or folders of compare --preset."""
    without_pictures: Flag = False
    """Make the page of the evaluation again even where the pictures of attacked images were not
    stored, and will be missing on it; otherwise such a page stays as it is."""


def compare_stored(verb: Compare) -> Answer:
    """Compare the runs that the command line names, or all methods by the protocol of a preset."""
    if verb.preset is not None:
        return _compare_methods(verb, verb.preset)
    from robustft.evaluation.comparison import compare_runs
    from robustft.evaluation.comparison_report import comparison_lines, write_comparison_report
    from robustft.runtime.jsonfile import write_json
    from robustft.runtime.outputs import command_line
    from robustft.runtime.stored_runs import compared_run, load_run

    if len(verb.runs) < 2:
        raise ConfigError("a comparison needs at least two runs: name another RUN_DIR")
    stored = [load_run(path) for path in verb.runs]
    names = _names(verb.names, stored)
    output = verb.output or Path("comparison")
    comparison = compare_runs(
        [compared_run(run, name) for run, name in zip(stored, names, strict=True)],
        metrics=verb.metrics,
        with_first=verb.with_first,
    )
    command = command_line(sys.argv)
    page = write_comparison_report(
        output,
        comparison,
        described={name: _facts(run) for name, run in zip(names, stored, strict=True)},
        title=f"{len(names)} runs on {comparison.runs[0].data}",
        command=command,
    )
    document: dict[str, Any] = {
        **comparison.document(),
        "folders": {n: str(r.directory) for n, r in zip(names, stored, strict=True)},
        "command": command,
        "report": str(page),
    }
    try:
        write_json(output / "comparison.json", document)
    except OSError as error:
        raise ResourceError(f"cannot write {output}: {error.strerror}") from error
    return Answer(document, f"{comparison_lines(comparison)}\n{page}")


def _compare_methods(verb: Compare, preset: str) -> Answer:
    """Run the protocol that the script of the checkout holds."""
    if verb.runs or verb.names or verb.metrics or verb.with_first:
        raise ConfigError(
            "--preset makes runs of its own and tests what its protocol says: leave out RUN_DIR, "
            "--names, --metrics and --with_first"
        )
    script = _script()
    document, text = script.compare(script.Options(preset=preset, output=verb.output))
    return Answer(document, f"{text}\n{document['report']}")


def _script() -> ModuleType:
    """Return the checkout's script as a module: ./experiments, then beside the package.

    Raises:
        ConfigError: there is none.
    """
    places = [Path(), Path(__file__).resolve().parents[2]]
    path = next((place / SCRIPT for place in places if (place / SCRIPT).is_file()), None)
    if path is None:
        raise ConfigError(
            f"--preset needs {SCRIPT}, which is a part of the checkout and not of the installed "
            "package: run it in a checkout of robustft"
        )
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module of a class.
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    return module


def report_again(verb: Report) -> Answer:
    """Write the pages of the runs that the command line names."""
    from robustft.data.storage import is_uri, open_store
    from robustft.runtime.protocol_report import RESULTS, conclude_again
    from robustft.runtime.stored_runs import load_run, write_reports

    if not verb.runs:
        raise ConfigError("name at least one run: runs/<experiment>/<run-id>")
    compared = [path for path in verb.runs if not is_uri(path) and (Path(path) / RESULTS).is_file()]
    places = [path for path in verb.runs if path not in compared]
    # All before the first is written: a wrong folder is to be known now.
    stored = [load_run(path) for path in places]
    document: list[dict[str, str]] = []
    lines: list[str] = []
    for folder in compared:
        page = conclude_again(Path(folder))
        document.append({"comparison": str(page)})
        lines.append(str(page))
    for place, run in zip(places, stored, strict=True):
        pages = write_reports(run, without_pictures=verb.without_pictures)
        if is_uri(place):
            open_store(place).publish(run.directory)
        document.append({name: str(path) for name, path in pages.items()})
        lines += map(str, pages.values())
        if "evaluation" not in pages:
            lines.append(
                f"{run.directory / 'evaluation' / 'report.html'} stays as it is: its pictures are "
                "stored nowhere else (--without_pictures makes it again without them)"
            )
    return Answer({"reports": document}, "\n".join(lines))


def _names(given: Sequence[str], runs: Sequence["StoredRun"]) -> list[str]:
    """Return a name for each run: the given ones, or as little of their folders as tells them."""
    if given:
        if len(given) != len(runs) or len(set(given)) < len(given):
            raise ConfigError(
                f"{len(runs)} runs need as many different names: give --names, one each"
            )
        return list(given)
    # The experiment; where several runs share it, with the end of the run id, or with all of it.
    levels = [
        [str(run.summary["experiment"]) for run in runs],
        [f"{run.summary['experiment']} {run.directory.name[-6:]}" for run in runs],
        [run.name for run in runs],
    ]
    counts = collections.Counter(name for level in levels for name in level)
    names = [
        next((name for name in choices if counts[name] == 1), choices[-1])
        for choices in zip(*levels, strict=True)
    ]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"the run {twice[0]} is named twice: give other runs, or --names")
    return names


def _facts(run: "StoredRun") -> "RunFacts":
    from robustft.evaluation.comparison_report import RunFacts
    from robustft.runtime.stored_runs import run_panels

    summary = run.summary
    choices = summary["chosen"]["choices"][list(run.after).index(run.best)]
    chosen = {name: value for name, value in choices.items() if name != "leaky"}
    return RunFacts(
        facts={
            "method": summary["method"],
            "start": str(run.card["start"]),
            "chosen": ", ".join(f"{name} {value}" for name, value in chosen.items()) or "nothing",
            "seeds": ", ".join(run.after),
            "threat models": ", ".join(summary["threat_models"]) or "none",
            "selection": summary["selection"],
            "trials": str(summary["num_trials"]),
            "failed trials": str(len(summary["failed_trials"])),
            "commit": summary["commit"] or "unknown",
            "folder": str(run.directory),
        },
        command=run.command,
        config=run.config,
        versions=run.versions,
        panels=run_panels(run),
    )
