"""Robust instances: does it matter for robustness which training examples a model learns from?

Purpose: the study that the image extension of "Characterizing the Impacts of Instances on
Robustness" (Findings of ACL 2023, 2023.findings-acl.146) could not decide. Statistics are collected
once; then a network is trained from scratch on the most robust, the middle ("swing") and the least
robust instances, on as many random ones, and on all; or on all with the loss of such a group kept
above zero (flooding, soft labels). Equal group sizes, equal updates, equal classes.

Decision rule, written before any run:

1. The score must be trustworthy, or nothing is concluded from groups made by it: the identity
   perturbation changes no loss at all, and the score's Spearman correlation between even and odd
   records, and between statistics of other seeds, is at least .7 each. The statistics' seeds are
   none of the seeds of training.
2. A *comparison* is one group (robust, swing, non-robust) at one share under one treatment (subset,
   flooding, soft label). Its effect is the difference of accuracy between the group and the random
   group of the same size, seed by seed: a seed fixes initial weights, order, augmentation and the
   draw of the random group, and both sides make the same number of updates.
3. Where a treatment has a strength (flood level, confidence), it is chosen for each group and share
   by mean robust accuracy on val, for the random group as for the others. Test is then read once,
   for what was chosen.
4. Robust accuracy on test decides. An effect is called higher or lower if Student's interval of the
   mean difference over seeds, at confidence 1 - .05 / m for m comparisons (Bonferroni), excludes 0;
   otherwise, and with fewer than five seeds, the question is open. That is stricter than 2
   standard errors.
5. Clean accuracy, corruptions, and how far the loss on val rises from its lowest to its last value
   (overfitting) are described with the same intervals and decide nothing. "All" is a reference.

Command: ``python experiments/robust_instances.py [--remedies subset flooding soft_label]``; an
interrupted study goes on where it was. --statistics reuses what an earlier study has collected.
Time: see the preset's header. On a cluster: more --shares, --seeds and another --preset.
Output: ``table.md``, ``results.json``, ``effects.png`` and ``report/report.html`` (data map whose
points show their picture) in --output; the searches' run folders in its ``runs``.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

import numpy as np  # noqa: E402  after the path
import tyro  # noqa: E402

from robustft.config import replaced  # noqa: E402
from robustft.data import Task, load_task  # noqa: E402
from robustft.errors import ConfigError  # noqa: E402
from robustft.evaluation import EvaluationConfig, Flag, evaluate  # noqa: E402
from robustft.evaluation.instance_report import write_instance_report  # noqa: E402
from robustft.evaluation.suites import measures  # noqa: E402
from robustft.methods.instance_selection import score  # noqa: E402
from robustft.methods.instance_statistics import InstanceStatistics  # noqa: E402
from robustft.runtime import instance_study as study  # noqa: E402
from robustft.runtime.experiment import Experiment, load_experiment  # noqa: E402
from robustft.runtime.outputs import command_line  # noqa: E402
from robustft.runtime.results import load_result  # noqa: E402
from robustft.runtime.session import default_output  # noqa: E402
from robustft.runtime.starts import load_or_fresh  # noqa: E402
from robustft.runtime.text_runs import AnyStart  # noqa: E402

MEASURES = ("clean", "robust", "corruptions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(study.StudyOptions):
    """Robust instances: does it matter which training examples a model learns from?"""

    preset: str = "instances-embedded"
    """Preset name or YAML file; its method is instances, and says what is measured and how."""
    output: Path = dataclasses.field(default_factory=partial(default_output, "robust-instances"))
    """Folder of tables, figure and report."""


def prepared(options: Options) -> Experiment:
    """Return the preset's experiment with what the options say of data, length and score.

    Raises:
        ConfigError: the preset attacks nothing on test.
    """
    base = load_experiment(options.preset)
    if not set(measures(base.evaluation.suite)) - {"clean", "corruptions"}:
        raise ConfigError("evaluation.suite names no attack, and robust accuracy decides: add apgd")
    task = replaced(base.task, root=options.root, limit_train=options.limit_train)
    group = replaced(base.method.group, metric=options.metric, perturbation=options.perturbation)
    method = replaced(base.method, epochs=options.epochs, group=group)
    evaluation = replaced(base.evaluation, limit=options.limit)
    return dataclasses.replace(base, task=task, method=method, evaluation=evaluation)


def measured(
    models: Sequence[study.Trained],
    start: AnyStart,
    task: Task,
    config: EvaluationConfig,
    mapper: Any,
) -> list[dict[str, float]]:
    """Return accuracies on test, which is read here and nowhere else, for each model."""
    found = []
    for model in models:
        state = load_result(model.folder).state
        network = dataclasses.replace(start, state=state).build()
        metrics = evaluate(network, task, config=config, map=mapper).metrics
        test = {name: metrics[name] for name in MEASURES if name in metrics}
        # Of one look at val there is no rise.
        found.append({**test, "overfit": model.overfit} if len(model.curve) > 1 else test)
    return found


def report(
    base: Experiment,
    options: Options,
    task: Task,
    statistics: InstanceStatistics,
    flags: Sequence[Flag],
    found: study.Conclusion,
) -> Path:
    """Write the page with the data map, the groups and the outcome."""
    group, split = base.method.group, task.splits["train"]
    perturbation = study.perturbation_of(group, statistics)
    summary = statistics.aggregate(perturbation, only_correct=group.only_correct)
    order = np.argsort(split.ids, kind="stable")
    manifest = statistics.manifest
    return write_instance_report(
        options.output / "report",
        summary,
        title=f"Robust instances of {task.name}",
        score=score(summary, group.metric),
        score_name=f"{group.metric} under {perturbation}",
        pictures=split.images[order],
        groups=study.group_masks(options, summary, group, task.num_classes),
        checks=flags,
        verdict=found.sentences,
        outcome=found.table,
        facts={
            "data": f"{manifest.data}, {manifest.split}",
            "model": manifest.model,
            "training": base.method.training,
            "updates": f"{statistics.records[-1].global_step:,}",
            "seeds of training": ", ".join(map(str, options.seeds)),
            "attack on test": base.evaluation.suite,
            "threat model": str(task.threat),
        },
        command=command_line(sys.argv),
        class_names=task.class_names,
    )


def conclude(
    base: Experiment,
    options: Options,
    task: Task,
    folders: Sequence[Path],
    models: Sequence[study.Trained],
    mapper: Any,
) -> str:
    """Read test for what val has chosen, write everything, and return the table as text."""
    study.require_fair(models)
    statistics = [InstanceStatistics(folder, split=task.splits["train"]) for folder in folders]
    flags = study.checks(statistics, base.method.group)
    kept = study.chosen(models)
    test = measured(kept, load_or_fresh(base, task), task, base.evaluation, mapper)
    perturbation = study.perturbation_of(base.method.group, statistics[0])
    found = study.concluded(options, base.method.group, perturbation, flags, models, kept, test)
    report(base, options, task, statistics[0], flags, found)
    return found.text


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    base = prepared(options)

    def concluding(folders: Sequence[Path], models: Sequence[study.Trained], mapper: Any) -> str:
        return conclude(base, options, load_task(base.task), folders, models, mapper)

    sys.stdout.write(study.conducted(base, options, concluding))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
