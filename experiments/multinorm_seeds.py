"""Multi-norm fine-tuning over whole seeds: E-AT beside what it is compared with, in one table.

Purpose: whether three epochs of E-AT bring a missing norm, what MAX gains for three times the
attack passes, and what training on one norm alone forgets. Each seed has its own start (where the
preset trains one); every method begins there, chooses on val and reads test once.

Command: ``python experiments/multinorm_seeds.py --seeds 0 1 2 [--methods e-at max l1 ...]``
Time: as many times that of the preset; MAX and AVG about three times as long in training.
Output: ``seeds.md``, ``seeds.json`` and ``curves.png`` in --output.
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

import pyarrow.parquet as pq  # noqa: E402  after the path
import tyro  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from robustft.config import replaced  # noqa: E402
from robustft.evaluation.intervals import mean_interval  # noqa: E402
from robustft.runtime.experiment import Experiment, load_experiment  # noqa: E402
from robustft.runtime.jsonfile import write_json  # noqa: E402
from robustft.runtime.run import run  # noqa: E402
from robustft.runtime.session import connect, default_output  # noqa: E402

METHODS: Mapping[str, Mapping[str, Any]] = {
    "e-at": {"scheme": "error_weighted", "norms": None},
    "sat": {"scheme": "uniform", "norms": None},
    "max": {"scheme": "max", "norms": None},
    "avg": {"scheme": "avg", "norms": None},
    "msd": {"scheme": "msd", "norms": None, "steps_per_norm": {}},
    # One norm alone: judged as it ends, since "best" would go by the union.
    "linf": {"scheme": "uniform", "norms": ("Linf",), "keep": "last"},
    "l1": {"scheme": "uniform", "norms": ("L1",), "keep": "last"},
}
COLUMNS = {
    "clean": "clean",
    "Linf": "Linf/robust",
    "L2": "L2/robust",
    "L1": "L1/robust",
    "union": "union",
}
CURVES = ("val/clean", "val/Linf", "val/L2", "val/L1", "val/union")

Summary = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Multi-norm fine-tuning over whole seeds."""

    preset: str = "multinorm-embedded"
    """Preset name or YAML file; its method is multinorm."""
    methods: tuple[str, ...] = ("e-at", "max", "l1")
    """What is compared: e-at, sat, max, avg, msd, linf, l1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, at least two."""
    checkpoint: str | None = None
    """Start, where the preset names a file."""
    root: str | None = None
    """Folder of the data, where they are not embedded."""
    limit_train: int | None = None
    """Train on so many examples; None: as the preset says."""
    limit_val: int | None = None
    """Choose on so many examples; None: as the preset says."""
    num_steps: int | None = None
    """Attack steps in training; None: as the preset says."""
    limit: int | None = None
    """Examples of test to measure; None: as the preset says."""
    attack_steps: int | None = None
    """Steps of the attacks on test; None: as the preset says."""
    cpus_per_worker: int | None = None
    """Torch threads in training; None: as the preset says. 1 where other work shares the machine,
    since threads that wait for each other there are slow."""
    output: Path = dataclasses.field(default_factory=partial(default_output, "multinorm-seeds"))
    """Folder of the table."""


def variant(base: Experiment, name: str, seed: int, options: Options) -> Experiment:
    """Return the experiment for one method and one seed of start, training and fine-tuning."""
    start = dataclasses.replace(base.start, seed=seed)
    if options.checkpoint is not None:
        start = dataclasses.replace(start, checkpoint=options.checkpoint)
    if start.method is not None:
        start = dataclasses.replace(start, method=dataclasses.replace(start.method, seed=seed))
    limits = {"limit_train": options.limit_train, "limit_val": options.limit_val}
    task = replaced(base.task, root=options.root, **limits)
    method = dataclasses.replace(base.method, seed=seed, **METHODS[name])
    method = replaced(method, num_steps=options.num_steps)
    evaluation = replaced(base.evaluation, limit=options.limit, attack_steps=options.attack_steps)
    runtime = replaced(base.runtime, cpus_per_worker=options.cpus_per_worker)
    return dataclasses.replace(
        base, start=start, task=task, method=method, evaluation=evaluation, runtime=runtime
    )


