"""One protocol for all methods: the same start, data, search budget and measurements.

Purpose: what the methods of this library are worth beside each other. Every method fine-tunes one
robust start (text: one pretrained encoder), is searched for the same number of passes, is judged on
val by the same attack and chosen by the same rule; the chosen setting is trained with every seed
and read on test, once.

The protocol, written before any run (docs/comparison.md):

1. A method has one searched field with values in an order that is fixed in ``METHODS``: the
   published or usual one first. As many of them are tried as the budget pays, at least one.
2. The budget is counted in passes of single examples, forwards and backwards, of everything that
   belongs to the method: preparation (criticality, statistics), training, validation inside the
   method. What a trial will cost is computed before it runs (``passes_of``; tests check it against
   counted passes). Judging costs every trial the same and is reported beside it.
3. Every trial is judged on val: clean accuracy, and the mean over the threat models of robust
   accuracy (text: the mean over attacks). Chosen is the highest clean accuracy among the trials
   whose robust accuracy is at most --tolerance below the start's; ties go to the more robust, then
   to the earlier in the order. Where no trial keeps it, the most robust one is taken, and the table
   says so. Text has no robust start: there the first trial of the first method takes its place.
4. What other rules would have chosen is in ``results.json``, all trials are in ``pareto.png``.
5. Intervals are Student's over the seeds of fine-tuning, from one start; another start is another
   comparison (--start_seed 1). Tests are paired over examples, adjusted by Holm.

Command: ``robustft compare --preset embedded`` or ``python experiments/compare_methods.py``; an
interrupted comparison goes on where it was. Text: --preset text.
Time, embedded, counted: about 6,000 passes a second on a core. Start: 365,000 passes (45 s on two
cores). Searches of 12 methods, together 2.8 million, and 33 trials judged for at most 40,000 each:
345 s on two cores. Rows: 3 seeds of 58,000 to 108,000, two at a time and so as long as four: 325 s.
Test: 48 models (12 times the start) of 70,000: 280 s. Ray, reports and MLflow: 25 runs of 8 s.
Together about 20 minutes. Text: about 70, of which a third are attacks on test.
Output: ``table.md``, ``results.json``, ``pareto.png`` and ``report.html`` in --output; run folders
in its ``runs``. All MLflow runs are in one experiment and have the tag "comparison".
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

import numpy as np  # noqa: E402  after the path
import psutil  # noqa: E402
import tyro  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from robustft.config import from_dict, to_dict  # noqa: E402
from robustft.data.text import TextTask  # noqa: E402
from robustft.errors import ConfigError, RunError, UnknownNameError  # noqa: E402
from robustft.evaluation import evaluate  # noqa: E402
from robustft.evaluation.comparison import (  # noqa: E402
    ComparedRun,
    Comparison,
    Cost,
    compare_runs,
    pareto_front,
)
from robustft.evaluation.comparison_report import RunFacts, write_comparison_report  # noqa: E402
from robustft.evaluation.intervals import mean_interval  # noqa: E402
from robustft.evaluation.text_evaluate import evaluate_text  # noqa: E402
from robustft.methods import METHODS as REGISTERED  # noqa: E402
from robustft.models import weight_layers  # noqa: E402
from robustft.runtime.events import EventPump  # noqa: E402
from robustft.runtime.experiment import (  # noqa: E402
    Experiment,
    SearchConfig,
    load_experiment,
    method_name,
    with_values,
)
from robustft.runtime.fanout import Fanout  # noqa: E402
from robustft.runtime.jsonfile import write_json  # noqa: E402
from robustft.runtime.outputs import command_line, start_cache  # noqa: E402
from robustft.runtime.results import load_result  # noqa: E402
from robustft.runtime.run import run  # noqa: E402
from robustft.runtime.session import connect  # noqa: E402
from robustft.runtime.starts import fit_to_task, load_or_fresh, start_task  # noqa: E402
from robustft.runtime.stored_runs import StoredRun, compared_run, load_run  # noqa: E402
from robustft.runtime.text_runs import AnyStart, AnyTask, load_any_task  # noqa: E402
from robustft.runtime.vocabulary import TAGS_VARIABLE  # noqa: E402

ROUNDING = 1e-9
"""Accuracies are counts over n; the slack decides "equal" as whole numbers would."""
SEARCH_SEED = 100
"""Seed of all trials, none of the rows': what is chosen has not seen the rows' luck."""
START = "start"

# What is compared.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table: a method and its search.

    Args:
        method: fields as in a preset, "name" among them.
        field: that is searched.
        values: in the order in which they are tried.
        collect: fields of the run that collects statistics for it beforehand, if it needs them.
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
            fields["group"] = {**GROUP, "statistics": str(folder.resolve())}
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
    return from_dict(REGISTERED[fields["name"]].config, rest)


GROUP = {"which": "robust", "share": 0.3}
STEPS = {
    "attack": {"num_steps": 4, "step_size": 0.04},
    "val_attack": {"num_steps": 5, "step_size": 0.04},
}
IMAGES = {"augment": {"crop_padding": 2}}
ADVERSARIAL = {**IMAGES, **STEPS, "epochs": 2, "schedule": {"name": "cyclic"}, "eval_every": 2}
LINE = {"curve_runs": 1, "curve_attack": {"num_steps": 5, "step_size": 0.04}}
NATURAL = {
    **IMAGES,
    "name": "fine-tune",
    "epochs": 4,
    "val_attack": {"num_steps": 5, "step_size": 0.04},
}
INSTANCES = {**ADVERSARIAL, "name": "instances", "training": "adversarial", "lr": 0.01}
COLLECT = {
    **INSTANCES,
    "epochs": 1,
    "eval_every": 1,
    "collect": {"attacks": [{"norm": "Linf", "eps": 0.1, "num_steps": 3}]},
}
RATES = (0.001, 0.01, 0.0001, 0.003, 0.0003, 0.03)

IMAGE_METHODS: dict[str, Arm] = {
    "at": Arm(
        method={**ADVERSARIAL, "name": "at"}, field="lr", values=(0.01, 0.003, 0.03, 0.001, 0.1)
    ),
    "trades": Arm(
        method={**ADVERSARIAL, "name": "trades"}, field="lr", values=(0.01, 0.003, 0.03, 0.001, 0.1)
    ),
    "rift": Arm(
        method={
            **IMAGES,
            **LINE,
            "name": "rift",
            "modules": "mrc-1",
            "epochs": 4,
            "mrc_batch_size": 128,
            "mrc_epochs": 3,
            "mrc_attack": {"num_steps": 4, "step_size": 0.04},
            "alphas": [0.0, 0.25, 0.5, 0.75, 1.0],
            "tolerance": 0.005,
        },
        field="lr",
        values=RATES,
    ),
    "autolora": Arm(
        method={
            **IMAGES,
            **STEPS,
            "name": "autolora",
            "epochs": 2,
            "optimizer": {"weight_decay": 0.0002},
            "halving": {"checkpoints": [0, 1]},
        },
        field="lr",
        # Published for 32 px: 0.1, without a search.
        values=(0.1, 0.01, 0.03, 0.003),
    ),
    "e-at": Arm(
        method={
            **IMAGES,
            "name": "multinorm",
            "scheme": "error_weighted",
            "epochs": 2,
            "num_steps": 4,
            "val_steps": 5,
            "val_start": False,
            "eval_every": 2,
        },
        field="lr",
        values=(0.05, 0.01, 0.1, 0.003),
    ),
    "flooding": Arm(
        method={**INSTANCES, "mitigation": {"kind": "flooding", "level_quantile": 0.5}},
        field="mitigation.level_quantile",
        values=(0.5, 0.75, 0.9),
        collect=COLLECT,
    ),
    "soft-label": Arm(
        method={**INSTANCES, "mitigation": {"kind": "soft_label", "confidence": 0.8}},
        field="mitigation.confidence",
        values=(0.8, 0.9, 0.7),
        collect=COLLECT,
    ),
    "rose": Arm(
        method={**ADVERSARIAL, "name": "at", "optimizer": {"name": "rose", "weight_decay": 0.01}},
        field="lr",
        values=(0.001, 0.0003, 0.003, 0.0001),
    ),
    "full": Arm(method={**NATURAL, "mode": "full"}, field="lr", values=RATES),
    "last-layer": Arm(
        method={**NATURAL, "mode": "last-layer"},
        field="lr",
        values=(0.01, 0.1, 0.001, 0.03, 0.003, 0.3),
    ),
    "lp-ft": Arm(
        method={**NATURAL, "mode": "lp-ft", "probe": {"epochs": 2}}, field="lr", values=RATES
    ),
    "wise-ft": Arm(
        method={
            **NATURAL,
            "mode": "wise-ft",
            "interpolate": {
                **LINE,
                "alphas": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
                "tolerance": 0.005,
            },
        },
        field="lr",
        values=RATES,
    ),
}

TEXT = {"epochs": 2, "lr": 0.0001, "batch_size": 16}
EMBEDDINGS = {"eps": 0.6, "num_steps": 3}
VANILLA = {**TEXT, "name": "rose", "variant": "vanilla"}
TEXT_INSTANCES = {**TEXT, "name": "text-instances", "val_attack": EMBEDDINGS, "eval_every": 2}
TEXT_COLLECT = {
    **TEXT_INSTANCES,
    "epochs": 1,
    "eval_every": 1,
    "collect": {"attacks": [EMBEDDINGS]},
}
TEXT_RATES = (0.0001, 0.00005, 0.0002, 0.00002, 0.0003)

TEXT_METHODS: dict[str, Arm] = {
    "vanilla": Arm(method={**VANILLA, "loss": {"name": "ce"}}, field="lr", values=TEXT_RATES),
    "r-drop": Arm(method={**VANILLA, "loss": {"name": "r_drop"}}, field="lr", values=TEXT_RATES),
    "freelb": Arm(method={**VANILLA, "loss": {"name": "freelb"}}, field="lr", values=TEXT_RATES),
    "rose": Arm(
        method={**TEXT, "name": "rose", "variant": "ensemble"}, field="lr", values=TEXT_RATES
    ),
    "flooding": Arm(
        method={**TEXT_INSTANCES, "mitigation": {"kind": "flooding", "level_quantile": 0.5}},
        field="mitigation.level_quantile",
        values=(0.5, 0.75, 0.9),
        collect=TEXT_COLLECT,
    ),
}


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


KINDS = {
    "images": Kind(
        methods=IMAGE_METHODS,
        budget=275_000,
        judge={"suite": "clean,apgd-ce", "attack_steps": 10, "limit": None, "num_strips": 0},
        columns={
            "clean": "clean",
            "Linf": "Linf/robust",
            "L2": "L2/robust",
            "L1": "L1/robust",
            "union": "robust",
            "corruptions": "corruptions",
        },
        paired=("clean", "Linf/robust", "robust"),
    ),
    "text": Kind(
        methods=TEXT_METHODS,
        budget=40_000,
        judge={"suite": "clean,deepwordbug", "limit": 150},
        columns={
            "clean": "clean",
            "AdvGLUE": "advglue",
            "typing errors": "char_noise",
            "DeepWordBug": "deepwordbug",
            "synonyms": "synonym_greedy",
            "union": "robust",
        },
        paired=("clean", "deepwordbug", "robust"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One protocol for all methods: the same start, data, search budget and measurements."""

    preset: str = "embedded"
    """embedded or text, a preset's whole name, or a YAML file: task, start and measurements."""
    methods: tuple[str, ...] = ()
    """Rows of the table; none: all of the preset's kind."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every row, at least two."""
    start_seed: int | None = None
    """Seed of the start and its training; None: as the preset says."""
    budget: float | None = None
    """Passes that each method's search may cost; None: the kind's (275,000 images, 40,000
    sentences)."""
    tolerance: float = 0.01
    """How far robust accuracy on val may fall below the start's, a fraction."""
    epochs: int | None = None
    """Length of every fine-tuning; None: as the methods say."""
    root: str | None = None
    """Folder of the data, where they are not embedded."""
    checkpoint: str | None = None
    """Model folder to start from, in place of the start that the preset trains."""
    limit_train: int | None = None
    """Fine-tune on so many examples; None: as the preset says."""
    limit: int | None = None
    """Examples of test to measure; None: as the preset says."""
    limit_val: int | None = None
    """Examples of val; None: as the preset says."""
    attack_steps: int | None = None
    """Steps of APGD on test, images only; None: as the preset says."""
    output: Path | None = None
    """Folder of tables, picture and page; None: runs/<the preset's name>."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ConfigError("an interval needs at least two different seeds: give --seeds 0 1 2")
        if SEARCH_SEED in self.seeds:
            raise ConfigError(f"seed {SEARCH_SEED} is that of the searches: give other --seeds")
        if not 0 <= self.tolerance <= 1:
            raise ConfigError(f"tolerance = {self.tolerance!r}: must be a fraction from 0 to 1")


# What it costs.


@dataclasses.dataclass(frozen=True, slots=True)
class Passes:
    """Passes of single examples through the whole network."""

    forwards: float = 0.0
    backwards: float = 0.0

    @property
    def total(self) -> float:
        return self.forwards + self.backwards

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forwards + other.forwards, self.backwards + other.backwards)

    def times(self, count: float) -> "Passes":
        return Passes(count * self.forwards, count * self.backwards)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the cost of a method depends on besides its config.

    Args:
        train, val: examples.
        norms: threat models of the task.
        layers: convolutions and linear layers of the network.
    """

    train: int
    val: int
    norms: int = 1
    layers: int = 1


