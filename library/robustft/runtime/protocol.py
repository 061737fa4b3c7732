"""The protocol that compares methods: equal budgets, one look at val, one rule, one read of test.

What the protocol says is written where it is used, in ``experiments/compare_methods.py``; here is
how it is carried out. Every part is a run of its own folder, so that an interrupted comparison goes
on where it was.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustft.config import from_dict
from robustft.data.text import TextTask
from robustft.errors import ConfigError, RunError
from robustft.evaluation import evaluate
from robustft.evaluation.text_evaluate import evaluate_text
from robustft.methods import METHODS
from robustft.methods.costs import Passes, Sizes, criticality_passes, passes_of
from robustft.models import weight_layers
from robustft.runtime.experiment import Experiment, SearchConfig, method_name, with_values
from robustft.runtime.jsonfile import write_json
from robustft.runtime.memory import MemoryWatch
from robustft.runtime.outputs import start_cache
from robustft.runtime.results import load_result
from robustft.runtime.run import run
from robustft.runtime.starts import start_task
from robustft.runtime.stored_runs import StoredRun, compared_run, load_run
from robustft.runtime.text_runs import AnyStart, AnyTask
from robustft.runtime.vocabulary import TAGS_VARIABLE

__all__ = [
    "SEARCH_SEED",
    "Arm",
    "Bench",
    "Candidate",
    "Entry",
    "Findings",
    "Kind",
    "ProtocolOptions",
    "affordable",
    "choose",
    "judged",
    "measured",
    "measuring",
    "network_sizes",
    "other_rules",
    "preparation",
    "reference_of",
    "robust_mean",
    "searched",
    "searching",
    "tagged",
    "trial_values",
]

ROUNDING = 1e-9
"""Accuracies are counts over n; the slack decides "equal" as whole numbers would."""
SEARCH_SEED = 100
"""Seed of all trials, none of the rows': what is chosen has not seen the rows' luck."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table: a method and its search.

    Args:
        method: fields as in a preset, "name" among them.
        field: that is searched.
        values: in the order in which they are tried.
        collect: fields of the run that collects statistics for it beforehand, if it needs them;
            the method then has a "group", and the folder of the statistics is filled in.
    """

    method: Mapping[str, Any]
    field: str
    values: Sequence[Any]
    collect: Mapping[str, Any] | None = None

    def config(self, folder: Path | None = None) -> Any:
        """Return the method's config; ``folder`` is that of the statistics, if it needs them."""
        fields = dict(self.method)
        if self.collect is not None:
            folder = folder or Path()
            fields["group"] = {**fields["group"], "statistics": str(folder.resolve())}
        return configured(fields)

    def collecting(self, folder: Path | None = None) -> Any:
        """Return the config of the run that collects."""
        assert self.collect is not None
        fields = dict(self.collect)
        if folder is not None:
            fields["collect"] = {**fields["collect"], "folder": str(folder.resolve())}
        return configured(fields)