def estimate(values: Sequence[float], form: str = ".1f") -> str:
    """Return the mean and Student's interval over seeds, in percent."""
    low, high = (100 * bound for bound in mean_interval(values))
    return f"{100 * sum(values) / len(values):{form}} [{low:{form}}, {high:{form}}]"


def table(results: Mapping[str, Sequence[Summary]], seeds: Sequence[int]) -> str:
    """Return Markdown tables: means over seeds, paired changes from the start, and every seed."""
    first = next(iter(results.values()))
    rows: dict[str, list[dict[str, float]]] = {
        "start": [{c: one["before"][m]["accuracy"] for c, m in COLUMNS.items()} for one in first]
    }
    for name, summaries in results.items():
        rows[name] = [
            {column: one["after"]["mean"][metric] for column, metric in COLUMNS.items()}
            for one in summaries
        ]
    passes = {
        name: sum(
            sum(one["chosen"]["selection_metrics"][0][f"passes/{kind}"] for one in summaries)
            for kind in ("forwards", "backwards")
        )
        for name, summaries in results.items()
    }
    cheapest = min(passes.values())
    header = [*COLUMNS, "passes in training"]
    lines = ["| | " + " | ".join(header) + " |", "|---" * (1 + len(header)) + "|"]
    for name, found in rows.items():
        cells = [estimate([one[column] for one in found]) for column in COLUMNS]
        cost = f"{passes[name] / cheapest:.2f}x" if name in passes else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {cost} |")
    lines += ["", "| change from the start | " + " | ".join(COLUMNS) + " |"]
    lines += ["|---" * (1 + len(COLUMNS)) + "|"]
    for name in results:
        pairs = list(zip(rows[name], rows["start"], strict=True))
        cells = [estimate([new[c] - old[c] for new, old in pairs], "+.1f") for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| seed | | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for index, seed in enumerate(seeds):
        for name, found in rows.items():
            cells = [f"{100 * found[index][column]:.1f}" for column in COLUMNS]
            lines.append(f"| {seed} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw accuracies on val and the sampler's shares against the epoch, one column per method."""
    figure = Figure(figsize=(3.2 * len(curves), 5), layout="constrained")
    grid = figure.subplots(2, len(curves), squeeze=False, sharex=True, sharey="row")
    for column, (name, rows) in enumerate(curves.items()):
        shares = [key for key in rows[-1] if key.startswith("sampler/") and key.endswith("_share")]
        for axes, keys in zip(grid[:, column], (CURVES, shares), strict=True):
            for key in keys:
                points = [
                    (row["epoch"], 100 * row[key]) for row in rows if row.get(key) is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=key.partition("/")[2])
            if keys:
                axes.legend(fontsize="small")
        grid[0, column].set_title(name)
        grid[1, column].set_xlabel("epoch")
    grid[0, 0].set_ylabel("accuracy on val (%)")
    grid[1, 0].set_ylabel("share of batches (%)")
    return figure


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    base = load_experiment(options.preset)
    results: dict[str, list[Summary]] = {name: [] for name in options.methods}
    curves: dict[str, list[Mapping[str, Any]]] = {}
    with connect(base.runtime):  # Once for all runs.
        for seed in options.seeds:
            for name in options.methods:
                report = run(variant(base, name, seed, options))
                results[name].append(dict(report.summary))
                rows = pq.read_table(report.directory / "curves.parquet").to_pylist()
                # Of the first seed; the start's own training is in the same file.
                curves.setdefault(name, [row for row in rows if row["trial"] != "start"])
    text = table(results, options.seeds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "seeds.md").write_text(text, encoding="utf-8")
    write_json(options.output / "seeds.json", results)
    draw(curves).savefig(options.output / "curves.png", dpi=150)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
