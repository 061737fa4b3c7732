"""AutoLoRa against a search over its baselines' hyper-parameters: robust accuracy against cost.

Purpose: what AutoLoRa's claim "no search needed" is worth. A network that was adversarially
trained on the embedded Fashion-MNIST is fine-tuned to digits: once by AutoLoRa with its published
constants, and by vanilla robust fine-tuning and TWINS with learning rate, weight decay and loss
weights drawn at random, until the search has cost 1, 4 and 16 times what AutoLoRa costs. Trials
are compared on val; for each budget the best is trained with every seed and read on test.

Cost is counted in passes over single images, forwards and backwards, of everything a trial does:
attacks, updates and validation, also of trials that ASHA has stopped. The cheaper searches are
prefixes of the largest. Trials of a random search are exchangeable, so their order is drawn by
--search_seed; with --scheduler asha or --algorithm optuna a trial depends on those before it, and
the order is that in which they began.

Command: ``python experiments/autolora_baselines.py [--scheduler asha] [--algorithm optuna]``
Time: up to 53 trials of about 90,000 passes (15 s on one core each), and the start, which is cached
(--start takes another): about 10 minutes on two quiet cores.
Output: ``curve.png`` (the main picture), ``table.md`` and ``results.json`` in --output, and a run
folder and MLflow run for each search and each row of the table.
"""

import dataclasses
import itertools
import logging
import math
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

import pyarrow.parquet as pq  # noqa: E402  after the path
import tyro  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from robustft.config import to_dict  # noqa: E402
from robustft.errors import RunError  # noqa: E402
from robustft.evaluation.intervals import mean_interval  # noqa: E402
from robustft.runtime.experiment import (  # noqa: E402
    Experiment,
    SearchConfig,
    load_experiment,
    method_name,
    with_values,
)
from robustft.runtime.jsonfile import write_json  # noqa: E402
from robustft.runtime.run import run  # noqa: E402
from robustft.runtime.session import connect, default_output  # noqa: E402

MEASURES = {"clean": "clean", "PGD": "Linf/pgd", "APGD": "Linf/apgd"}
SCORE = "val/robust"
PASSES = ("passes/forwards", "passes/backwards")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """AutoLoRa against a search over its baselines' hyper-parameters."""

    autolora: str = "autolora-embedded"
    """Preset of the method that is not searched."""
    baselines: tuple[str, ...] = ("autolora-embedded-rft", "autolora-embedded-twins")
    """Presets with a search."""
    algorithm: Literal["grid", "random", "optuna"] | None = None
    """How trials are drawn; None: as the preset says (random)."""
    scheduler: Literal["fifo", "asha"] | None = None
    """asha stops weak trials early; None: as the preset says (fifo)."""
    start: Path | None = None
    """Model folder to start from, in place of the start that the presets train."""
    root: str | None = None
    """Folder of the data that are fine-tuned to; None: they are fetched."""
    budgets: tuple[float, ...] = (1.0, 4.0, 16.0)
    """Costs of the searches, in runs of AutoLoRa, ascending."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every row of the table, at least two."""
    search_seed: int = 0
    """Seed of the order in which trials count."""
    output: Path = dataclasses.field(default_factory=partial(default_output, "autolora-baselines"))
    """Folder of picture and tables."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tried:
    """A trial of a search: its values, its cost in passes, its accuracy on val.

    The accuracy of a trial that was stopped is the last that it reported; only one that finished
    can be chosen.
    """

    values: Mapping[str, Any]
    cost: float
    score: float
    finished: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
    """The trials of a search, in the order in which they count."""

    trials: Sequence[Tried]
    exchangeable: bool

    def curve(self) -> list[tuple[float, float]]:
        """Return cost and best accuracy on val after 1, 2, ... trials.

        Where the order of trials means nothing these are expected values over all orders.
        """
        if self.exchangeable:
            step = sum(trial.cost for trial in self.trials) / len(self.trials)
            best = expected_best([trial.score for trial in self.trials])
            return [(step * (k + 1), value) for k, value in enumerate(best)]
        spent = itertools.accumulate(trial.cost for trial in self.trials)
        scores = (trial.score if trial.finished else 0.0 for trial in self.trials)
        so_far = itertools.accumulate(scores, max)
        return [(cost, value) for cost, value in zip(spent, so_far, strict=True) if value > 0]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: what was run, at what search cost, and test accuracies per seed."""

    method: str
    cost: float
    trials: int
    values: Mapping[str, Any]
    test: Mapping[str, Sequence[float]]
    failed: int
    """Seeds that diverged, of which there are no accuracies."""


