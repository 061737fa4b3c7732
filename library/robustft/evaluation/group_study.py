"""Studies of groups of instances: what differences from the random group allow to say.

A *comparison* is one group at one share under one treatment; its effect is the difference from the
random group of the same size, seed by seed. One measure decides; the others are described with the
same intervals.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from matplotlib.figure import Figure

from robustft.evaluation.intervals import mean_interval
from robustft.evaluation.outcome import Flag

__all__ = [
    "CONTROL",
    "REFERENCE",
    "Effect",
    "Model",
    "decision",
    "draw",
    "effects",
    "interval",
    "markdown",
    "note",
    "rows",
    "trusted",
    "verdict",
]

CONTROL: Literal["random"] = "random"
REFERENCE: Literal["all"] = "all"
ENOUGH = 5
"""Seeds below which nothing is claimed."""
ERROR = 0.05
"""Chance that a study without any effect calls at least one difference an effect."""
DECIDING = 3
"""The first so many checks decide whether the score can be trusted."""
TITLES = {
    "clean": "clean (%)",
    "robust": "robust (%)",
    "corruptions": "corruptions (%)",
    "advglue": "AdvGLUE (%)",
    "char_noise": "character noise (%)",
    "overfit": "loss rise on val (nats)",
}


class Model(Protocol):
    """A model of the study: which group it is of, and how it went.

    Attributes:
        remedy, share: of the group; share None for all instances.
        arm: (remedy, group, share).
        strength: of the remedy; None for subsets.
        seed: of training.
        curve: (epoch, loss on val in nats) wherever it was measured.
    """

    @property
    def remedy(self) -> str: ...
    @property
    def which(self) -> str: ...
    @property
    def share(self) -> float | None: ...
    @property
    def strength(self) -> float | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def curve(self) -> Sequence[tuple[int, float]]: ...
    @property
    def arm(self) -> tuple[str, str, float | None]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """A group against the random one: the mean difference over seeds with its interval.

    Args:
        strength: that val has chosen for the group.
        differences: group minus random, one per seed (fractions; overfit: nats).
        decision: "higher", "lower", "open", or "void" where the score is not reliable; "" for
            measures that decide nothing.
    """

    remedy: str
    which: str
    share: float
    measure: str
    strength: float | None
    differences: Sequence[float]
    mean: float
    low: float
    high: float
    decision: str


def effects(
    models: Sequence[Model], test: Sequence[Mapping[str, float]], *, reliable: bool
) -> list[Effect]:
    """Return every comparison, measure by measure.

    Args:
        models: of every group, the random one and any reference, with the same seeds.
        test: measure -> value of each model, in the same order.
        reliable: whether groups made by the score may be concluded from.
    """
    numbers = {(*model.arm, model.seed): values for model, values in zip(models, test, strict=True)}
    strengths = {model.arm: model.strength for model in models}
    seeds = sorted({model.seed for model in models})
    compared = [arm for arm in strengths if arm[1] not in (CONTROL, REFERENCE)]
    confidence = 1 - ERROR / max(1, len(compared))
    found = []
    for measure in test[0]:
        for remedy, which, share in compared:
            differences = [
                numbers[remedy, which, share, seed][measure]
                - numbers[remedy, CONTROL, share, seed][measure]
                for seed in seeds
            ]
            low, high = mean_interval(differences, confidence)
            said = decision(low, high, reliable=reliable, num_seeds=len(seeds))
            found.append(
                Effect(
                    remedy=remedy,
                    which=which,
                    share=share or 0.0,
                    measure=measure,
                    strength=strengths[remedy, which, share],
                    differences=differences,
                    mean=sum(differences) / len(differences),
                    low=low,
                    high=high,
                    decision=said if measure == "robust" else "",
                )
            )
    return found


def decision(low: float, high: float, *, reliable: bool, num_seeds: int) -> str:
    """Return what an interval of a difference in robust accuracy allows to say."""
    if not reliable:
        return "void"
    if num_seeds < ENOUGH:
        return "open"
    return "higher" if low > 0 else "lower" if high < 0 else "open"


def trusted(flags: Sequence[Flag]) -> bool:
    """Return whether groups made by the score may be concluded from ."""
    return not any(flag.raised for flag in flags[:DECIDING])


def verdict(found: Sequence[Effect], flags: Sequence[Flag]) -> list[str]:
    """Return the outcome in sentences: what the decision rule allows to say, and no more."""
    deciding = [effect for effect in found if effect.decision]
    if not trusted(flags):
        raised = ", ".join(flag.name.replace("_", " ") for flag in flags[:DECIDING] if flag.raised)
        return [f"Void: the score is not trustworthy ({raised}), so nothing follows from groups."]
    sentences = [
        f"{effect.which}, share {effect.share:g}, {effect.remedy}: robust accuracy is "
        f"{effect.decision} than that of random instances: {interval(effect)} points."
        for effect in deciding
        if effect.decision != "open"
    ]
    count = len(deciding)
    rest = sum(effect.decision == "open" for effect in deciding)
    if rest == count:
        return [f"Open: in none of {count} comparisons does the interval exclude 0."]
    return [*sentences, f"{rest} of {count} comparisons are open."]


def interval(effect: Effect) -> str:
    """Return "-1.20 [-3.00, +0.60]": points, or nats for the loss."""
    factor = 1 if effect.measure == "overfit" else 100
    mean, low, high = (factor * value for value in (effect.mean, effect.low, effect.high))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def rows(
    models: Sequence[Model], test: Sequence[Mapping[str, float]], found: Sequence[Effect]
) -> list[dict[str, str]]:
    """Return the table: accuracies, differences from random, decisions; texts by column."""
    by_arm: dict[Any, list[Mapping[str, float]]] = {}
    strengths = {model.arm: model.strength for model in models}
    for model, measurements in zip(models, test, strict=True):
        by_arm.setdefault(model.arm, []).append(measurements)
    compared = {(e.remedy, e.which, e.share, e.measure): e for e in found}
    table = []
    for (remedy, which, share), values in by_arm.items():
        strength = strengths[remedy, which, share]
        row = {
            "group": which,
            "treatment": remedy if strength is None else f"{remedy} {strength:g}",
            "share": "1" if share is None else f"{share:g}",
        }
        for measure in test[0]:
            factor, digits = (1, 3) if measure == "overfit" else (100, 1)
            mean = factor * sum(one[measure] for one in values) / len(values)
            row[TITLES[measure]] = f"{mean:.{digits}f}"
        for measure in test[0]:
            effect = compared.get((remedy, which, share, measure))
            shown = "" if effect is None else interval(effect)
            row[f"{TITLES[measure].partition(' (')[0]} minus random"] = shown
        effect = compared.get((remedy, which, share, "robust"))
        row["decision"] = "" if effect is None else effect.decision
        table.append(row)
    return table


def markdown(table: Sequence[Mapping[str, str]], notes: Sequence[str]) -> str:
    """Return rows of texts as a Markdown table with paragraphs below."""
    header = list(table[0])
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row[name] for name in header) + " |" for row in table]
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def note(seeds: Sequence[int], found: Sequence[Effect]) -> str:
    """Return how the table's numbers are to be read."""
    count = max(1, sum(effect.measure == "robust" for effect in found))
    each = 100 * (1 - ERROR / count)
    return (
        f"Test, mean over seeds {', '.join(map(str, seeds))}. Differences from the random "
        f"group in points (loss: nats), paired by seed, with {each:.2f} % intervals: together "
        f"95 % over the {count} comparisons of a measure. Robust accuracy alone decides."
    )