def passes_of(config: Any, sizes: Sizes) -> Passes:
    """Return what one training costs, the method's own validation included.

    A pass is one example once forward or once backward through the network, also where only a part
    of it is trained or attacked examples are left out because they are wrong already: an upper
    bound there ("last-layer", "e-at"), exact elsewhere. AutoLoRa may stop early.

    Raises:
        ConfigError: the cost of the method is not known.
    """
    counted = COSTS.get(method_name(config))
    if counted is None:
        raise ConfigError(
            f"what {method_name(config)} costs is not known here: add it to COSTS, with its test"
        )
    return counted(config, sizes)


def _validations(config: Any) -> int:
    """Return how often a method looks at val: every ``eval_every`` epochs, and at the end."""
    return -(-int(config.epochs) // int(config.eval_every))


def _attacked(steps: int) -> Passes:
    """Return what ``validate`` costs an example: clean, PGD, and its answer."""
    return Passes(steps + 2, steps)


def _adversarial(config: Any, sizes: Sizes) -> Passes:
    steps = config.attack.num_steps
    training = Passes(steps + 1, steps + 1).times(sizes.train * config.epochs)
    return training + _attacked(config.val_attack.num_steps).times(sizes.val * _validations(config))


def _trades(config: Any, sizes: Sizes) -> Passes:
    # The clean logits that the attack climbs away from, and both inputs of the update.
    return _adversarial(config, sizes) + Passes(2, 1).times(sizes.train * config.epochs)


def _rift(config: Any, sizes: Sizes) -> Passes:
    tuning = Passes(1, 1).times(sizes.train * config.epochs) + Passes(sizes.val * config.epochs)
    return tuning + _line(config, sizes)


def _line(config: Any, sizes: Sizes) -> Passes:
    """Return what measuring the points of an interpolation costs."""
    steps = config.curve_attack.num_steps
    point = Passes(1) + Passes(steps + 1, steps).times(config.curve_runs)
    return point.times(sizes.val * len(config.alphas))


def _natural(config: Any, sizes: Sizes) -> Passes:
    epochs = config.epochs + (config.probe.epochs if config.mode == "lp-ft" else 0)
    training = Passes(1, 1).times(sizes.train * epochs)
    if config.mode == "wise-ft":
        return training + Passes(1).times(sizes.val * epochs) + _line(config.interpolate, sizes)
    return training + _attacked(config.val_attack.num_steps).times(sizes.val * epochs)


def _multinorm(config: Any, sizes: Sizes) -> Passes:
    steps, norms = config.num_steps, 1 if config.sampled else sizes.norms
    training = Passes(steps + 1, steps).times(norms) + Passes(1, 1)
    apgd = Passes(config.val_steps + 1, config.val_steps)
    looked = Passes(1) + apgd.times(sizes.norms)
    before = looked if config.val_start else Passes(1)
    return (
        training.times(sizes.train * config.epochs)
        + looked.times(sizes.val * _validations(config))
        + before.times(sizes.val)
    )


def _autolora(config: Any, sizes: Sizes) -> Passes:
    steps = config.attack.num_steps
    weights = Passes(config.fixed_lambdas is None)
    training = Passes(steps + 2, steps + 2) + weights
    looked = _attacked(config.val_attack.num_steps)
    return training.times(sizes.train * config.epochs) + looked.times(sizes.val * config.epochs)


def _instances(config: Any, sizes: Sizes) -> Passes:
    steps = config.attack.num_steps if config.training == "adversarial" else 0
    training = Passes(steps + 1, steps + 1).times(sizes.train * config.epochs)
    looked = _attacked(config.val_attack.num_steps) + Passes(1)
    return training + looked.times(sizes.val * _validations(config)) + _records(config, sizes)


def _records(config: Any, sizes: Sizes) -> Passes:
    """Return what statistics cost: attacks from the example itself share the first gradient."""
    if config.collect.folder is None:
        return Passes()
    attacks = [one for one in config.collect.perturbations if not isinstance(one, str)]
    free = sum(one.start_size > 0 for one in attacks)
    steps = sum(one.num_steps for one in attacks)
    shared = max(0, len(attacks) - free - 1)
    fixed = len(config.collect.perturbations) - len(attacks)
    record = Passes(1 + steps + free + fixed, steps - shared)
    return record.times(sizes.train * (1 + math.ceil(config.epochs / config.collect.every)))


def _text_instances(config: Any, sizes: Sizes) -> Passes:
    training = Passes(1, 1).times(sizes.train * config.epochs)
    steps = config.val_attack.num_steps
    looked = Passes(steps + 1, steps)
    return training + looked.times(sizes.val * _validations(config)) + _records(config, sizes)


def _rose(config: Any, sizes: Sizes) -> Passes:
    loss = config.text_loss
    known = {"ce": 1, "two_pass": 2, "r_drop": 2, "freelb": loss.freelb_steps}
    if loss.name not in known:
        raise ConfigError(f"what the loss {loss.name} costs is not known here: add it to _rose")
    step = Passes(known[loss.name], known[loss.name])
    if config.uses_first_order:
        # Two gradients of the disagreement; its two passes are the loss's own if it has them.
        step += Passes(0 if loss.name in ("two_pass", "r_drop") else 2, 2)
    return (step.times(sizes.train) + Passes(1).times(sizes.val)).times(config.epochs)


COSTS: dict[str, Callable[[Any, Sizes], Passes]] = {
    "at": _adversarial,
    "trades": _trades,
    "rift": _rift,
    "fine-tune": _natural,
    "multinorm": _multinorm,
    "autolora": _autolora,
    "instances": _instances,
    "rose": _rose,
    "text-instances": _text_instances,
}


def preparation(arm: Arm, sizes: Sizes, folder: Path | None = None) -> Passes:
    """Return what is spent once before the first trial: criticality, or statistics."""
    config = arm.config(folder)
    found = Passes()
    if method_name(config) == "rift":
        count = min(config.mrc_examples or sizes.val, sizes.val)
        steps = config.mrc_attack.num_steps
        # Of every layer: what comes before it, the loss before, and after each epoch of ascent.
        layer = Passes(2) + Passes(2, 1).times(config.mrc_epochs)
        found += Passes(steps, steps).times(count) + layer.times(count * sizes.layers)
    if arm.collect is not None:
        found += passes_of(arm.collecting(folder or Path()), sizes)
    return found


def affordable(arm: Arm, sizes: Sizes, budget: float) -> Sequence[Any]:
    """Return the first values that the budget pays after the preparation, one at least."""
    left = budget - preparation(arm, sizes).total
    cost = passes_of(arm.config(), sizes).total
    return arm.values[: max(1, math.floor(left / cost + ROUNDING))]


class MemoryWatch(contextlib.AbstractContextManager["MemoryWatch"]):
    """Largest resident memory of any of this machine's Ray workers that runs a trial, in MiB.

    Sampled, and with Python and torch themselves, about 400 MiB of it: good for comparing methods
    in one table. NaN where no trial was seen, as on another machine.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.largest = math.nan
        self._seconds, self._done = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._seconds):
            for process in psutil.Process().children(recursive=True):
                # A worker may end between two looks at it.
                with contextlib.suppress(psutil.Error):
                    if is_trial(" ".join(process.cmdline())):
                        size = process.memory_info().rss / 2**20
                        self.largest = np.fmax(self.largest, size).item()


def is_trial(title: str) -> bool:
    """Return whether a process with this title is a Ray worker that runs a trial."""
    return title.startswith("ray::") and ".train" in title


# What is run.


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


def preset_name(preset: str) -> str:
    """Return the preset that "embedded" or "text" stands for; others are themselves."""
    return f"compare-{preset}" if preset in ("embedded", "text") else preset


def prepared(options: Options) -> Experiment:
    """Return the preset's experiment with what the options say of data, start and test."""
    base = load_experiment(preset_name(options.preset))
    limits = {"limit_train": options.limit_train, "limit_val": options.limit_val}
    task = replaced(base.task, root=options.root, **limits)
    start = base.start
    if options.checkpoint is not None:
        start = dataclasses.replace(start, checkpoint=options.checkpoint, method=None, task=None)
    if options.start_seed is not None:
        start = dataclasses.replace(start, seed=options.start_seed)
        if start.method is not None:
            seeded = dataclasses.replace(start.method, seed=options.start_seed)
            start = dataclasses.replace(start, method=seeded)
    evaluation = replaced(base.evaluation, limit=options.limit)
    if options.attack_steps is not None:
        evaluation = dataclasses.replace(evaluation, attack_steps=options.attack_steps)
    return dataclasses.replace(
        base, task=task, start=start, evaluation=evaluation, search=SearchConfig()
    )


def replaced(config: Any, **changes: Any) -> Any:
    """Return a part of the experiment with those fields changed that were given."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)


def rows_of(kind: Kind, options: Options) -> dict[str, Arm]:
    """Return the methods that are compared, in the table's order whatever that of the options.

    Raises:
        UnknownNameError: no such method.
    """
    for name in options.methods:
        if name not in kind.methods:
            raise UnknownNameError("method of this comparison", name, kind.methods)
    arms = {
        n: arm for n, arm in kind.methods.items() if n in options.methods or not options.methods
    }
    if options.epochs is None:
        return arms
    epochs = {"epochs": options.epochs}
    return {
        name: dataclasses.replace(
            arm,
            method={**arm.method, **epochs},
            collect=None if arm.collect is None else {**arm.collect, **epochs},
        )
        for name, arm in arms.items()
    }


def experiment_of(base: Experiment, method: Any, space: Mapping[str, Sequence[Any]]) -> Experiment:
    """Return an experiment that varies ``space``, its test reduced to a few clean examples."""
    evaluation = dataclasses.replace(base.evaluation, suite="clean", limit=50, sanity=False)
    search = SearchConfig(space={name: list(values) for name, values in space.items()})
    return dataclasses.replace(base, method=method, search=search, evaluation=evaluation)


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
    options: Options
    output: Path
    task: AnyTask
    start: AnyStart
    sizes: Sizes
    mapper: Any

    def run(self, experiment: Experiment, name: str) -> tuple[StoredRun, float]:
        """Run, or go on with, or just read a part of the comparison; return it and its memory."""
        directory = self.output / "runs" / f"{name}-{experiment.fingerprint[:6]}"
        remembered = directory / "memory.json"
        if not (directory / "summary.json").is_file():
            with MemoryWatch() as watch:
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
) -> tuple[Entry, StoredRun]:
    """Choose, train with every seed, read test; ``before`` are the seconds of the preparation."""
    chosen, kept = choose(candidates, reference=reference, tolerance=bench.options.tolerance)
    seeds = bench.options.seeds
    experiment = measuring(bench.base, arm, chosen.value, seeds, folder)
    stored, memory = bench.run(experiment, f"row-{name}")
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


# What is concluded.


def compared(entries: Sequence[Entry], stored: Sequence[StoredRun]) -> list[ComparedRun]:
    """Return start and methods as they enter the tests.

    Raises:
        RunError: two methods did not begin at the same start.
    """
    found = []
    first = stored[0]
    if first.before is not None:
        for one in stored:
            same = one.before is not None and same_outcomes(first.before, one.before)
            if not same:
                raise RunError(
                    f"{one.directory} and {first.directory} began at different starts: remove one "
                    "of them and run the comparison again"
                )
        reference = compared_run(first, START)
        found.append(
            dataclasses.replace(reference, evaluations={"0": first.before}, cost=Cost(num_trials=0))
        )
    for entry, one in zip(entries, stored, strict=True):
        run_of = compared_run(one, entry.name)
        cost = dataclasses.replace(
            run_of.cost,
            forwards=entry.trial.forwards,
            backwards=entry.trial.backwards,
            all_forwards=entry.prepared.forwards + entry.trial.forwards * len(entry.candidates),
            all_backwards=entry.prepared.backwards + entry.trial.backwards * len(entry.candidates),
            all_seconds=entry.search_seconds,
            num_trials=len(entry.candidates),
        )
        found.append(dataclasses.replace(run_of, cost=cost))
    return found


def same_outcomes(one: Any, other: Any) -> bool:
    """Return whether two evaluations agree on every example."""
    return one.masks.keys() == other.masks.keys() and all(
        np.array_equal(mask, other.masks[name]) for name, mask in one.masks.items()
    )


def percent(values: Sequence[float], form: str = ".1f") -> str:
    """Return mean and Student's interval over seeds in percent; of one value only itself."""
    if not values:
        return ""
    mean = 100 * sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:{form}}"
    low, high = (100 * bound for bound in mean_interval(values))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def number(value: float | None, form: str = ",.0f") -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def table(
    entries: Sequence[Entry],
    start: Mapping[str, float],
    kind: Kind,
    options: Options,
    pairs: Comparison | None = None,
) -> str:
    """Return Markdown: accuracies on test, changes from the start, costs, and paired tests.

    Args:
        entries: in any order; rows stand in the order of the kind's methods.
        start: metric -> accuracy on test; empty where there is no start that knows the task.
        kind: gives columns and order.
        options: seeds and tolerance.
        pairs: every pair of methods.
    """
    order = list(kind.methods)
    entries = sorted(entries, key=lambda entry: order.index(entry.name))
    columns = {
        title: metric
        for title, metric in kind.columns.items()
        if all(metric in entry.test for entry in entries)
    }
    rows = []
    if start:
        rows.append([START, *(percent([start[m]]) for m in columns.values()), ""])
    for entry in entries:
        notes = [f"{entry.field} {short(entry.chosen.value)}"]
        notes += [] if entry.kept else ["robustness not kept on val"]
        notes += [f"seed {seed} diverged" for seed in entry.failed]
        cells = [percent(entry.test[metric]) for metric in columns.values()]
        rows.append([entry.name, *cells, "; ".join(notes)])
    lines = markdown(["", *columns, "chosen"], rows)
    if start:
        rows = []
        for entry in entries:
            changes = [[v - start[m] for v in entry.test[m]] for m in columns.values()]
            rows.append([entry.name, *(percent(change, "+.1f") for change in changes)])
        lines += ["", *markdown(["change from the start", *columns], rows)]
    costs = ["cost", "trials", "search passes", "judging passes", "search s"]
    costs += ["training passes", "training s", "worker MiB"]
    rows = [
        [
            entry.name,
            str(len(entry.candidates)),
            number(entry.search_passes),
            number(sum(one.judging for one in entry.candidates)),
            number(entry.search_seconds),
            number(entry.trial.total),
            number(entry.seconds, ",.1f"),
            number(entry.memory),
        ]
        for entry in entries
    ]
    lines += ["", *markdown(costs, rows)]
    lines += ["", *tested(pairs, kind)]
    seeds = ", ".join(map(str, options.seeds))
    lines += [
        "",
        f"Test, percent: mean over seeds {seeds} of fine-tuning and 95 % interval (Student), one "
        "start. Costs: passes of single examples, forwards and backwards, seconds on one worker; "
        "judging is the protocol's look at val.",
        f"Chosen on val: highest clean accuracy among trials that lose at most "
        f"{100 * options.tolerance:g} points of the start's mean robust accuracy.",
    ]
    return "\n".join(lines) + "\n"


