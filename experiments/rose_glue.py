"""ROSE beside its baselines on a text task: clean accuracy, AdvGLUE and attacks, over seeds.

Purpose: whether selective fine-tuning makes a language model more robust than plain fine-tuning,
than two dropout passes without a mask (what ROSE-First trains on), than masks that select nothing
in particular (fixed, random), and than R-Drop, R3F, FreeLB, SMART and Child-Tuning. Every method
starts from the same pretrained encoder, with the same head, data and order for a seed; test,
AdvGLUE and the attacks are read once, for the epoch that clean accuracy on val has chosen.

With --num_samples N each method's learning rate, and upper and gamma where it has a mask, are first
searched by N random trials with ASHA on clean accuracy on val; robust accuracy is never looked at.
Without it all methods share the preset's rate, and ROSE's ``upper`` are those published for SST-2.

Command: ``python experiments/rose_glue.py [--methods vanilla rose-second ...] [--seeds 0 1 2]``
Time: a method costs its passes (second column of the table) times that of vanilla (docs/rose.md).
Output: ``table.md``, ``results.json`` and ``accuracies.png`` in --output, and a run folder and
MLflow run for each method.
"""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

import tyro  # noqa: E402  after the path
from matplotlib.figure import Figure  # noqa: E402

from robustft.config import replaced, to_dict  # noqa: E402
from robustft.errors import UnknownNameError  # noqa: E402
from robustft.evaluation.intervals import mean_interval  # noqa: E402
from robustft.runtime.experiment import (  # noqa: E402
    Experiment,
    SearchConfig,
    load_experiment,
    with_values,
)
from robustft.runtime.jsonfile import write_json  # noqa: E402
from robustft.runtime.run import run  # noqa: E402
from robustft.runtime.session import connect, default_output  # noqa: E402

METHODS: Mapping[str, Mapping[str, Any]] = {
    "vanilla": {"variant": "vanilla", "loss": {"name": "ce"}},
    "two-pass": {"variant": "vanilla", "loss": {"name": "two_pass"}},
    "rose-first": {"variant": "first", "upper": 60.0},
    "rose-second": {"variant": "second", "upper": 30.0},
    "rose-ensemble": {"variant": "ensemble", "upper": 40.0},
    "fixed-mask": {"variant": "first", "upper": 60.0, "mask": "fixed"},
    "random-mask": {"variant": "first", "upper": 60.0, "mask": "random"},
    "r-drop": {"variant": "vanilla", "loss": {"name": "r_drop"}},
    "r3f": {"variant": "vanilla", "loss": {"name": "r3f"}},
    "freelb": {"variant": "vanilla", "loss": {"name": "freelb"}},
    "smart": {"variant": "vanilla", "loss": {"name": "smart"}},
    "child-tuning-f": {"variant": "vanilla", "child_tuning": {"name": "free"}},
    "child-tuning-d": {"variant": "vanilla", "child_tuning": {"name": "data"}},
}
"""Name in the table -> what it changes in the preset's method."""

BASELINE = "vanilla"
RATES = (1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4)
UPPERS = (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0)
GAMMAS = (0.3, 0.5, 0.7)
PASSES = ("passes/forwards", "passes/backwards")

Summary = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """ROSE beside its baselines on a text task."""

    preset: str = "rose-embedded"
    """Preset name or YAML file; its method is rose."""
    methods: tuple[str, ...] = (
        "vanilla",
        "two-pass",
        "rose-first",
        "rose-second",
        "rose-ensemble",
        "random-mask",
        "r-drop",
        "freelb",
    )
    """What is compared; all: vanilla, two-pass, rose-first, rose-second, rose-ensemble, fixed-mask,
    random-mask, r-drop, r3f, freelb, smart, child-tuning-f, child-tuning-d."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of order, dropout and a fresh head's training, at least two."""
    num_samples: int = 0
    """Random trials of a search for each method before it is measured; 0: none."""
    data: str | None = None
    """Data set: rotten_tomatoes, sst2, qqp, qnli, rte or mnli; None: as the preset says."""
    root: str | None = None
    """Folder with its files."""
    advglue: str | None = None
    """AdvGLUE's dev.json; None: as the preset says."""
    model: str | None = None
    """Encoder: minilm, a folder, or a hub id (its tokeniser goes with it); None: the preset's."""
    limit_train: int | None = None
    """Train on so many texts; None: as the preset says."""
    epochs: int | None = None
    """Passes over them; None: as the preset says."""
    limit: int | None = None
    """Texts of test to attack; None: as the preset says."""
    output: Path = dataclasses.field(default_factory=partial(default_output, "rose-glue"))
    """Folder of table and picture."""


def prepared(options: Options) -> Experiment:
    """Return the preset's experiment with what the options say of data, model and length.

    Raises:
        UnknownNameError: no such method.
    """
    for name in options.methods:
        if name not in METHODS:
            raise UnknownNameError("method of this comparison", name, METHODS)
    base = load_experiment(options.preset)
    task = replaced(
        base.task,
        data=options.data,
        root=options.root,
        advglue=options.advglue,
        tokenizer=options.model,
        limit_train=options.limit_train,
    )
    return dataclasses.replace(
        base,
        task=task,
        start=replaced(base.start, model=options.model),
        method=replaced(base.method, epochs=options.epochs),
        evaluation=replaced(base.evaluation, limit=options.limit),
    )