def draw(models: Sequence[Model], found: Sequence[Effect]) -> Figure:
    """Draw the deciding differences with their intervals, and the loss on val by epoch."""
    deciding = [effect for effect in found if effect.measure == "robust"]
    figure = Figure(figsize=(11, 1.6 + 0.3 * max(6, len(deciding))), layout="constrained")
    forest, curves = figure.subplots(1, 2)
    for place, effect in enumerate(deciding):
        points = [100 * value for value in effect.differences]
        forest.plot(points, [place] * len(points), "o", color="0.7", markersize=3)
        bounds = [[100 * (effect.mean - effect.low)], [100 * (effect.high - effect.mean)]]
        forest.errorbar(100 * effect.mean, place, xerr=bounds, fmt="o", color="C0", capsize=3)
    names = [f"{e.which} {e.share:g} {e.remedy}: {e.decision}" for e in deciding]
    forest.set_yticks(range(len(names)), names)
    forest.invert_yaxis()
    forest.axvline(0, color="0.3", linewidth=1)
    forest.set_xlabel("robust accuracy minus that of the random group (points)")
    forest.set_title("grey: seeds; bars: together 95 %", fontsize="small")
    first = [model for model in models if model.remedy == models[0].remedy]
    shares = [share for share in dict.fromkeys(model.share for model in first) if share is not None]
    groups = list(dict.fromkeys(model.which for model in first))
    styles: dict[float | None, str] = dict(
        zip(shares, itertools.cycle(("-", "--", ":")), strict=False)
    )
    for arm in dict.fromkeys(model.arm for model in first):
        own = [dict(model.curve) for model in first if model.arm == arm]
        _, which, share = arm
        epochs = list(own[0])
        means = [sum(curve[epoch] for curve in own) / len(own) for epoch in epochs]
        label = which if share is None else f"{which} {share:g}"
        style = {"color": f"C{groups.index(which)}", "linestyle": styles.get(share, "-.")}
        style["marker"] = "o" if len(epochs) == 1 else ""
        curves.plot(epochs, means, label=label, **style)
    curves.set_xlabel("epoch")
    curves.set_ylabel("clean loss on val (nats)")
    curves.set_title(f"{first[0].remedy}: mean over seeds", fontsize="small")
    # Curves fill the axes from corner to corner: the names stand beside them.
    curves.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (forest, curves):
        axes.grid(alpha=0.3)
    return figure