def prepared(preset: str, options: Options) -> Experiment:
    """Return the preset's experiment with what the options say of start, data and search."""
    experiment = load_experiment(preset)
    start, task, search = experiment.start, experiment.task, experiment.search
    if options.start is not None:
        start = dataclasses.replace(start, checkpoint=str(options.start))
    if options.root is not None:
        task = dataclasses.replace(task, root=options.root)
    if options.algorithm is not None:
        search = dataclasses.replace(search, algorithm=options.algorithm)
    if options.scheduler is not None:
        search = dataclasses.replace(search, scheduler=options.scheduler)
    return dataclasses.replace(experiment, start=start, task=task, search=search)


def chosen(experiment: Experiment, values: Mapping[str, Any], seeds: Sequence[int]) -> Experiment:
    """Return the experiment with searched values fixed and nothing varied but the seed."""
    search = SearchConfig(space={"seed": list(seeds)}, metric=SCORE)
    method = with_values(experiment.method, values)
    return dataclasses.replace(experiment, method=method, search=search)


def tried(directory: Path, names: Sequence[str]) -> list[Tried]:
    """Return the trials of a run; one that failed scores 0 at the price of the dearest.

    Raises:
        RunError: no trial came to an end.
    """
    rows = pq.read_table(directory / "trials.parquet").to_pylist()
    ended = [row for row in rows if row["status"] != "failed"]
    if not any(row["status"] == "finished" for row in ended):
        raise RunError(f"no trial of {directory} came to an end: see its trials.parquet")
    dearest = max(sum(row[name] for name in PASSES) for row in ended)
    found = []
    for row in rows:
        failed = row["status"] == "failed"
        found.append(
            Tried(
                values={name: row[name] for name in names},
                cost=dearest if failed else sum(row[name] for name in PASSES),
                score=0.0 if failed else row[SCORE],
                finished=row["status"] == "finished",
            )
        )
    return found


def affordable(trials: Sequence[Tried], budget: float) -> list[Tried]:
    """Return the first trials that together cost at most ``budget``, but one at least."""
    costs = itertools.accumulate(trial.cost for trial in trials)
    count = sum(cost <= budget for cost in costs)
    return list(trials[: max(1, count)])


def expected_best(scores: Sequence[float]) -> list[float]:
    """Return the expected best of k scores drawn without replacement, for k = 1 to all of them."""
    ranked = sorted(scores)
    return [
        sum(score * math.comb(below, k - 1) for below, score in enumerate(ranked))
        / math.comb(len(ranked), k)
        for k in range(1, len(ranked) + 1)
    ]


def measured(experiment: Experiment) -> tuple[dict[str, list[float]], Path]:
    """Run an experiment over seeds; return test accuracies per measure and the run's folder."""
    report = run(experiment)
    seeds = report.summary["after"]["seeds"].values()
    test = {name: [seed[metric]["accuracy"] for seed in seeds] for name, metric in MEASURES.items()}
    return test, report.directory


def exchangeable(search: SearchConfig) -> bool:
    """Return whether no trial depends on those before it."""
    return search.algorithm != "optuna" and search.scheduler == "fifo"


def compare(options: Options) -> tuple[list[Line], dict[str, Search], list[Tried]]:
    """Run everything; return the table, the searches, and AutoLoRa's own runs."""
    base = prepared(options.autolora, options)
    test, directory = measured(chosen(base, {}, options.seeds))
    runs = tried(directory, ())
    unit = cost_of(runs)
    failed = len(options.seeds) - len(test["clean"])
    lines = [Line(method_name(base.method), 1.0, 1, {}, test, failed)]
    searches: dict[str, Search] = {}
    for preset in options.baselines:
        base = prepared(preset, options)
        name = method_name(base.method)
        # Attacks on test are for what a budget finds, below.
        cheap = dataclasses.replace(base.evaluation, suite="clean")
        searched = run(dataclasses.replace(base, evaluation=cheap))
        trials = tried(searched.directory, list(base.search.space))
        if exchangeable(base.search):
            random.Random(options.search_seed).shuffle(trials)
        searches[name] = Search(trials, exchangeable(base.search))
        known: dict[int, dict[str, list[float]]] = {}
        for budget in options.budgets:
            prefix = affordable(trials, budget * unit)
            best = max(range(len(prefix)), key=lambda i: (prefix[i].finished, prefix[i].score))
            if best not in known:
                known[best], _ = measured(chosen(base, prefix[best].values, options.seeds))
            cost = sum(trial.cost for trial in prefix) / unit
            test = known[best]
            failed = len(options.seeds) - len(test["clean"])
            lines.append(Line(name, cost, len(prefix), prefix[best].values, test, failed))
    return lines, searches, runs


