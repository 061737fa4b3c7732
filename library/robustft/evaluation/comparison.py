"""Runs side by side: differences on the same examples, who is on the Pareto front, and the cost.

Runs are compared example by example, which is far sharper than comparing their intervals. A metric
is compared only if every run measured it in the same way: PGD with 10 steps and PGD with 20 are two
metrics of one name. What is left out is named, with the reason.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustft.errors import ConfigError, DataError, UnknownNameError
from robustft.evaluation.intervals import mcnemar
from robustft.evaluation.outcome import Evaluation
from robustft.evaluation.suites import INDEPENDENT
from robustft.evaluation.summary import Estimate, summary_row
from robustft.evaluation.text_outcome import TextEvaluation

__all__ = [
    "AnyEvaluation",
    "ComparedRun",
    "Comparison",
    "Cost",
    "Difference",
    "Score",
    "compare_runs",
    "holm",
    "pareto_front",
    "recipe",
]

AnyEvaluation: TypeAlias = Evaluation | TextEvaluation
Recipe: TypeAlias = dict[str, Any]

CLEAN = "clean"
ROBUST = ("robust", "union", "corruptions", "advglue")
"""What the Pareto front has on its robust axis: the first of these that can be compared, else an
attack's own metric."""

STRENGTH = {
    "pgd": ("pgd_steps", "pgd_restarts"),
    "apgd": ("apgd_steps", "apgd_restarts"),
    "square": ("square_queries",),
}
"""Attack on images -> the settings that say how strong it was; others have ``attack_steps``."""

TEXT_STRENGTH = {
    "deepwordbug": ("field", "max_share", "max_distance"),
    "synonym_greedy": ("field", "max_share", "num_candidates", "synonyms", "min_cosine"),
    "embedding_pgd": ("field", "embedding_eps", "embedding_steps", "embedding_restarts"),
}
"""The same for attacks on text."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a run cost; None where it was not counted.

    Args:
        forwards, backwards: passes of single examples in one training of the chosen setting (mean
            over its seeds).
        seconds: wall time of one such training.
        all_forwards, all_backwards, all_seconds: the same, added up over all trials of the run.
        num_trials: how many trials that were.
        wall_seconds: of the whole run; a start that was trained earlier and cached took none of it.
        memory: largest resident memory of a process that trained, MiB.
    """

    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None
    all_forwards: float | None = None
    all_backwards: float | None = None
    all_seconds: float | None = None
    num_trials: int = 1
    wall_seconds: float | None = None
    memory: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparedRun:
    """One run as it enters a comparison.

    Args:
        name: what it is called in tables and pictures.
        evaluations: seed -> outcomes; all on the same split.
        data: name of the data set.
        data_digest: of content and split membership.
        cost: what it took.
        leaky: whether the examples that are reported also chose something.
    """

    name: str
    evaluations: Mapping[str, AnyEvaluation]
    data: str
    data_digest: str
    cost: Cost = dataclasses.field(default_factory=Cost)
    leaky: bool = False

    @property
    def first(self) -> AnyEvaluation:
        """The evaluation of the first seed; the others were made in the same way."""
        return next(iter(self.evaluations.values()))


class Score(NamedTuple):
    """A run's accuracy on the examples that all runs measured.

    Args:
        run, metric: whose and which.
        estimate: mean over seeds, with an interval over examples.
        seeds: accuracy of each seed.
    """

    run: str
    metric: str
    estimate: Estimate
    seeds: tuple[float, ...]


