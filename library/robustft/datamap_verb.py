"""The verb ``robustft datamap``: stored statistics of training instances as a picture and a page.

torch is imported only when it runs, so that ``robustft --help`` is quick.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from robustft.errors import ConfigError, DataError
from robustft.verbs import Answer, Flag, Options, table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from robustft.methods.instance_format import Manifest

__all__ = ["Datamap", "draw_datamap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datamap(Options):
    """Draw the data map of stored statistics: how robust every training instance stayed.

    Example: robustft datamap runs/robust-instances/statistics-100 --output datamap/
    """

    statistics: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="STATISTICS")]]
    """Folder of the statistics: collect.folder of the run that wrote them."""
    perturbation: str | None = None
    """Which perturbation; None: the first that was measured."""
    metric: str = "perturbed_loss_mean_r"
    """Score that the strips and groups are ordered by, most robust first."""
    only_correct: Flag = False
    """Use only records in which the clean prediction is right."""
    share: float = 0.3
    """Size of the groups in the page's table, as a part of the instances."""
    root: str | None = None
    """Folder with the data files, for the pictures; None: under $ROBUSTFT_HOME."""
    seed: int = 0
    """Of the random group, and of the sample of points that carry their instance."""
    output: Path = Path("datamap")
    """Folder for report.html and plots/data-map.png."""


class Shown(NamedTuple):
    """What the points of a map show, aligned by id; and why they show nothing, or ""."""

    pictures: "NDArray[np.uint8] | None" = None
    sentences: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    why_not: str = ""


def draw_datamap(verb: Datamap) -> Answer:
    """Write the data map and its page from the statistics that the command line names."""
    from robustft.evaluation.instance_report import write_instance_report
    from robustft.methods.instance_config import GroupConfig
    from robustft.methods.instance_selection import score, split_groups
    from robustft.methods.instance_statistics import InstanceStatistics
    from robustft.runtime.instance_study import checks, perturbation_of
    from robustft.runtime.outputs import command_line

    statistics = InstanceStatistics(verb.statistics)
    manifest = statistics.manifest
    group = GroupConfig(
        perturbation=verb.perturbation, metric=verb.metric, only_correct=verb.only_correct
    )
    perturbation = perturbation_of(group, statistics)
    summary = statistics.aggregate(perturbation, only_correct=verb.only_correct)
    keys = score(summary, verb.metric)
    masks = split_groups(summary, verb.metric, share=verb.share, seed=verb.seed)
    # Other seeds' statistics are a study's matter.
    flags = [
        flag for flag in checks([statistics], group) if flag.name != "reliability_across_seeds"
    ]
    shown = _shown(manifest, statistics.ids, verb.root)
    page = write_instance_report(
        verb.output,
        summary,
        title=f"Instances of {manifest.data}",
        score=keys,
        score_name=f"{verb.metric} under {perturbation}",
        pictures=shown.pictures,
        sentences=shown.sentences,
        groups={f"{name}, share {verb.share:g}": mask for name, mask in masks.items()},
        checks=flags,
        facts={
            "statistics": str(verb.statistics),
            "data": f"{manifest.data}, {manifest.split}",
            "model": manifest.model,
            "updates": f"{statistics.records[-1].global_step:,}",
            "target": manifest.target,
            **({"pictures": shown.why_not} if shown.why_not else {}),
        },
        command=command_line(sys.argv),
        class_names=shown.class_names,
        seed=verb.seed,
    )
    plot = verb.output / "plots" / "data-map.png"
    rows = [
        {"check": flag.name, "value": flag.value, "raised": "yes" if flag.raised else "no"}
        for flag in flags
    ]
    document = {
        "output": str(verb.output),
        "report": str(page),
        "plot": str(plot),
        "instances": len(summary.ids),
        "records": summary.num_records,
        "perturbation": perturbation,
        "metric": verb.metric,
        "without_pictures": shown.why_not or None,
        "checks": rows,
    }
    note = f"\n\nWithout pictures: {shown.why_not}" if shown.why_not else ""
    return Answer(document, f"{table(rows)}{note}\n\n{plot}\n{page}")


def _shown(manifest: "Manifest", ids: "NDArray[np.int64]", root: str | None) -> Shown:
    """Return the pictures or sentences of the instances, if the data at hand are the run's."""
    import numpy as np

    from robustft.data.datasets import DATASETS, load_dataset
    from robustft.data.text_sets import TEXT_DATASETS, load_text_set
    from robustft.methods.instance_format import fingerprint

    if manifest.data not in DATASETS and manifest.data not in TEXT_DATASETS:
        return Shown(why_not=f"{manifest.data} is no data set that robustft knows.")
    images = texts = None
    try:
        if manifest.data in DATASETS:
            images = load_dataset(manifest.data, root=root)
            there, labels = images.train.ids, images.train.labels
        else:
            texts = load_text_set(manifest.data, root=root).train
            there, labels = texts.positions, texts.labels
    except (ConfigError, DataError) as error:
        return Shown(why_not=f"the data cannot be read ({error}).")
    order = np.argsort(there, kind="stable")
    rows = order[np.searchsorted(there[order], ids).clip(max=len(order) - 1)]
    if fingerprint(there[rows], labels[rows]) != manifest.fingerprint:
        return Shown(
            why_not=f"the files of {manifest.data} at hand hold other instances or labels than "
            "those that were measured; name theirs with --root."
        )
    if images is not None:
        return Shown(pictures=images.train.images[rows], class_names=images.class_names)
    assert texts is not None
    first: list[str] = texts.text_a.take(rows).to_pylist()
    names = TEXT_DATASETS[manifest.data].class_names
    if texts.text_b is None:
        return Shown(sentences=first, class_names=names)
    pairs = zip(first, texts.text_b.take(rows).to_pylist(), strict=True)
    return Shown(sentences=[f"{one} / {other}" for one, other in pairs], class_names=names)