def cost_of(runs: Sequence[Tried]) -> float:
    """Return what one of the runs has cost on average, in passes: the unit of search costs."""
    return sum(run.cost for run in runs) / len(runs)


def percent(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and Student's interval over seeds, in percent; NaN where too few are left."""
    if len(values) < 2:
        mean = 100 * values[0] if values else math.nan
        return mean, math.nan, math.nan
    low, high = mean_interval(values)
    return 100 * sum(values) / len(values), 100 * low, 100 * high


def table(lines: Sequence[Line], seeds: Sequence[int]) -> str:
    """Return a Markdown table of test accuracies in percent, mean and interval over seeds."""
    header = ["", "search cost", "trials", *MEASURES, "APGD by seed", "chosen"]
    rows = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for line in lines:
        cells = [line.method, f"{line.cost:.1f}x", str(line.trials)]
        for name in MEASURES:
            mean, low, high = percent(line.test[name])
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        by_seed = [f"{100 * value:.1f}" for value in line.test["APGD"]]
        cells.append(", ".join([*by_seed, *["diverged"] * line.failed]))
        cells.append(", ".join(f"{name} {text(value)}" for name, value in line.values.items()))
        rows.append("| " + " | ".join(cells) + " |")
    note = f"Mean over seeds {', '.join(map(str, seeds))} and 95 % interval; cost in AutoLoRa runs."
    return "\n".join([*rows, "", note]) + "\n"


def text(value: Any) -> str:
    """Return a searched value in short."""
    if isinstance(value, Mapping):
        return " ".join(f"{name} {text(one)}" for name, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(lines: Sequence[Line], searches: Mapping[str, Search], runs: Sequence[Tried]) -> Figure:
    """Draw test accuracy of what each budget finds, and what the search saw on val."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    on_test, on_val = figure.subplots(1, 2)
    names = list(dict.fromkeys(line.method for line in lines))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    for name, color in colors.items():
        own = [line for line in lines if line.method == name]
        means, lows, highs = zip(*(percent(line.test["APGD"]) for line in own), strict=True)
        errors = [
            [mean - low for mean, low in zip(means, lows, strict=True)],
            [high - mean for mean, high in zip(means, highs, strict=True)],
        ]
        costs = [line.cost for line in own]
        on_test.errorbar(costs, means, yerr=errors, marker="o", capsize=3, color=color, label=name)
    mean = 100 * sum(run.score for run in runs) / len(runs)
    on_val.plot([1], [mean], "o", color=colors[names[0]], label=names[0])
    for name, search in searches.items():
        points = [(cost / cost_of(runs), 100 * value) for cost, value in search.curve()]
        on_val.plot(*zip(*points, strict=True), color=colors[name], label=name)
    on_test.set_ylim(-2, 102)  # Student's intervals know no bounds.
    on_test.set_ylabel("robust accuracy on test, APGD (%)")
    on_test.set_title("best of one search, retrained: mean, 95 % over seeds", fontsize="small")
    on_val.set_ylabel("robust accuracy on val (%)")
    on_val.set_title("best of the search (random: expected over orders)", fontsize="small")
    for axes in (on_test, on_val):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}x"))
        axes.set_xlabel("search cost, in runs of AutoLoRa")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with connect(load_experiment(options.autolora).runtime):  # Once for all runs.
        lines, searches, runs = compare(options)
    options.output.mkdir(parents=True, exist_ok=True)
    written = table(lines, options.seeds)
    (options.output / "table.md").write_text(written, encoding="utf-8")
    trials = {name: search.trials for name, search in searches.items()}
    trials[lines[0].method] = runs
    results = {"passes_of_a_run": cost_of(runs), "lines": lines, "searches": trials}
    write_json(options.output / "results.json", to_dict(results))
    draw(lines, searches, runs).savefig(options.output / "curve.png", dpi=150)
    sys.stdout.write(written)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
