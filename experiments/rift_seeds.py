"""RiFT over whole seeds: start, search and evaluation again for each seed, and one table.

Purpose: how much of what ``rift_sweep.py`` reports is luck. Each seed trains its own starting
model (where the preset trains one), searches, chooses on val and reads test once; the table gives
the mean over seeds with Student's interval, and the seeds one by one.

Command: ``python experiments/rift_seeds.py --seeds 0 1 2 [--preset rift-embedded]``
Time: as many times that of the preset. Output: ``seeds.md`` and ``seeds.json`` in --output.
"""

import dataclasses
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

import tyro  # noqa: E402  after the path

from robustft.evaluation.intervals import mean_interval  # noqa: E402
from robustft.runtime.experiment import Experiment, load_experiment  # noqa: E402
from robustft.runtime.jsonfile import write_json  # noqa: E402
from robustft.runtime.run import run  # noqa: E402
from robustft.runtime.session import connect, default_output  # noqa: E402

MEASURES = ("clean", "Linf/pgd", "Linf/apgd", "corruptions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """RiFT over whole seeds."""

    preset: str = "rift-embedded"
    """Preset name or YAML file."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, at least two."""
    output: Path = dataclasses.field(default_factory=partial(default_output, "rift-seeds"))
    """Folder of the table."""


def with_seed(experiment: Experiment, seed: int) -> Experiment:
    """Return the experiment with ``seed`` for the start, its training and fine-tuning."""
    start = dataclasses.replace(experiment.start, seed=seed)
    if start.method is not None:
        start = dataclasses.replace(start, method=dataclasses.replace(start.method, seed=seed))
    space = {**experiment.search.space, "seed": [seed]}
    search = dataclasses.replace(experiment.search, space=space)
    return dataclasses.replace(experiment, start=start, search=search)


def row(name: str, seeds: list[int], values: list[float], *, sign: str = "") -> str:
    mean = 100 * sum(values) / len(values)
    low, high = (100 * bound for bound in mean_interval(values))
    each = " | ".join(f"{100 * value:{sign}.2f}" for value in values)
    return f"| {name} | {mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}] | {each} |"


def table(seeds: list[int], summaries: list[dict[str, Any]]) -> str:
    """Return a Markdown table: accuracies in %, changes in points, chosen settings."""
    lines = [
        "| | mean [95 % over seeds] | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (2 + len(seeds)) + "|",
    ]
    for measure in MEASURES:
        before = [summary["before"][measure]["accuracy"] for summary in summaries]
        after = [summary["after"]["mean"][measure] for summary in summaries]
        change = [b - a for a, b in zip(before, after, strict=True)]
        lines.append(row(f"{measure} before", seeds, before))
        lines.append(row(f"{measure} after", seeds, after))
        lines.append(row(f"**{measure} change**", seeds, change, sign="+"))
    chosen = [summary["chosen"]["choices"][0] for summary in summaries]
    for name in ("layer", "lr", "alpha"):
        lines.append(f"| {name} | | " + " | ".join(str(one[name]) for one in chosen) + " |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    experiment = load_experiment(options.preset)
    with connect(experiment.runtime):  # Once for all runs.
        summaries = [dict(run(with_seed(experiment, seed)).summary) for seed in options.seeds]
    text = table(list(options.seeds), summaries)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "seeds.md").write_text(text, encoding="utf-8")
    write_json(options.output / "seeds.json", summaries)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
