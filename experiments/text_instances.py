"""Robust instances of text: does it matter for robustness which sentences a model learns from?

Purpose: the claim of "Characterizing the Impacts of Instances on Robustness" (Findings of ACL 2023,
2023.findings-acl.146) where it was made, on text: sentences whose loss stays low under a
perturbation of their word embeddings ("robust") and those whose loss does not act in opposite
directions on robustness. Statistics are collected once; then the encoder is fine-tuned on the most
robust, the middle ("swing") and the least robust sentences, on as many random ones, and on all; or
on all with the loss of such a group kept above zero. Equal group sizes, equal updates, equal
classes.

Decision rule, written before any run; rules 1 to 3 are those of robust_instances.py:

1. The score must be trustworthy, or nothing is concluded from groups made by it: the identity
   perturbation changes no loss at all, and the score's Spearman correlation between even and odd
   records, and between statistics of other seeds, is at least .7 each. The statistics' seeds are
   none of the seeds of training.
2. A *comparison* is one group at one share under one treatment. Its effect is the difference
   between the group and the random group of the same size, seed by seed: a seed fixes the
   classifier's initial weights, order, dropout and the draw of the random group.
3. Where a treatment has a strength, it is chosen for each group and share by mean accuracy under
   perturbed embeddings on val, for the random group as for the others. Test is then read once.
4. Robust accuracy on test decides: the share of sentences that stand every attack of the preset's
   suite (DeepWordBug). An effect is called higher or lower if Student's interval of the mean
   difference over seeds, at confidence 1 - .05 / m for m comparisons, excludes 0; otherwise, and
   with fewer than five seeds, the question is open.
5. Clean accuracy, AdvGLUE (148 sentences of SST-2, which is too few to decide by), character noise
   (mean over its levels) and how far the loss on val rises from its lowest to its last value are
   described with the same intervals and decide nothing. So is how much of the score is the length
   of the sentence. "All" is a reference.

Command: ``python experiments/text_instances.py [--remedies subset flooding soft_label]``; an
interrupted study goes on where it was. --statistics reuses what an earlier study has collected.
Time: see the preset's header.
Output: ``table.md``, ``results.json``, ``effects.png`` and ``report/report.html`` (data map whose
points show their sentence) in --output; the searches' run folders in its ``runs``.
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
from robustft.data.text import TextSplit, TextTask, load_text_task  # noqa: E402
from robustft.errors import ConfigError  # noqa: E402
from robustft.evaluation import Flag  # noqa: E402
from robustft.evaluation.instance_report import write_instance_report  # noqa: E402
from robustft.evaluation.text_evaluate import (  # noqa: E402
    ATTACKS,
    TextEvaluationConfig,
    evaluate_text,
    text_measures,
)
from robustft.methods.instance_selection import Aggregates, score, spearman  # noqa: E402
from robustft.methods.instance_statistics import InstanceStatistics  # noqa: E402
from robustft.runtime import instance_study as study  # noqa: E402
from robustft.runtime.experiment import Experiment, load_experiment  # noqa: E402
from robustft.runtime.outputs import command_line  # noqa: E402
from robustft.runtime.results import load_result  # noqa: E402
from robustft.runtime.session import default_output  # noqa: E402
from robustft.runtime.starts import load_or_fresh  # noqa: E402
from robustft.runtime.text_runs import AnyStart  # noqa: E402

NOISE = "char_noise"
LONG = 0.5
"""Correlation of the score with the length of the sentence from which a warning is shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(study.StudyOptions):
    """Robust instances of text: does it matter which sentences a model learns from?"""

    preset: str = "text-instances-embedded"
    """Preset name or YAML file; its method is text-instances, and says what is measured and how."""
    shares: tuple[float, ...] = (0.3,)
    """Sizes of the groups, as parts of the training split; above 1/3 without swing, which would
    overlap the others there."""
    data: str | None = None
    """Data set: rotten_tomatoes, sst2, qqp, qnli, rte or mnli; None: as the preset says."""
    advglue: str | None = None
    """AdvGLUE's dev.json; None: as the preset says."""
    model: str | None = None
    """Encoder: minilm, a folder, or a hub id (its tokeniser goes with it); None: the preset's."""
    output: Path = dataclasses.field(default_factory=partial(default_output, "text-instances"))
    """Folder of tables, figure and report."""


def prepared(options: Options) -> Experiment:
    """Return the preset's experiment with what the options say of data, model, length and score.

    Raises:
        ConfigError: the preset attacks nothing on test.
    """
    base = load_experiment(options.preset)
    if not set(text_measures(base.evaluation.suite)) & set(ATTACKS):
        raise ConfigError(
            "evaluation.suite names no attack, and robust accuracy decides: add deepwordbug"
        )
    task = replaced(
        base.task,
        data=options.data,
        root=options.root,
        advglue=options.advglue,
        tokenizer=options.model,
        limit_train=options.limit_train,
    )
    group = replaced(base.method.group, metric=options.metric, perturbation=options.perturbation)
    method = replaced(base.method, epochs=options.epochs, group=group)
    return dataclasses.replace(
        base,
        task=task,
        start=replaced(base.start, model=options.model),
        method=method,
        evaluation=replaced(base.evaluation, limit=options.limit),
    )