def tested(pairs: Comparison | None, kind: Kind) -> list[str]:
    """Return the differences between methods that Holm's procedure leaves, as a table."""
    if pairs is None:
        return []
    titles = {metric: title for title, metric in kind.columns.items()}
    rows = [
        [
            titles.get(one.metric, one.metric),
            f"{one.other} - {one.one}",
            f"{100 * one.change.value:+.1f}",
            f"{one.adjusted:.2g}",
            "yes" if one.within_seeds else "",
        ]
        for one in pairs.differences
        if pairs.decided(one)
    ]
    count = f"{len(rows)} of {len(pairs.differences)}"
    lines = [f"Paired tests over examples, every pair, adjusted by Holm: {count} are decided."]
    if rows:
        header = ["", "difference", "points", "p", "no larger than between seeds"]
        lines += ["", *markdown(header, rows)]
    return lines


def draw(entries: Sequence[Entry], start: Mapping[str, float], on_val: Any, kind: Kind) -> Figure:
    """Draw clean against robust accuracy: rows on test, and every trial on val.

    Args:
        entries: the methods.
        start: metric -> accuracy on test, or empty.
        on_val: (clean, robust) of the start on val, or None.
        kind: gives the attacked metrics.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    test, val = figure.subplots(1, 2)
    points = {entry.name: plane(entry.test, kind) for entry in entries}
    if start:
        points[START] = plane({name: [value] for name, value in start.items()}, kind)
    front = pareto_front(points)
    for index, (name, (clean, robust)) in enumerate(points.items()):
        marker = "*" if name == START else "o"
        color = "black" if name == START else f"C{index % 10}"
        face = color if name in front else "none"
        test.plot([clean], [robust], marker, color=color, markerfacecolor=face)
        test.annotate(name, (clean, robust), xytext=(4, 3), textcoords="offset points", size=8)
    line = sorted(points[name] for name in front)
    test.plot(*zip(*line, strict=True), color="0.7", linewidth=1, zorder=0)
    for index, entry in enumerate(entries):
        finished = [one for one in entry.candidates if not one.error]
        places = [(100 * one.clean, 100 * one.robust) for one in finished]
        style = {"color": f"C{index % 10}", "marker": "os^D"[index // 10 % 4]}
        val.plot(
            *zip(*places, strict=True), linestyle="", fillstyle="none", label=entry.name, **style
        )
        chosen = entry.chosen
        val.plot([100 * chosen.clean], [100 * chosen.robust], linestyle="", **style)
    if on_val is not None:
        val.plot([100 * on_val[0]], [100 * on_val[1]], "*", color="black", label=START)
    test.set_title("test, mean over seeds; filled: on the Pareto front", fontsize="small")
    val.set_title("val, every trial; filled: chosen", fontsize="small")
    val.legend(fontsize="x-small", ncols=2)
    for axes in (test, val):
        axes.set_xlabel("clean accuracy (%)")
        axes.set_ylabel("robust accuracy, mean over attacks (%)")
        axes.grid(alpha=0.3)
    return figure


def plane(test: Mapping[str, Sequence[float]], kind: Kind) -> tuple[float, float]:
    """Return mean clean, and mean robust accuracy over threat models (text: attacks), percent."""
    means = {name: sum(values) / len(values) for name, values in test.items() if values}
    known = {name: value for name, value in means.items() if name in kind.columns.values()}
    return 100 * known["clean"], 100 * robust_mean(known)


def described(entries: Sequence[Entry], stored: Sequence[StoredRun]) -> dict[str, RunFacts]:
    """Return what identifies each method on the page."""
    return {
        entry.name: RunFacts(
            facts={
                "method": entry.method,
                "chosen": f"{entry.field} {short(entry.chosen.value)}",
                "robustness kept on val": "yes" if entry.kept else "no",
                "trials": str(len(entry.candidates)),
                "seeds": ", ".join(one.after),
                "folder": str(one.directory),
            },
            command=one.command,
            config=one.config,
            versions=one.versions,
        )
        for entry, one in zip(entries, stored, strict=True)
    }


def conclude(
    bench: Bench, entries: Sequence[Entry], stored: Sequence[StoredRun], on_val: Any
) -> tuple[dict[str, Any], str]:
    """Test, write everything; return the document and the table."""
    kind, output = bench.kind, bench.output
    runs = compared(entries, stored)
    start: dict[str, float] = {}
    against, pairs = None, None
    if runs[0].name == START:
        measured_start = runs[0].first.metrics
        start = {m: float(measured_start[m]) for m in kind.columns.values() if m in measured_start}
    if len(runs) > 1:
        against = compare_runs(runs, with_first=True)
        available = [name for name in kind.paired if name in against.metrics]
        pairs = compare_runs(runs, metrics=available)
        command = command_line(sys.argv)
        write_comparison_report(
            output,
            against,
            described=described(entries, stored),
            title=f"{len(entries)} methods on {bench.task.name}, one protocol",
            command=command,
        )
    text = table(entries, start, kind, bench.options, pairs)
    (output / "table.md").write_text(text, encoding="utf-8")
    draw(entries, start, on_val, kind).savefig(output / "pareto.png", dpi=150)
    document = {
        "options": to_dict(bench.options),
        "budget": bench.options.budget or kind.budget,
        "sizes": dataclasses.asdict(bench.sizes),
        "reference": None if on_val is None else {"clean": on_val[0], "robust": on_val[1]},
        "start": start,
        "methods": [{**to_dict(entry), "search_passes": entry.search_passes} for entry in entries],
        "against_first": None if against is None else against.document(),
        "pairs": None if pairs is None else pairs.document(),
    }
    write_json(output / "results.json", document)
    return document, text


def network_sizes(task: AnyTask, start: AnyStart) -> Sizes:
    """Return what costs depend on."""
    train, val = (len(task.splits[name]) for name in ("train", "val"))
    if isinstance(task, TextTask):
        return Sizes(train=train, val=val)
    layers = len(list(weight_layers(start.build())))
    return Sizes(train=train, val=val, norms=len(task.threat_models), layers=layers)


def compare(options: Options) -> tuple[dict[str, Any], str]:
    """Run the comparison, or go on with it; return what ``results.json`` holds, and the table.

    Raises:
        RobustftError: with one sentence that names the remedy.
    """
    base = prepared(options)
    output = options.output or Path("runs") / base.name
    task = load_any_task(base.task)
    kind = KINDS["text" if isinstance(task, TextTask) else "images"]
    arms = rows_of(kind, options)
    trained_on = start_task(base, task)
    start = fit_to_task(base, load_or_fresh(base, trained_on), task, trained_on)
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tagged(f"comparison={base.name} {output.name}"))
        session = stack.enter_context(connect(base.runtime))  # Once for all runs.
        pump = EventPump([])
        stack.callback(pump.close)
        flight = 2 * max(1, session.num_cpus)
        bench = Bench(
            base=base,
            kind=kind,
            options=options,
            output=output,
            task=task,
            start=start,
            sizes=network_sizes(task, start),
            mapper=Fanout(output / "items", pump, stage="evaluate", max_in_flight=flight),
        )
        searches = {name: searched(bench, name, arm) for name, arm in arms.items()}
        candidates = {
            name: judged(bench, searches[name][0], arm.field, trial_values(searches[name][0], arm))
            for name, arm in arms.items()
        }
        on_val = reference_of(bench, next(iter(candidates.values())))
        entries, stored = [], []
        for name, arm in arms.items():
            _, folder, seconds = searches[name]
            entry, row = measured(bench, name, arm, candidates[name], on_val[1], folder, seconds)
            entries.append(entry)
            stored.append(row)
        return conclude(bench, entries, stored, on_val)


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


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    _, text = compare(options)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