def searched(experiment: Experiment, num_samples: int) -> Mapping[str, Any]:
    """Return the values that clean accuracy on val likes best among random trials."""
    space: dict[str, Sequence[float]] = {"lr": RATES}
    if experiment.method.variant != "vanilla":
        space["upper"] = UPPERS
    if experiment.method.variant == "ensemble":
        space["gamma"] = GAMMAS
    search = SearchConfig(
        space={name: list(values) for name, values in space.items()},
        num_samples=num_samples,
        algorithm="random",
        scheduler="asha",
        metric="val/clean",
    )
    # The search is not asked how robust its trials are, so nothing but clean is measured.
    cheap = dataclasses.replace(experiment.evaluation, suite="clean")
    report = run(dataclasses.replace(experiment, search=search, evaluation=cheap))
    values: Mapping[str, Any] = report.summary["chosen"]["values"][0]
    return values


def compare(options: Options) -> tuple[dict[str, Summary], dict[str, Mapping[str, Any]]]:
    """Run every method over the seeds; return summaries, and what a search has chosen."""
    base = prepared(options)
    seeds = SearchConfig(space={"seed": list(options.seeds)}, metric="val/clean")
    summaries: dict[str, Summary] = {}
    chosen: dict[str, Mapping[str, Any]] = {}
    for name in options.methods:
        method = with_values(base.method, METHODS[name])
        experiment = dataclasses.replace(base, method=method)
        chosen[name] = searched(experiment, options.num_samples) if options.num_samples else {}
        method = with_values(method, chosen[name])
        summaries[name] = dict(
            run(dataclasses.replace(experiment, method=method, search=seeds)).summary
        )
    return summaries, chosen


def accuracies(summary: Summary) -> dict[str, list[float]]:
    """Return metric -> accuracy of every seed, of accuracies only."""
    seeds = summary["after"]["seeds"].values()
    names = [name for name in next(iter(seeds)) if "/" not in name and name != "ece"]
    # The originals of AdvGLUE's rows were partly trained on.
    names = [name for name in names if not name.endswith("_clean")]
    return {name: [seed[name]["accuracy"] for seed in seeds] for name in names}


def cost(summary: Summary) -> float:
    """Return forwards and backwards of training, over all seeds."""
    return float(
        sum(one[name] for one in summary["chosen"]["selection_metrics"] for name in PASSES)
    )


def estimate(values: Sequence[float], form: str = ".1f") -> str:
    """Return the mean and Student's interval over seeds, in percent."""
    low, high = (100 * bound for bound in mean_interval(values))
    return f"{100 * sum(values) / len(values):{form}} [{low:{form}}, {high:{form}}]"


def table(summaries: Mapping[str, Summary], seeds: Sequence[int]) -> str:
    """Return Markdown tables: means over seeds, and paired differences to plain fine-tuning."""
    found = {name: accuracies(summary) for name, summary in summaries.items()}
    first = next(iter(found))
    reference = BASELINE if BASELINE in found else first
    columns = [name for name in found[first] if all(name in one for one in found.values())]
    lines = ["| | passes | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for name, one in found.items():
        passes = cost(summaries[name]) / cost(summaries[reference])
        cells = [estimate(one[column]) for column in columns]
        lines.append(f"| {name} | {passes:.1f}x | " + " | ".join(cells) + " |")
    if len(found) > 1:
        lines += ["", f"| difference to {reference} | " + " | ".join(columns) + " |"]
        lines.append("|---" * (1 + len(columns)) + "|")
        for name, one in found.items():
            if name == reference:
                continue
            cells = []
            for column in columns:
                pairs = zip(one[column], found[reference][column], strict=True)
                cells.append(estimate([new - old for new, old in pairs], "+.1f"))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = f"Percent: mean over seeds {', '.join(map(str, seeds))} and Student's 95 % interval."
    return "\n".join([*lines, "", note]) + "\n"


def draw(summaries: Mapping[str, Summary]) -> Figure:
    """Draw every method's accuracies, one panel per measurement, a point for each seed."""
    found = {name: accuracies(summary) for name, summary in summaries.items()}
    columns = list(next(iter(found.values())))
    figure = Figure(figsize=(2.2 * len(columns) + 1.5, 0.35 * len(found) + 1.2))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for row, one in enumerate(found.values()):
            values = [100 * value for value in one.get(column, [])]
            axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.5, markersize=4)
            axes.plot([sum(values) / max(1, len(values))], [row], "|", color="k", markersize=12)
        axes.set_title(column.replace("_", " "), fontsize="small")
        axes.set_xlabel("%")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    return figure


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with connect(prepared(options).runtime):  # Once for all runs.
        summaries, chosen = compare(options)
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(summaries, options.seeds)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    results = {"options": to_dict(options), "chosen": chosen, "summaries": summaries}
    write_json(options.output / "results.json", results)
    draw(summaries).savefig(options.output / "accuracies.png", dpi=150)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