def measured(
    models: Sequence[study.Trained],
    start: AnyStart,
    task: TextTask,
    config: TextEvaluationConfig,
    mapper: Any,
) -> list[dict[str, float]]:
    """Return accuracies on test, which is read here and nowhere else, for each model."""
    found = []
    for model in models:
        network = dataclasses.replace(start, state=load_result(model.folder).state).build()
        metrics = evaluate_text(network, task, config=config, map=mapper).metrics
        named = [name for name in ("clean", "robust", "advglue") if name in metrics]
        test: dict[str, float] = {name: metrics[name] for name in named}
        levels = [
            value
            for name, value in metrics.items()
            if name.startswith(f"{NOISE}-") and "/" not in name
        ]
        if levels:
            test[NOISE] = sum(levels) / len(levels)
        # Of one look at val there is no rise.
        found.append({**test, "overfit": model.overfit} if len(model.curve) > 1 else test)
    return found


def checks(
    statistics: Sequence[InstanceStatistics], split: TextSplit, summary: Aggregates, group: Any
) -> list[Flag]:
    """Return whether the score can be trusted: as for images, and how much of it is length."""
    found = study.checks(statistics, group)
    keys = score(summary, group.metric)
    known = np.isfinite(keys)
    lengths = split.lengths[np.argsort(split.ids, kind="stable")].astype(np.float64)
    value = spearman(keys[known], lengths[known])
    text = (
        "Spearman's correlation of the score with the number of tokens; a perturbation of fixed "
        "length moves each token of a long sentence less."
    )
    return [*found, Flag(name="score_and_length", raised=abs(value) > LONG, value=value, text=text)]


def sentences(split: TextSplit) -> list[str]:
    """Return what a point of the data map shows, in the order of the ids."""
    texts: list[str] = split.text_a.to_pylist()
    if split.text_b is not None:
        pairs = zip(texts, split.text_b.to_pylist(), strict=True)
        texts = [f"{first} / {second}" for first, second in pairs]
    return [texts[row] for row in np.argsort(split.ids, kind="stable")]


def report(
    base: Experiment,
    options: Options,
    task: TextTask,
    statistics: InstanceStatistics,
    summary: Aggregates,
    flags: Sequence[Flag],
    found: study.Conclusion,
) -> Path:
    """Write the page with the data map, the groups and the outcome."""
    group, manifest = base.method.group, statistics.manifest
    return write_instance_report(
        options.output / "report",
        summary,
        title=f"Robust instances of {task.name}",
        score=score(summary, group.metric),
        score_name=f"{group.metric} under {study.perturbation_of(group, statistics)}",
        sentences=sentences(task.splits["train"]),
        groups=study.group_masks(options, summary, group, task.num_classes),
        checks=flags,
        verdict=found.sentences,
        outcome=found.table,
        facts={
            "data": f"{manifest.data}, {manifest.split}",
            "rows removed because of AdvGLUE": f"{len(task.removed):,}",
            "model": manifest.model,
            "updates": f"{statistics.records[-1].global_step:,}",
            "seeds of training": ", ".join(map(str, options.seeds)),
            "measured on test": base.evaluation.suite,
        },
        command=command_line(sys.argv),
        class_names=task.class_names,
    )


def conclude(
    base: Experiment,
    options: Options,
    task: TextTask,
    folders: Sequence[Path],
    models: Sequence[study.Trained],
    mapper: Any,
) -> str:
    """Read test for what val has chosen, write everything, and return the table as text."""
    study.require_fair(models)
    group, split = base.method.group, task.splits["train"]
    statistics = [InstanceStatistics(folder, split=split) for folder in folders]  # type: ignore[arg-type]
    perturbation = study.perturbation_of(group, statistics[0])
    summary = statistics[0].aggregate(perturbation, only_correct=group.only_correct)
    flags = checks(statistics, split, summary, group)
    kept = study.chosen(models)
    test = measured(kept, load_or_fresh(base, task), task, base.evaluation, mapper)
    found = study.concluded(options, group, perturbation, flags, models, kept, test)
    report(base, options, task, statistics[0], summary, flags, found)
    return found.text


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    base = prepared(options)

    def concluding(folders: Sequence[Path], models: Sequence[study.Trained], mapper: Any) -> str:
        return conclude(base, options, load_text_task(base.task), folders, models, mapper)

    sys.stdout.write(study.conducted(base, options, concluding))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
