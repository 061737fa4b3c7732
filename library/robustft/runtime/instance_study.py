"""Studies of robust instances, of images or of text: what is trained, and what may be concluded.

One search per seed and treatment trains groups x shares (x strengths), all from one artifact of
statistics; strengths are chosen on val; the score must be reliable before groups made by it say
anything. The scripts in ``experiments/`` hold the decision rules, and what differs by modality.
"""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustft.config import to_dict
from robustft.errors import ConfigError, RunError
from robustft.evaluation import Flag
from robustft.evaluation.group_study import (
    CONTROL,
    REFERENCE,
    draw,
    effects,
    markdown,
    note,
    rows,
    trusted,
    verdict,
)
from robustft.methods.instance_config import GroupConfig
from robustft.methods.instance_losses import MitigationConfig
from robustft.methods.instance_perturbations import IDENTITY
from robustft.methods.instance_selection import Aggregates, confounding, reliability, split_groups
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.runtime.events import EventPump
from robustft.runtime.experiment import Experiment, SearchConfig
from robustft.runtime.fanout import Fanout
from robustft.runtime.jsonfile import write_json
from robustft.runtime.results import load_result
from robustft.runtime.run import run
from robustft.runtime.session import connect

__all__ = [
    "Remedy",
    "StudyOptions",
    "Trained",
    "checks",
    "chosen",
    "collected",
    "collecting",
    "concluded",
    "conducted",
    "folder_of",
    "group_masks",
    "perturbation_of",
    "require_fair",
    "trained",
    "training",
]

Remedy = Literal["subset", "flooding", "soft_label"]
Which = Literal["robust", "swing", "non-robust"]