def configured(fields: Mapping[str, Any]) -> Any:
    """Return the config of the method that ``fields`` name."""
    rest = {name: value for name, value in fields.items() if name != "name"}
    return from_dict(METHODS[fields["name"]].config, rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between images and text.

    Args:
        methods: rows of the table, in its order.
        budget: of each method's search, in passes of single examples.
        judge: fields of the evaluation on val.
        columns: header -> metric on test.
        paired: metrics in which every pair of methods is tested.
    """

    methods: Mapping[str, Arm]
    budget: float
    judge: Mapping[str, Any]
    columns: Mapping[str, str]
    paired: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """What the protocol leaves open."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every row, at least two."""
    budget: float | None = None
    """Passes that each method's search may cost; None: the kind's (275,000 images, 40,000
    sentences)."""
    tolerance: float = 0.01
    """How far robust accuracy on val may fall below the start's, a fraction."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ConfigError("an interval needs at least two different seeds: give --seeds 0 1 2")
        if SEARCH_SEED in self.seeds:
            raise ConfigError(f"seed {SEARCH_SEED} is that of the searches: give other --seeds")
        if not 0 <= self.tolerance <= 1:
            raise ConfigError(f"tolerance = {self.tolerance!r}: must be a fraction from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A trial on val.

    Args:
        index: place of its value in the order of the search.
        value: of the searched field.
        clean, robust: accuracies on val, fractions; NaN if it failed.
        accuracies: everything that was measured there.
        judging: passes that measured it.
        seconds: that it took on one worker.
        error: why it failed; empty if it did not.
    """

    index: int
    value: Any
    clean: float = math.nan
    robust: float = math.nan
    accuracies: Mapping[str, float] = dataclasses.field(default_factory=dict)
    judging: float = 0.0
    seconds: float | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A method that has gone through the protocol.

    Args:
        name: in the table.
        method: its key in the library.
        field: that was searched.
        candidates: all that were tried, in order.
        chosen: the one that the rule takes.
        kept: whether it keeps the start's robust accuracy on val.
        others: rule -> value that it would have chosen.
        prepared: passes spent before the first trial.
        trial: passes of one training.
        counted: passes of one training as the method itself has counted them, if it does.
        search_seconds, seconds: of the whole search, and of one training, on one worker.
        memory: largest resident memory of a worker that trains, MiB.
        test: metric -> accuracy of each seed that has come to an end.
        failed: seeds that diverged.
        folder: run folder of the rows.
    """

    name: str
    method: str
    field: str
    candidates: Sequence[Candidate]
    chosen: Candidate
    kept: bool
    others: Mapping[str, Any]
    prepared: Passes
    trial: Passes
    counted: float | None
    search_seconds: float | None
    seconds: float | None
    memory: float
    test: Mapping[str, Sequence[float]]
    failed: Sequence[int]
    folder: Path

    @property
    def search_passes(self) -> float:
        """Passes of preparation and all trials."""
        return self.prepared.total + self.trial.total * len(self.candidates)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a comparison has found, before it is tested and drawn: ``results.json`` keeps it.

    Args:
        data: name of the data set.
        command: that began the comparison.
        options: as they were given, those of the protocol among them.
        seeds: of every row.
        tolerance: of the choice on val, a fraction.
        budget: of each method's search, in passes of single examples.
        sizes: what costs depend on.
        columns: header -> metric on test.
        paired: metrics in which every pair of methods is tested.
        reference: (clean, robust) of the start on val, fractions.
        methods: the rows, in the table's order.
    """

    data: str
    command: str
    options: Mapping[str, Any]
    seeds: Sequence[int]
    tolerance: float
    budget: float
    sizes: Mapping[str, int]
    columns: Mapping[str, str]
    paired: Sequence[str]
    reference: tuple[float, float]
    methods: Sequence[Entry]


def preparation(arm: Arm, sizes: Sizes, folder: Path | None = None) -> Passes:
    """Return what is spent once before the first trial: criticality, or statistics."""
    config = arm.config(folder)
    found = Passes()
    if method_name(config) == "rift":
        found += criticality_passes(config, sizes)
    if arm.collect is not None:
        found += passes_of(arm.collecting(folder or Path()), sizes)
    return found


def affordable(arm: Arm, sizes: Sizes, budget: float) -> Sequence[Any]:
    """Return the first values that the budget pays after the preparation, one at least."""
    left = budget - preparation(arm, sizes).total
    cost = passes_of(arm.config(), sizes).total
    return arm.values[: max(1, math.floor(left / cost + ROUNDING))]


def experiment_of(base: Experiment, method: Any, space: Mapping[str, Sequence[Any]]) -> Experiment:
    """Return an experiment that varies ``space``, its test reduced to a few clean examples."""
    # A run always ends with a look at test; of a search nobody reads it.
    evaluation = dataclasses.replace(base.evaluation, suite="clean", limit=50, sanity=False)
    search = SearchConfig(space={name: list(values) for name, values in space.items()})
    # The comparison registers its rows itself, by values on val that are measured alike.
    runtime = dataclasses.replace(base.runtime, register=False)
    return dataclasses.replace(
        base, method=method, search=search, evaluation=evaluation, runtime=runtime
    )


def searching(base: Experiment, arm: Arm, values: Sequence[Any], folder: Path | None) -> Experiment:
    """Return a method's search."""
    method = dataclasses.replace(arm.config(folder), seed=SEARCH_SEED)
    return experiment_of(base, method, {arm.field: values})


def measuring(
    base: Experiment, arm: Arm, value: Any, seeds: Sequence[int], folder: Path | None
) -> Experiment:
    """Return the run of a row: the chosen value, every seed, and test."""
    method = with_values(arm.config(folder), {arm.field: value})
    experiment = experiment_of(base, method, {"seed": seeds})
    return dataclasses.replace(experiment, evaluation=base.evaluation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all methods share while the comparison runs.

    Args:
        base: the preset.
        kind: images or text.
        options: of the command line.
        output: folder of the comparison.
        task: the data.
        start: as every run begins; its weights are trained by the first one.
        sizes: of data and network.
        mapper: where shards of an evaluation run.
    """

    base: Experiment
    kind: Kind
    options: ProtocolOptions
    output: Path
    task: AnyTask
    start: AnyStart
    sizes: Sizes
    mapper: Any

    def run(
        self, experiment: Experiment, name: str, like: Path | None = None
    ) -> tuple[StoredRun, float]:
        """Run, or go on with, or just read a part of the comparison; return it and its memory.

        Args:
            experiment: the part.
            name: begins that of its folder; its first word is the tag ``part`` of its MLflow run:
                "search", "row" or "statistics".
            like: folder of a finished part that measured the same start: those items of its
                evaluation are not computed again.
        """
        directory = self.output / "runs" / f"{name}-{experiment.fingerprint[:6]}"
        remembered = directory / "memory.json"
        if like is not None and (like / "items").is_dir() and not directory.exists():
            shutil.copytree(like / "items", directory / "items")
        if not (directory / "summary.json").is_file():
            with tagged(f"part={name.split('-')[0]}"), MemoryWatch() as watch:
                run(experiment, run_dir=directory)
            write_json(remembered, watch.largest)
        known = json.loads(remembered.read_text()) if remembered.is_file() else None
        return load_run(directory), math.nan if known is None else known

    def judge(self, state: Mapping[str, Any]) -> tuple[dict[str, float], float]:
        """Return accuracies on val of the start's network with ``state``, and what that cost."""
        network = dataclasses.replace(self.start, state=state).build()
        config = dataclasses.replace(self.base.evaluation, sanity=False, **self.kind.judge)
        measure: Any = evaluate_text if isinstance(self.task, TextTask) else evaluate
        found = measure(network, self.task, config=config, split="val", map=self.mapper)
        return found.metrics, float(found.num_forwards + found.num_backwards)


def robust_mean(accuracies: Mapping[str, float]) -> float:
    """Return the mean robust accuracy on val: over threat models, for text over attacks.

    Raises:
        RunError: nothing was attacked.
    """
    norms = [value for name, value in accuracies.items() if name.endswith("/robust")]
    attacks = [accuracies[name] for name in ("deepwordbug", "synonym_greedy") if name in accuracies]
    found = norms or attacks
    if not found:
        raise RunError("val was not attacked, and nothing can be chosen: see Kind.judge")
    return sum(found) / len(found)


def judged(bench: Bench, stored: StoredRun, field: str, values: Sequence[Any]) -> list[Candidate]:
    """Return a search's trials as val sees them, in the order of ``values``.

    Raises:
        RunError: a trial is missing.
    """
    records = {}
    for file in sorted(stored.directory.glob("search/tune*/*/checkpoint_*/trial.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        records[str(record["values"][field])] = (record["error"], file.parent)
    rows = {str(row[field]): row for row in stored.trials}
    found = []
    for index, value in enumerate(values):
        row = rows.get(str(value))
        if row is None:
            raise RunError(f"{stored.directory} lacks the trial {field} = {value}: remove it")
        error, folder = records.get(str(value), (row["error"] or "ended without a result", None))
        seconds = row.get("seconds")
        if error or folder is None:
            found.append(Candidate(index=index, value=value, seconds=seconds, error=error))
            continue
        accuracies, passes = bench.judge(load_result(folder).state)
        found.append(
            Candidate(
                index=index,
                value=value,
                clean=accuracies["clean"],
                robust=robust_mean(accuracies),
                accuracies=accuracies,
                judging=passes,
                seconds=seconds,
            )
        )
    return found


def choose(
    candidates: Sequence[Candidate], *, reference: float, tolerance: float
) -> tuple[Candidate, bool]:
    """Return what the rule of the protocol takes, and whether it keeps the robust accuracy.

    Args:
        candidates: in any order; those that failed are never chosen.
        reference: robust accuracy on val that is to be kept, a fraction.
        tolerance: how far below it is still kept.

    Raises:
        RunError: all have failed.
    """
    finished = [one for one in candidates if not one.error]
    if not finished:
        reasons = "; ".join(dict.fromkeys(one.error for one in candidates))
        raise RunError(f"all trials of a method failed: {reasons}")

    def rank(first: float, second: float, index: int) -> tuple[int, int, int]:
        return round(first / ROUNDING), round(second / ROUNDING), -index

    kept = [one for one in finished if one.robust >= reference - tolerance - ROUNDING]
    if kept:
        return max(kept, key=lambda one: rank(one.clean, one.robust, one.index)), True
    return max(finished, key=lambda one: rank(one.robust, one.clean, one.index)), False


def other_rules(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return what would have been chosen by clean, robust accuracy, and their sum, on val."""
    finished = sorted((one for one in candidates if not one.error), key=lambda one: one.index)
    rules: dict[str, Callable[[Candidate], float]] = {
        "clean": lambda one: one.clean,
        "robust": lambda one: one.robust,
        "clean + robust": lambda one: one.clean + one.robust,
    }
    return {name: max(finished, key=rule).value for name, rule in rules.items()}


def start_state(bench: Bench) -> Mapping[str, Any] | None:
    """Return the weights of the start where it knows the task; None where it does not."""
    start = bench.start
    if start.fresh_head:
        return None
    if start.state is not None:
        return start.state
    if bench.base.start.method is None:
        return None
    cache = start_cache(bench.base, start_task(bench.base, bench.task))
    return load_result(cache).state


def statistics_of(bench: Bench, arm: Arm) -> tuple[Path | None, float]:
    """Collect the statistics that a method needs, once; return their folder and the seconds."""
    if arm.collect is None:
        return None, 0.0
    plain = dataclasses.replace(arm.collecting(), seed=SEARCH_SEED)
    key = experiment_of(bench.base, plain, {}).fingerprint[:6]
    folder = bench.output / f"statistics-{key}"
    method = dataclasses.replace(arm.collecting(folder), seed=SEARCH_SEED)
    stored, _ = bench.run(experiment_of(bench.base, method, {}), "statistics")
    return folder, sum(row["seconds"] or 0.0 for row in stored.trials)


def test_values(stored: StoredRun, columns: Mapping[str, str]) -> dict[str, list[float]]:
    """Return metric -> accuracy of each seed, of the table's metrics that were measured."""
    evaluations = [one.metrics for one in stored.after.values()]
    return {
        metric: [float(one[metric]) for one in evaluations]
        for metric in columns.values()
        if all(metric in one for one in evaluations)
    }


def searched(bench: Bench, name: str, arm: Arm) -> tuple[StoredRun, Path | None, float]:
    """Run a method's search; return it, the folder of statistics and the seconds for those."""
    folder, seconds = statistics_of(bench, arm)
    budget = bench.options.budget or bench.kind.budget
    values = affordable(arm, bench.sizes, budget)
    stored, _ = bench.run(searching(bench.base, arm, values, folder), f"search-{name}")
    return stored, folder, seconds + stored.summary["seconds"].get("prepare", 0.0)


def measured(
    bench: Bench,
    name: str,
    arm: Arm,
    candidates: Sequence[Candidate],
    reference: float,
    folder: Path | None,
    before: float,
    like: Path | None = None,
) -> tuple[Entry, StoredRun]:
    """Choose, train with every seed, read test.

    Args:
        bench: what all methods share.
        name, arm: the method.
        candidates: its trials, as val sees them.
        reference: robust accuracy on val of the start.
        folder: of the statistics, if it needs them.
        before: seconds of the preparation.
        like: folder of a finished row, which has measured the same start on test.
    """
    chosen, kept = choose(candidates, reference=reference, tolerance=bench.options.tolerance)
    seeds = bench.options.seeds
    experiment = measuring(bench.base, arm, chosen.value, seeds, folder)
    stored, memory = bench.run(experiment, f"row-{name}", like)
    cost = compared_run(stored).cost
    counted = None
    if cost.forwards is not None and cost.backwards is not None:
        counted = cost.forwards + cost.backwards
    known = [one.seconds for one in candidates if one.seconds is not None]
    config = arm.config(folder)
    entry = Entry(
        name=name,
        method=method_name(config),
        field=arm.field,
        candidates=candidates,
        chosen=chosen,
        kept=kept,
        others=other_rules(candidates),
        prepared=preparation(arm, bench.sizes),
        trial=passes_of(config, bench.sizes),
        counted=counted,
        search_seconds=before + sum(known) if len(known) == len(candidates) else None,
        seconds=cost.seconds,
        memory=memory,
        test=test_values(stored, bench.kind.columns),
        failed=[seed for seed in seeds if str(seed) not in stored.after],
        folder=stored.directory,
    )
    return entry, stored


def trial_values(stored: StoredRun, arm: Arm) -> list[Any]:
    """Return the values that a search has tried, in their order."""
    space = stored.record["experiment"]["search"]["space"]
    return list(space[arm.field])


def reference_of(bench: Bench, first: Sequence[Candidate]) -> tuple[float, float]:
    """Return clean and robust accuracy on val of the start, or what takes its place (rule 3)."""
    state = start_state(bench)
    if state is not None:
        accuracies, _ = bench.judge(state)
        return accuracies["clean"], robust_mean(accuracies)
    finished = [one for one in first if not one.error]
    if not finished:
        raise RunError("all trials of the first method failed: nothing to compare with")
    return finished[0].clean, finished[0].robust


def network_sizes(task: AnyTask, start: AnyStart) -> Sizes:
    """Return what costs depend on."""
    train, val = (len(task.splits[name]) for name in ("train", "val"))
    if isinstance(task, TextTask):
        return Sizes(train=train, val=val)
    layers = len(list(weight_layers(start.build())))
    return Sizes(train=train, val=val, norms=len(task.threat_models), layers=layers)


@contextlib.contextmanager
def tagged(tag: str) -> Iterator[None]:
    """Give every MLflow run that begins in a ``with`` block a tag beside the user's own."""
    before = os.environ.get(TAGS_VARIABLE)
    os.environ[TAGS_VARIABLE] = ",".join(filter(None, [before, tag]))
    try:
        yield
    finally:
        os.environ.pop(TAGS_VARIABLE)
        if before is not None:
            os.environ[TAGS_VARIABLE] = before