class Difference(NamedTuple):
    """How much better ``other`` is than ``one``, on the same examples.

    Args:
        metric: of which.
        one, other: names of the runs.
        change: other - one with a paired bootstrap interval, not corrected for its many siblings.
        lost: examples that ``one`` gets right more often than ``other``.
        gained: the reverse.
        p_value: exact, two-sided, of the sign test over those examples (McNemar's test, where each
            run has one seed).
        adjusted: by Holm over all differences of the comparison.
        seed_range: the larger of the two runs' ranges of accuracy over their seeds; None if
            neither has several.
    """

    metric: str
    one: str
    other: str
    change: Estimate
    lost: int
    gained: int
    p_value: float
    adjusted: float
    seed_range: float | None

    @property
    def within_seeds(self) -> bool:
        """Whether seeds of one run differ by at least as much as these two runs."""
        return self.seed_range is not None and abs(self.change.value) <= self.seed_range


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """What a comparison found.

    Args:
        runs: in the given order.
        metrics: those compared.
        recipes: metric -> how it was measured, the same for all runs.
        left_out: metric -> why it is not compared.
        doubles: metric -> the compared one that says the same of every example.
        scores: one for each run and metric.
        differences: one for each pair of runs and each metric.
        axes: metrics of the Pareto front, clean and robust; None if there are no such two.
        front: names of the runs on it.
        confidence: of all intervals.
    """

    runs: Sequence[ComparedRun]
    metrics: tuple[str, ...]
    recipes: Mapping[str, Recipe]
    left_out: Mapping[str, str]
    doubles: Mapping[str, str]
    scores: Sequence[Score]
    differences: Sequence[Difference]
    axes: tuple[str, str] | None
    front: tuple[str, ...]
    confidence: float = 0.95

    def score(self, run: str, metric: str) -> Score:
        """Return the score of one run.

        Raises:
            UnknownNameError: there is none.
        """
        found = {(score.run, score.metric): score for score in self.scores}
        if (run, metric) not in found:
            known = [f"{name} {of}" for name, of in found]
            raise UnknownNameError("score", f"{run} {metric}", known)
        return found[run, metric]

    def decided(self, difference: Difference) -> bool:
        """Return whether ``difference`` is more than chance over examples, after Holm."""
        return difference.adjusted <= 1 - self.confidence

    def document(self) -> dict[str, Any]:
        """Return everything as what JSON can hold; accuracies are fractions."""
        return {
            "runs": [
                {
                    "name": run.name,
                    "data": run.data,
                    "data_digest": run.data_digest,
                    "leaky": run.leaky,
                    "seeds": list(run.evaluations),
                    "on_front": run.name in self.front,
                    "cost": dataclasses.asdict(run.cost),
                }
                for run in self.runs
            ],
            "recipes": {name: dict(recipe) for name, recipe in self.recipes.items()},
            "left_out": dict(self.left_out),
            "doubles": dict(self.doubles),
            "scores": [
                {
                    "run": score.run,
                    "metric": score.metric,
                    **dataclasses.asdict(score.estimate),
                    "seeds": list(score.seeds),
                }
                for score in self.scores
            ],
            "differences": [
                {
                    **one._asdict(),
                    "change": dataclasses.asdict(one.change),
                    "decided": self.decided(one),
                    "within_seeds": one.within_seeds,
                }
                for one in self.differences
            ],
            "axes": None if self.axes is None else list(self.axes),
            "confidence": self.confidence,
        }


