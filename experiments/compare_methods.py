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
   counted passes). Judging costs about the same for all and is reported beside it.
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
Time, embedded: 28 minutes on two cores: start 1, searches of 12 methods 6 (together 2.8 million
passes of single examples), judging of 33 trials 2.5, rows 17 (3 seeds of 58,000 to 108,000 passes
and 3 models on test of 50,000 each), a loss surface and a last look at val per row 1.5. Text: about
70, of which a third are attacks on test.
Output: ``table.md``, ``results.json``, ``pareto.png`` and ``report.html`` in --output; run folders
in its ``runs``. All MLflow runs are in one experiment and have the tag "comparison".
"""

import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

# The source beside this script wins over an installed copy: a Ray job runs what it has shipped.
LIBRARY = Path(__file__).resolve().parents[1] / "library"
if LIBRARY.is_dir():
    sys.path.insert(0, str(LIBRARY))

import tyro  # noqa: E402  after the path

from robustft.config import replaced, to_dict  # noqa: E402
from robustft.data.text import TextTask  # noqa: E402
from robustft.errors import UnknownNameError  # noqa: E402
from robustft.runtime.events import EventPump  # noqa: E402
from robustft.runtime.experiment import Experiment, SearchConfig, load_experiment  # noqa: E402
from robustft.runtime.fanout import Fanout  # noqa: E402
from robustft.runtime.outputs import command_line  # noqa: E402
from robustft.runtime.protocol import (  # noqa: E402
    Arm,
    Bench,
    Entry,
    Findings,
    Kind,
    ProtocolOptions,
    judged,
    measured,
    network_sizes,
    reference_of,
    searched,
    tagged,
    trial_values,
)
from robustft.runtime.protocol_records import (  # noqa: E402
    add_surface,
    record_comparison,
    record_row,
)
from robustft.runtime.protocol_report import conclude  # noqa: E402
from robustft.runtime.session import connect, default_output  # noqa: E402
from robustft.runtime.starts import fit_to_task, load_or_fresh, start_task  # noqa: E402
from robustft.runtime.stored_runs import StoredRun  # noqa: E402
from robustft.runtime.text_runs import load_any_task  # noqa: E402

GROUP = {"group": {"which": "robust", "share": 0.3}}
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
        method={**INSTANCES, **GROUP, "mitigation": {"kind": "flooding", "level_quantile": 0.5}},
        field="mitigation.level_quantile",
        values=(0.5, 0.75, 0.9),
        collect=COLLECT,
    ),
    "soft-label": Arm(
        method={**INSTANCES, **GROUP, "mitigation": {"kind": "soft_label", "confidence": 0.8}},
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
        method={
            **TEXT_INSTANCES,
            **GROUP,
            "mitigation": {"kind": "flooding", "level_quantile": 0.5},
        },
        field="mitigation.level_quantile",
        values=(0.5, 0.75, 0.9),
        collect=TEXT_COLLECT,
    ),
}

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
class Options(ProtocolOptions):
    """One protocol for all methods: the same start, data, search budget and measurements."""

    preset: str = "embedded"
    """embedded or text, a preset's whole name, or a YAML file: task, start and measurements."""
    methods: tuple[str, ...] = ()
    """Rows of the table; none: all of the preset's kind."""
    start_seed: int | None = None
    """Seed of the start and its training; None: as the preset says."""
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
    """Folder of tables, picture, page and all runs; None: one of the preset's name beside the runs
    ($ROBUSTFT_STORAGE, else ./runs)."""


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


def compare(options: Options) -> tuple[dict[str, Any], str]:
    """Run the comparison, or go on with it; return what ``results.json`` holds, and the table.

    Raises:
        RobustftError: with one sentence that names the remedy.
    """
    base = prepared(options)
    output = options.output or default_output(base.name)
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
        entries: list[Entry] = []
        stored: list[StoredRun] = []
        for name, arm in arms.items():
            _, folder, seconds = searches[name]
            like = stored[0].directory if stored else None
            entry, row = measured(
                bench, name, arm, candidates[name], on_val[1], folder, seconds, like
            )
            add_surface(bench, name, row)
            record_row(bench, entry, row)
            entries.append(entry)
            stored.append(row)
        findings = Findings(
            data=task.name,
            command=command_line(sys.argv),
            options=to_dict(options),
            seeds=options.seeds,
            tolerance=options.tolerance,
            budget=options.budget or kind.budget,
            sizes=dataclasses.asdict(bench.sizes),
            columns=kind.columns,
            paired=kind.paired,
            reference=on_val,
            methods=entries,
        )
        document, text = conclude(output, findings, stored)
        record_comparison(bench, findings, text)
        return {**document, "report": str(output / "report.html")}, text


def main(options: Options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    _, text = compare(options)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