RELIABLE = 0.7
"""Spearman's correlation below which a score is not used."""
DIFFICULTY, CLASSES = 0.9, 0.5
"""Where a warning begins: correlation with the clean loss, variance that the class explains."""
STRENGTH = {"flooding": "mitigation.level_quantile", "soft_label": "mitigation.confidence"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a study compares, whatever the instances are."""

    preset: str
    """Preset name or YAML file; its method says what is measured and how."""
    groups: tuple[Which, ...] = ("robust", "swing", "non-robust")
    """Groups that are compared with the random one."""
    shares: tuple[float, ...] = (0.1, 0.3)
    """Sizes of the groups, as parts of the training split; above 1/3 without swing, which would
    overlap the others there."""
    remedies: tuple[Remedy, ...] = ("subset",)
    """subset: train on the group alone; flooding, soft_label: on all, the group's loss treated."""
    level_quantiles: tuple[float, ...] = (0.5, 0.75, 0.9)
    """Flood levels, as quantiles of the group's loss at the end of the statistics' training."""
    confidences: tuple[float, ...] = (0.9, 0.8)
    """Confidences of soft labels."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of weights, order and the random group, at least two; a claim needs five."""
    statistics_seeds: tuple[int, ...] = (100, 101)
    """Seeds of the runs that are measured, none of ``seeds``: the first ranks the instances, the
    others say how reliable that is."""
    statistics: tuple[Path, ...] = ()
    """Folders of statistics that exist, in place of collecting them."""
    metric: str | None = None
    """Score, e.g. difficulty_corrected_r; None: as the preset says."""
    perturbation: str | None = None
    """Perturbation that the score is of; None: as the preset says."""
    epochs: int | None = None
    """Length of every training; None: as the preset says."""
    root: str | None = None
    """Folder of the data, where they are not embedded."""
    limit_train: int | None = None
    """Use so many training examples; None: as the preset says."""
    limit: int | None = None
    """Examples of test to measure; None: as the preset says."""
    output: Path
    """Folder of tables, figure and report."""

    def __post_init__(self) -> None:
        if "swing" in self.groups and any(3 * share > 1 for share in self.shares):
            raise ConfigError("shares above 1/3 make groups that overlap: leave swing out there")
        if set(self.seeds) & set(self.statistics_seeds):
            raise ConfigError("statistics_seeds must be none of seeds: scores know their own run")
        if len(self.seeds) < 2:
            raise ConfigError("an interval needs at least two seeds, a claim at least five")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A model of the study: how it was trained, what val says of it, and where it lies.

    Args:
        share: of the group; None for all instances.
        strength: of the remedy; None for subsets.
        size: instances in the group.
        updates: that training made.
        val: "val/clean", "val/robust" (fractions) and "val/loss" (nats).
        curve: (epoch, "val/loss") wherever it was measured.
        folder: what ``load_result`` reads.
    """

    remedy: str
    which: str
    share: float | None
    strength: float | None
    seed: int
    size: int
    updates: int
    val: Mapping[str, float]
    curve: Sequence[tuple[int, float]]
    folder: Path

    @property
    def arm(self) -> tuple[str, str, float | None]:
        return self.remedy, self.which, self.share

    @property
    def overfit(self) -> float:
        """How far the loss on val has risen above its lowest value, in nats."""
        losses = [loss for _, loss in self.curve]
        return losses[-1] - min(losses)


def seeded(base: Experiment, seed: int, method: Any) -> Experiment:
    """Return the experiment of one seed, of initial weights and of training.

    What a search itself reads of test is reduced to a few clean pictures of one model: test is for
    what val has chosen, over all seeds.
    """
    evaluation = dataclasses.replace(base.evaluation, suite="clean", limit=100, sanity=False)
    return dataclasses.replace(
        base,
        start=dataclasses.replace(base.start, seed=seed),
        method=dataclasses.replace(method, seed=seed),
        search=SearchConfig(metric="val/robust", max_concurrent=base.search.max_concurrent),
        evaluation=evaluation,
    )


def collecting(base: Experiment, seed: int, folder: Path) -> Experiment:
    """Return the run on all instances whose statistics are written to ``folder``."""
    collect = dataclasses.replace(base.method.collect, folder=str(folder.resolve()))
    return seeded(base, seed, dataclasses.replace(base.method, collect=collect))


def training(
    base: Experiment, remedy: str, seed: int, folder: Path, options: StudyOptions
) -> Experiment:
    """Return one seed's search under one treatment: groups x shares (x strengths).

    All its trials begin at the same weights and read the same statistics. A grid has no holes, so
    "all" is trained once for each share.
    """
    space: dict[str, list[Any]] = {
        "group.which": [*options.groups, CONTROL, REFERENCE],
        "group.share": list(options.shares),
    }
    mitigation = MitigationConfig()
    if remedy == "flooding":
        first = options.level_quantiles[0]
        mitigation = MitigationConfig(kind="flooding", level_quantile=first)
        space[STRENGTH[remedy]] = list(options.level_quantiles)
    elif remedy == "soft_label":
        mitigation = MitigationConfig(kind="soft_label", confidence=options.confidences[0])
        space[STRENGTH[remedy]] = list(options.confidences)
    group = dataclasses.replace(
        base.method.group, statistics=str(folder.resolve()), which=REFERENCE, seed=seed
    )
    method = dataclasses.replace(
        base.method,
        collect=type(base.method.collect)(batch_size=base.method.collect.batch_size),
        group=group,
        use="subset" if remedy == "subset" else "loss",
        mitigation=mitigation,
    )
    experiment = seeded(base, seed, method)
    search = dataclasses.replace(experiment.search, space=space)
    return dataclasses.replace(experiment, search=search)


def folder_of(experiment: Experiment, name: str, options: StudyOptions) -> Path:
    """Return a run folder that only the same experiment finds again."""
    return options.output / "runs" / f"{name}-{experiment.fingerprint[:6]}"


def trained(directory: Path, remedy: str, seed: int) -> list[Trained]:
    """Return the models of a search's run folder, one per group, share and strength.

    Raises:
        RunError: a trial failed, so that a comparison would be incomplete.
    """
    found: dict[Any, Trained] = {}
    for file in sorted(directory.glob("search/tune/*/checkpoint_*/trial.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        values = record["values"]
        if record["error"]:
            raise RunError(f"a trial of {directory} failed ({values}): {record['error']}")
        result = load_result(file.parent)
        which, strength = values["group.which"], values.get(STRENGTH.get(remedy, ""))
        rows = [row for row in result.tables["epochs"] if row.get("val/loss") is not None]
        model = Trained(
            remedy=remedy,
            which=which,
            share=None if which == REFERENCE else values["group.share"],
            strength=strength,
            seed=seed,
            size=int(result.choices["group_size"]),
            updates=int(result.metrics["updates"]),
            val={name: result.metrics[name] for name in ("val/clean", "val/robust", "val/loss")},
            curve=[(row["epoch"], row["val/loss"]) for row in rows],
            folder=file.parent,
        )
        found.setdefault((*model.arm, strength), model)
    return list(found.values())


def require_fair(models: Sequence[Trained]) -> None:
    """Raise RunError unless all made as many updates, and groups of a share are of equal size."""
    if len({model.updates for model in models}) > 1:
        raise RunError("models of the study differ in their number of updates: nothing compares")
    for share in {model.share for model in models}:
        sizes = {model.which: model.size for model in models if model.share == share}
        if len(set(sizes.values())) > 1:
            raise RunError(f"groups of share {share} differ in size: {sizes}")


def chosen(models: Sequence[Trained]) -> list[Trained]:
    """Return, for every group and share, the models of the strength that is best on val.

    Raises:
        RunError: a seed of a group is missing.
    """
    seeds = {model.seed for model in models}
    kept = []
    for arm in dict.fromkeys(model.arm for model in models):
        strengths: dict[float | None, list[Trained]] = {}
        for model in models:
            if model.arm == arm:
                strengths.setdefault(model.strength, []).append(model)
        for own in strengths.values():
            if {model.seed for model in own} != seeds or len(own) != len(seeds):
                raise RunError(f"{arm} lacks a seed: run the study again, it goes on")
        kept += max(
            strengths.values(),
            key=lambda own: sum(model.val["val/robust"] for model in own),
        )
    return kept


def checks(statistics: Sequence[InstanceStatistics], group: GroupConfig) -> list[Flag]:
    """Return whether the score can be trusted; the first three decide (``trusted``)."""
    first, metric = statistics[0], group.metric
    perturbation = perturbation_of(group, first)
    summary = first.aggregate(perturbation, only_correct=group.only_correct)
    found = [_identity(first)]
    halves, across = math.nan, math.nan
    if len(first.records) > 1:
        parts = first.halves(perturbation, only_correct=group.only_correct)
        halves = reliability(parts, metric)
    if len(statistics) > 1:
        others = [
            one.aggregate(perturbation, only_correct=group.only_correct) for one in statistics[1:]
        ]
        across = reliability([summary, *others], metric)
    for name, value, of in (
        ("split_half_reliability", halves, "even and odd records"),
        ("reliability_across_seeds", across, "runs with other seeds"),
    ):
        text = f"Spearman's correlation of the score between {of}; at least {RELIABLE} is needed."
        found.append(Flag(name=name, raised=not value >= RELIABLE, value=value, text=text))
    mixed = confounding(summary, metric)
    for name, limit, text in (
        ("clean_loss", DIFFICULTY, "Spearman's correlation of the score with the mean clean loss"),
        ("label", CLASSES, "Share of the score's variance that the class explains"),
    ):
        far = f"{text}; above {limit} the score says little else."
        raised = abs(mixed[name]) > limit
        found.append(Flag(name=f"score_and_{name}", raised=raised, value=mixed[name], text=far))
    for other in first.manifest.perturbations:
        if other not in (perturbation, IDENTITY):
            same = first.aggregate(other, only_correct=group.only_correct)
            value = reliability([summary, same], metric)
            text = f"Spearman's correlation with the same score under {other}."
            found.append(Flag(name="agreement", raised=False, value=value, text=text))
    return found


def _identity(statistics: InstanceStatistics) -> Flag:
    worst = math.nan
    if IDENTITY in statistics.manifest.perturbations:
        values = statistics.aggregate(IDENTITY, quantities=("loss_diff",)).values
        worst = max(float(np.abs(values[f"loss_diff_{kind}"]).max()) for kind in ("mean", "std"))
    text = "Largest change of a loss under the perturbation that changes nothing; must be 0."
    return Flag(name="identity", raised=worst != 0, value=worst, text=text)


def collected(base: Experiment, options: StudyOptions) -> list[Path]:
    """Train and measure once for each seed of the statistics; return their folders."""
    folders = []
    for seed in options.statistics_seeds:
        folders.append(options.output / f"statistics-{seed}")
        experiment = collecting(base, seed, folders[-1])
        run(experiment, run_dir=folder_of(experiment, f"statistics-{seed}", options))
    return folders


def perturbation_of(group: GroupConfig, statistics: InstanceStatistics) -> str:
    """Return the name of the perturbation that scores are of."""
    return group.perturbation or next(iter(statistics.manifest.perturbations))


def group_masks(
    options: StudyOptions, summary: Aggregates, group: GroupConfig, num_classes: int
) -> dict[str, NDArray[np.bool_]]:
    """Return title -> bool ``[N]`` of the groups of the largest share, as a report shows them."""
    share = max(options.shares)
    return {
        f"{which}, share {share:g}": split_groups(
            summary,
            group.metric,
            share=share,
            groups=(which,),
            balance=group.balance,
            num_classes=num_classes,
            seed=options.seeds[0],
        )[which]
        for which in (*options.groups, CONTROL)
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conclusion:
    """What a study ends in: effects, the table's rows, the sentences, and all of it as text."""

    effects: Sequence[Any]
    table: Sequence[Mapping[str, str]]
    sentences: Sequence[str]
    text: str


def concluded(
    options: StudyOptions,
    group: GroupConfig,
    perturbation: str,
    flags: Sequence[Flag],
    models: Sequence[Trained],
    kept: Sequence[Trained],
    test: Sequence[Mapping[str, float]],
) -> Conclusion:
    """Compare the groups; write ``table.md``, ``results.json`` and ``effects.png``.

    Args:
        options: of the study.
        group: how instances were scored.
        perturbation: of the score.
        flags: whether the score can be trusted.
        models, kept: all, and those that val has chosen.
        test: measure -> value of each kept model.
    """
    found = effects(kept, test, reliable=trusted(flags))
    table, said, how = rows(kept, test, found), verdict(found, flags), note(options.seeds, found)
    text = markdown(table, [how, *said])
    (options.output / "table.md").write_text(text, encoding="utf-8")
    results = {
        "verdict": said,
        "perturbation": perturbation,
        "metric": group.metric,
        "checks": [dataclasses.asdict(flag) for flag in flags],
        "effects": [dataclasses.asdict(effect) for effect in found],
        "models": [
            {**to_dict(model), "test": dict(values)}
            for model, values in zip(kept, test, strict=True)
        ],
        "not_chosen": to_dict([model for model in models if model not in kept]),
    }
    write_json(options.output / "results.json", results)
    draw(kept, found).savefig(options.output / "effects.png", dpi=150)
    return Conclusion(effects=found, table=table, sentences=[*said, how], text=text)


def conducted(
    base: Experiment,
    options: StudyOptions,
    conclude: Callable[[Sequence[Path], Sequence[Trained], Any], str],
) -> str:
    """Collect, train and conclude; an interrupted study goes on where it was.

    Args:
        base: the experiment that all runs are made from.
        options: what is compared.
        conclude: (folders of statistics, models, mapper) -> the outcome as text.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(connect(base.runtime))  # Once for all runs.
        folders = list(options.statistics) or collected(base, options)
        models = []
        for remedy, seed in itertools.product(options.remedies, options.seeds):
            experiment = training(base, remedy, seed, folders[0], options)
            directory = folder_of(experiment, f"{remedy}-{seed}", options)
            run(experiment, run_dir=directory)
            models += trained(directory, remedy, seed)
        pump = EventPump([])
        stack.callback(pump.close)
        flight = 2 * max(1, session.num_cpus)
        mapper = Fanout(options.output / "items", pump, stage="evaluate", max_in_flight=flight)
        return conclude(folders, models, mapper)