def compare_runs(
    runs: Sequence[ComparedRun],
    *,
    metrics: Sequence[str] = (),
    with_first: bool = False,
    confidence: float = 0.95,
) -> Comparison:
    """Compare runs pair by pair on the examples that all of them measured.

    A run of several seeds enters with its mean over seeds for each example. Then the test is the
    exact sign test over the examples that one of the two runs gets right more often, of which
    McNemar's is the case of one seed each. P values are those of Holm over the whole table (S.
    Holm, "A simple sequentially rejective multiple test procedure", 1979).

    Note:
        Intervals and tests are over examples, for the weights that were trained. They say nothing
        about other seeds; ``Difference.seed_range`` shows how far those that were trained differ.

    Args:
        runs: at least two, with different names, of the same data and split.
        metrics: which to compare; empty: all accuracies that every run measured alike, but for
            parts of means and doubles.
        with_first: compare every run with the first one only, not all with all: fewer tests.
        confidence: of the intervals, in (0, 1).

    Raises:
        ConfigError: fewer than two runs, names that agree, runs of different data, or a metric
            that cannot be compared.
        UnknownNameError: no run has such a metric.
        DataError: the runs have no example in common.
    """
    _check(runs)
    found, left_out = _comparable(runs)
    if metrics:
        for name in metrics:
            if name in left_out:
                raise ConfigError(f"{name} cannot be compared: {left_out[name]}")
            if name not in found:
                raise UnknownNameError("metric", name, found)
        found = {name: found[name] for name in dict.fromkeys(metrics)}
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigError(f"no metric can be compared ({reasons}): measure the runs alike")
    outcomes = {name: _outcomes(runs, name) for name in found}
    doubles: dict[str, str] = {}
    if not metrics:
        # The same test twice would make all others of the table harder to pass.
        doubles = _doubles(outcomes)
        for name in doubles:
            del found[name], outcomes[name]
    scores = [
        _score(run.name, name, outcomes[name][run.name], confidence)
        for name in found
        for run in runs
    ]
    pairs = list(itertools.combinations(runs, 2))
    if with_first:
        pairs = [(runs[0], other) for other in runs[1:]]
    differences = [
        _difference(name, one.name, other.name, outcomes[name], confidence)
        for name in found
        for one, other in pairs
    ]
    adjusted = holm([difference.p_value for difference in differences])
    axes = _axes(found)
    points = {} if axes is None else _points(runs, scores, axes)
    return Comparison(
        runs=tuple(runs),
        metrics=tuple(found),
        recipes=found,
        left_out=left_out,
        doubles=doubles,
        scores=scores,
        differences=[
            difference._replace(adjusted=value)
            for difference, value in zip(differences, adjusted, strict=True)
        ],
        axes=axes,
        front=pareto_front(points),
        confidence=confidence,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values that Holm's step-down procedure makes of ``p_values``, in their order.

    Rejecting where the result is at most alpha keeps the chance of any false rejection below
    alpha, whatever the tests have to do with each other.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    reached = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted


def pareto_front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Return the names that no other beats: at least as good in both, and better in one.

    Equal points are all on the front.
    """

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())

    return tuple(name for name in points if not beaten(name))


def recipe(evaluation: AnyEvaluation, metric: str) -> Recipe:
    """Return what decides ``metric`` besides the model and the examples.

    That is the measurements ("masks") that it is made of and the settings of the attacks among
    them. Seeds of attack noise are left out: they do not make a metric another one.
    """
    settings = evaluation.settings
    if isinstance(evaluation, TextEvaluation):
        return _text_recipe(evaluation, metric)
    masks = _ingredients(list(evaluation.masks), metric)
    found: Recipe = {"measured": tuple(masks)}
    attacks = [name for name in masks if name != CLEAN and not name.startswith("corruption/")]
    if any(name.startswith("corruption/") for name in masks):
        found["corruptions"] = settings.get("corruptions")
    if attacks:
        norms = {norm for name in attacks for norm in name.split("/")[:-1]}
        radii = {n: float(e) for n, e in settings.get("eps", {}).items() if n in norms}
        found |= {"eps": radii, "backend": settings.get("backend"), "mode": settings.get("mode")}
        fields = [STRENGTH.get(name.split("/")[-1], ("attack_steps",)) for name in attacks]
        found |= {field: settings.get(field) for field in itertools.chain.from_iterable(fields)}
    return found


def _ingredients(masks: Sequence[str], metric: str) -> list[str]:
    """Return the masks of images that ``metric`` is made of."""
    corrupted = [name for name in masks if name.startswith("corruption/")]
    attacks = [name for name in masks if name != CLEAN and name not in corrupted]
    if metric == "corruptions":
        return corrupted
    if metric.startswith("corruption/"):
        return [name for name in corrupted if name.startswith(f"{metric}/")]
    if metric in ("robust", "union"):
        return attacks
    if metric in attacks and metric.rpartition("/")[2] not in INDEPENDENT:
        # In sequence: what stands after this attack has withstood those before it, too.
        chain = [name for name in attacks if name.partition("/")[0] == metric.partition("/")[0]]
        chain = [name for name in chain if name.rpartition("/")[2] not in INDEPENDENT]
        return chain[: chain.index(metric) + 1]
    if metric.endswith("/robust"):
        return [name for name in attacks if name.startswith(metric.removesuffix("robust"))]
    return [metric]


def _text_recipe(evaluation: TextEvaluation, metric: str) -> Recipe:
    if metric in evaluation.fixed or metric == CLEAN:
        return {"measured": (metric,)}
    if metric == "robust":
        masks = evaluation.attacks
    else:
        masks = [name for name in evaluation.masks if name.partition("/")[0] == metric]
    fields = [TEXT_STRENGTH.get(name, ("field", "max_share")) for name in masks]
    names = itertools.chain.from_iterable(fields)
    return {"measured": tuple(masks)} | {name: evaluation.settings.get(name) for name in names}


def _check(runs: Sequence[ComparedRun]) -> None:
    """Raise ConfigError unless the runs can be compared at all."""
    if len(runs) < 2:
        raise ConfigError("a comparison needs at least two runs: name another one")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two runs are called {twice[0]}: give each a name of its own")
    one = runs[0]
    for run in runs:
        if not run.evaluations:
            raise ConfigError(f"{run.name} has no evaluation: measure it first")
        if run.data != one.data:
            raise ConfigError(
                f"{one.name} was measured on {one.data} and {run.name} on {run.data}: compare runs "
                "of the same data"
            )
        if run.data_digest != one.data_digest:
            raise ConfigError(
                f"{one.name} and {run.name} divide or limit {one.data} in different ways (digests "
                f"{one.data_digest[:12]} and {run.data_digest[:12]}): compare runs whose task has "
                "the same files, selection, val_size, split_seed and limits"
            )
        kinds = {(type(e).__name__, e.split) for e in (*one.evaluations.values(), *_all(run))}
        if len(kinds) > 1:
            raise ConfigError(
                f"{one.name} and {run.name} were not measured on the same split: compare runs of "
                "one kind and split"
            )


def _all(run: ComparedRun) -> list[AnyEvaluation]:
    return list(run.evaluations.values())


def _comparable(runs: Sequence[ComparedRun]) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Return metric -> recipe of those that all runs have alike, and metric -> why not."""
    evaluations = [(run.name, one) for run in runs for one in _all(run)]
    wanted = dict.fromkeys(name for _, one in evaluations for name in _headlines(one))
    found, left_out = {}, {}
    for metric in wanted:
        lacking = list(dict.fromkeys(n for n, one in evaluations if metric not in one.metrics))
        if lacking:
            left_out[metric] = f"not measured for {', '.join(lacking)}"
            continue
        recipes = [recipe(one, metric) for _, one in evaluations]
        fields = dict.fromkeys(itertools.chain.from_iterable(recipes))
        differing = [f for f in fields if len({repr(one.get(f)) for one in recipes}) > 1]
        if differing:
            values = dict.fromkeys(_words(one.get(differing[0])) for one in recipes)
            text = f"{differing[0]} {' and '.join(values)}"
            left_out[metric] = f"measured in different ways ({text})"
        else:
            found[metric] = recipes[0]
    return found, left_out


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _headlines(evaluation: AnyEvaluation) -> list[str]:
    """Return the accuracies to compare: no parts of means, and none twice."""
    if isinstance(evaluation, TextEvaluation):
        return [
            name
            for name in evaluation.metrics
            if evaluation.outcome(name).kind == "accuracy" and not name.endswith("_clean")
        ]
    names = [name for name in evaluation.metrics if not name.startswith("corruption/")]
    norms = [name for name in names if name.endswith("/robust")]
    attacks = [name for name in evaluation.masks if "/" in name and "corruption" not in name]
    doubles = {"union", *(norms if len(norms) == 1 else ())}
    if len(attacks) == 1:
        doubles.add("robust")
    return [name for name in names if name not in doubles]


def _outcomes(runs: Sequence[ComparedRun], metric: str) -> dict[str, list[NDArray[Any]]]:
    """Return run -> one array for each seed, on the examples that all measured, in one order."""
    found = {run.name: [_outcome(one, metric) for one in _all(run)] for run in runs}
    lists = [ids for seeds in found.values() for ids, _ in seeds]
    common = functools.reduce(np.intersect1d, lists)
    if len(common) == 0:
        raise DataError(
            f"the runs have no example of {metric!r} in common: measure them with the same "
            "evaluation.limit"
        )
    return {
        name: [_rows(ids, values, common) for ids, values in seeds] for name, seeds in found.items()
    }


def _doubles(outcomes: Mapping[str, Mapping[str, Sequence[NDArray[Any]]]]) -> dict[str, str]:
    """Return metric -> the one that says the same of every run; ROBUST and clean are kept."""
    found: dict[str, str] = {}
    kept = sorted(outcomes, key=lambda name: name not in (CLEAN, *ROBUST))
    for one, other in itertools.combinations(kept, 2):
        pairs = [
            pair
            for run in outcomes[one]
            for pair in zip(outcomes[one][run], outcomes[other][run], strict=True)
        ]
        if one not in found and all(np.array_equal(first, second) for first, second in pairs):
            found.setdefault(other, one)
    return found


def _rows(ids: NDArray[np.int64], values: NDArray[Any], wanted: NDArray[np.int64]) -> NDArray[Any]:
    order = np.argsort(ids)
    return values[order[np.searchsorted(ids, wanted, sorter=order)]]


def _outcome(evaluation: AnyEvaluation, metric: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return ids and outcomes of one metric; corruptions may cover only the first examples."""
    if isinstance(evaluation, TextEvaluation):
        outcome = evaluation.outcome(metric)
        return outcome.ids, outcome.values
    values = evaluation.outcomes(metric)
    return evaluation.ids[: len(values)], values


def _mean(seeds: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return a run's outcome for each example: right or wrong, or the mean over several seeds."""
    return seeds[0] if len(seeds) == 1 else np.mean(seeds, axis=0)


def _score(run: str, metric: str, seeds: Sequence[NDArray[Any]], confidence: float) -> Score:
    mean = _mean(seeds)
    # Of this row only the interval of one model is wanted: the one that every report shows.
    estimate = summary_row(metric, "robust", mean, mean, confidence=confidence).after
    assert estimate is not None
    return Score(run, metric, estimate, tuple(float(values.mean()) for values in seeds))


def _difference(
    metric: str,
    one: str,
    other: str,
    outcomes: Mapping[str, Sequence[NDArray[Any]]],
    confidence: float,
) -> Difference:
    before, after = _mean(outcomes[one]), _mean(outcomes[other])
    change = summary_row(metric, "robust", before, after, confidence=confidence).change
    assert change is not None
    # Means of means are not exact, and rounding must not count as a difference.
    first, second = np.round(before.astype(np.float64), 9), np.round(after.astype(np.float64), 9)
    test = mcnemar(first > second, second > first)
    ranges = [
        max(means) - min(means)
        for means in ([float(v.mean()) for v in outcomes[name]] for name in (one, other))
        if len(means) > 1
    ]
    return Difference(
        metric=metric,
        one=one,
        other=other,
        change=change,
        lost=test.lost,
        gained=test.gained,
        p_value=test.p_value,
        adjusted=test.p_value,
        seed_range=max(ranges, default=None),
    )


def _axes(metrics: Mapping[str, Any]) -> tuple[str, str] | None:
    if CLEAN not in metrics:
        return None
    others = [name for name in metrics if name != CLEAN]
    robust = next((name for name in ROBUST if name in metrics), others[0] if others else None)
    return None if robust is None else (CLEAN, robust)


def _points(
    runs: Sequence[ComparedRun], scores: Sequence[Score], axes: tuple[str, str]
) -> dict[str, tuple[float, float]]:
    values = {(score.run, score.metric): score.estimate.value for score in scores}
    return {run.name: (values[run.name, axes[0]], values[run.name, axes[1]]) for run in runs}
