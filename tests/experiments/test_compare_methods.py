"""One protocol for all methods: its rule, its costs, and what it makes of finished runs."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from robustft import compare_verb
from robustft.compare_verb import Compare, Report, compare_stored, report_again
from robustft.config import from_dict
from robustft.data.base import Split, Task
from robustft.errors import ConfigError, DataError, RunError, UnknownNameError
from robustft.evaluation.comparison import compare_runs
from robustft.methods import METHODS, Result, costs, method_name, rift
from robustft.models import Start
from robustft.runtime import memory, protocol, protocol_report
from robustft.runtime.experiment import (
    Experiment,
    SearchConfig,
    experiment_to_dict,
    load_experiment,
    with_values,
)
from robustft.runtime.jsonfile import write_json
from robustft.runtime.results import save_result
from robustft.runtime.stored_runs import load_run
from robustft.runtime.vocabulary import TAGS_VARIABLE
from robustft.threat import ThreatModel
from robustft.training.context import LocalContext

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "compare_methods.py"
sys.path.insert(0, str(ROOT / "tests" / "runtime"))
from test_stored_runs import write_run  # noqa: E402  after the path

TRAIN, VAL, CLASSES = 20, 9, 3


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("compare_methods", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = path


# --- the rule ------------------------------------------------------------------------------------


def candidate(index: int, clean: float, robust: float, error: str = "") -> Any:
    return protocol.Candidate(
        index=index, value=0.1 * index, clean=clean, robust=robust, error=error, judging=10.0
    )


@pytest.mark.parametrize(
    ("points", "index", "kept"),
    [
        ([(0.80, 0.50), (0.90, 0.48), (0.82, 0.495)], 2, True),
        # One point below the start is still kept.
        ([(0.80, 0.50), (0.90, 0.49)], 1, True),
        ([(0.80, 0.50), (0.90, 0.4899)], 0, True),
        # Ties go to the more robust, then to the one that was named first.
        ([(0.80, 0.50), (0.80, 0.52), (0.80, 0.52)], 1, True),
        # Where none keeps it, the most robust one is taken; of those the cleaner.
        ([(0.90, 0.30), (0.85, 0.40), (0.86, 0.40)], 2, False),
    ],
)
def test_the_rule_takes_what_it_says(
    points: list[tuple[float, float]], index: int, kept: bool
) -> None:
    candidates = [candidate(i, *point) for i, point in enumerate(points)]
    for order in itertools.permutations(candidates):
        chosen, found = protocol.choose(order, reference=0.50, tolerance=0.01)
        assert (chosen.index, found) == (index, kept)


def test_what_binary_fractions_make_of_a_point_does_not_decide() -> None:
    assert 0.07 - 0.01 > 0.06
    candidates = [candidate(0, 0.8, 0.07), candidate(1, 0.9, 0.06)]
    assert protocol.choose(candidates, reference=0.07, tolerance=0.01)[0].index == 1


def test_a_failed_trial_is_never_chosen() -> None:
    failed = candidate(0, math.nan, math.nan, "diverged")
    fine = candidate(1, 0.1, 0.1)
    assert protocol.choose([failed, fine], reference=0.5, tolerance=0.01) == (fine, False)
    with pytest.raises(RunError, match="all trials of a method failed: diverged"):
        protocol.choose([failed], reference=0.5, tolerance=0.01)


def test_other_rules_are_told() -> None:
    trials = [(0.9, 0.1), (0.5, 0.6), (0.8, 0.5)]
    candidates = [candidate(i, *point) for i, point in enumerate(trials)]
    expected = {"clean": 0.0, "robust": 0.1, "clean + robust": 0.2}
    assert protocol.other_rules(candidates) == expected
    assert protocol.other_rules(candidates[::-1]) == expected


def test_robust_accuracy_is_the_mean_over_norms_not_the_union() -> None:
    measured = {"clean": 0.9, "Linf/robust": 0.6, "L1/robust": 0.2, "Linf/apgd-ce": 0.7}
    assert protocol.robust_mean({**measured, "robust": 0.1, "union": 0.1}) == pytest.approx(0.4)
    assert protocol.robust_mean({"clean": 0.9, "deepwordbug": 0.3, "robust": 0.3}) == 0.3
    with pytest.raises(RunError, match="val was not attacked"):
        protocol.robust_mean({"clean": 0.9})


# --- what it costs -------------------------------------------------------------------------------


def stripes(count: int, first: int) -> Split:
    draw = np.random.default_rng(first)
    labels = np.arange(count) % CLASSES
    images = draw.integers(0, 250, (count, 1, 12, 12)).astype(np.uint8)
    return Split(images, labels.astype(np.int64), np.arange(first, first + count))


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(
        name="stripes",
        splits={"train": stripes(TRAIN, 0), "val": stripes(VAL, 100), "test": stripes(5, 200)},
        class_names=("none", "rows", "columns"),
        threat_models=tuple(
            ThreatModel(n, e)  # type: ignore[arg-type]
            for n, e in (("Linf", 0.05), ("L2", 0.5), ("L1", 4.0))
        ),
        mean=(0.3,),
        std=(0.2,),
        digest="stripes",
    )


@pytest.fixture(scope="module")
def start(task: Task) -> Start:
    fresh = Start(
        architecture="small_resnet",
        num_classes=CLASSES,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    return dataclasses.replace(fresh, state=fresh.build().state_dict())


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """Count examples that go through whole networks, forwards and backwards."""
    found: Counter[str] = Counter()

    def forward(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "Normalized":
            found["forwards"] += len(inputs[0])

    def backward(module: nn.Module, gradients: Any) -> None:
        if type(module).__name__ == "Normalized":
            found["backwards"] += len(gradients[0])

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(forward),
        nn.modules.module.register_module_full_backward_pre_hook(backward),
    )
    yield found
    for hook in hooks:
        hook.remove()


def sizes(**changes: Any) -> Any:
    return costs.Sizes(**{"train": TRAIN, "val": VAL, "norms": 3, "layers": 10, **changes})


EXACT = ["at", "trades", "autolora", "rose", "full", "last-layer", "lp-ft", "wise-ft"]


@pytest.mark.parametrize("name", EXACT)
def test_costs_are_those_that_are_counted(
    script: ModuleType, name: str, task: Task, start: Start, passes: Counter[str]
) -> None:
    config = dataclasses.replace(script.IMAGE_METHODS[name].config(), batch_size=10)
    method = METHODS[method_name(config)]
    result = method.train(config, LocalContext(task=task, start=start))
    expected = costs.passes_of(config, sizes())
    assert passes == {"forwards": expected.forwards, "backwards": expected.backwards}
    if "passes/forwards" in result.metrics:
        assert result.metrics["passes/forwards"] == expected.forwards
        assert result.metrics["passes/backwards"] == expected.backwards


def test_the_cost_of_rift_is_counted_with_its_criticality(
    script: ModuleType, task: Task, start: Start, passes: Counter[str]
) -> None:
    arm = script.IMAGE_METHODS["rift"]
    config = dataclasses.replace(arm.config(), batch_size=10, mrc_prefix_cache=False)
    context = LocalContext(task=task, start=start)
    prepared = rift.prepare(config, context)
    expected = protocol.preparation(arm, sizes())
    # Without a cache, what comes before a layer is not computed apart.
    spared = VAL * 10
    assert passes == {"forwards": expected.forwards - spared, "backwards": expected.backwards}
    assert len(prepared["criticality"]) == 10
    passes.clear()
    context = LocalContext(task=task, start=start, prepared=prepared)
    rift.train(config, context)
    expected = costs.passes_of(config, sizes())
    assert passes == {"forwards": expected.forwards, "backwards": expected.backwards}


def test_the_cost_of_several_norms_is_an_upper_bound(
    script: ModuleType, task: Task, start: Start, passes: Counter[str]
) -> None:
    config = dataclasses.replace(script.IMAGE_METHODS["e-at"].config(), batch_size=10)
    result = METHODS["multinorm"].train(config, LocalContext(task=task, start=start))
    training = costs.passes_of(config, sizes(val=0))
    assert result.metrics["passes/forwards"] == training.forwards
    assert result.metrics["passes/backwards"] == training.backwards
    expected = costs.passes_of(config, sizes())
    # Val: clean before and after, and attacks on what is right.
    assert training.forwards + 2 * VAL <= passes["forwards"] <= expected.forwards
    assert training.backwards <= passes["backwards"] <= expected.backwards


def test_the_cost_of_statistics_is_counted(
    script: ModuleType, task: Task, start: Start, passes: Counter[str], tmp_path: Path
) -> None:
    arm = script.IMAGE_METHODS["flooding"]
    collecting = dataclasses.replace(arm.collecting(tmp_path / "statistics"), batch_size=10)
    METHODS["instances"].train(collecting, LocalContext(task=task, start=start))
    expected = protocol.preparation(arm, sizes())
    assert passes == {"forwards": expected.forwards, "backwards": expected.backwards}
    passes.clear()
    for name in ("flooding", "soft-label"):
        config = script.IMAGE_METHODS[name].config(tmp_path / "statistics")
        config = dataclasses.replace(config, batch_size=10)
        METHODS["instances"].train(config, LocalContext(task=task, start=start))
    expected = costs.passes_of(config, sizes()).times(2)
    assert passes == {"forwards": expected.forwards, "backwards": expected.backwards}


@pytest.mark.parametrize(
    ("name", "per_text"),
    [("vanilla", (1, 1)), ("r-drop", (2, 2)), ("freelb", (3, 3)), ("rose", (2, 4))],
)
def test_costs_of_text_losses_are_those_of_their_table(
    script: ModuleType, name: str, per_text: tuple[int, int]
) -> None:
    """Their own tests count these passes; two epochs, and a forward of val after each."""
    found = costs.passes_of(script.TEXT_METHODS[name].config(), costs.Sizes(train=10, val=3))
    assert (found.forwards, found.backwards) == (2 * (10 * per_text[0] + 3), 2 * 10 * per_text[1])


def test_attacks_from_the_example_share_the_first_gradient() -> None:
    """The table of the collector's own tests: with a random start nothing is shared."""
    attacks = [
        {"num_steps": 3},
        {"norm": "L2", "num_steps": 4},
        {"num_steps": 5, "start_size": 0.1},
    ]
    fields = {"folder": "x", "every": 2, "attacks": attacks, "transforms": ["identity"]}
    config = from_dict(METHODS["instances"].config, {"epochs": 3, "collect": fields})
    found = costs._records(config, costs.Sizes(train=10, val=0))
    # Before training, after two epochs, and at the end.
    assert found == costs.Passes(30 * (1 + 3 + 4 + (5 + 1) + 1), 30 * (1 + 2 + 3 + 5))


def test_a_method_of_unknown_cost_is_refused() -> None:
    config = from_dict(METHODS["twins"].config, {})
    with pytest.raises(ConfigError, match="what twins costs is not known"):
        costs.passes_of(config, sizes())


def test_the_budget_pays_the_first_values(script: ModuleType) -> None:
    arm = script.IMAGE_METHODS["at"]
    cost = costs.passes_of(arm.config(), sizes()).total
    assert list(protocol.affordable(arm, sizes(), 2 * cost)) == list(arm.values[:2])
    assert list(protocol.affordable(arm, sizes(), 3 * cost - 1)) == list(arm.values[:2])
    assert list(protocol.affordable(arm, sizes(), 1)) == list(arm.values[:1])
    assert list(protocol.affordable(arm, sizes(), 1e9)) == list(arm.values)


def test_preparation_is_paid_from_the_budget(script: ModuleType) -> None:
    for name in ("rift", "flooding"):
        arm = script.IMAGE_METHODS[name]
        before = protocol.preparation(arm, sizes()).total
        assert before > 0
        cost = costs.passes_of(arm.config(), sizes()).total
        assert len(protocol.affordable(arm, sizes(), 2 * cost + before)) == 2
        assert len(protocol.affordable(arm, sizes(), 2 * cost + before - 1)) == 1


def test_no_search_costs_more_than_the_budget_as_shipped(script: ModuleType) -> None:
    shipped = {
        "images": costs.Sizes(train=3600, val=600, norms=3, layers=10),
        "text": costs.Sizes(train=1000, val=600),
    }
    for kind, own in shipped.items():
        budget = script.KINDS[kind].budget
        for name, arm in script.KINDS[kind].methods.items():
            count = len(protocol.affordable(arm, own, budget))
            trials = costs.passes_of(arm.config(), own).total * count
            total = protocol.preparation(arm, own).total + trials
            assert 0.5 * budget < total <= budget, name


# --- what is run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["embedded", "text"])
def test_every_method_fits_its_preset(script: ModuleType, preset: str) -> None:
    options = script.Options(preset=preset)
    base = script.prepared(options)
    assert base == dataclasses.replace(load_experiment(f"compare-{preset}"), search=SearchConfig())
    kind = script.KINDS["text" if preset == "text" else "images"]
    arms = script.rows_of(kind, options)
    assert list(arms) == list(kind.methods)
    for arm in arms.values():
        search = protocol.searching(base, arm, arm.values, Path("statistics"))
        assert search.search.space == {arm.field: list(arm.values)}
        assert search.method.seed == protocol.SEARCH_SEED
        assert search.evaluation.suite == "clean"
        row = protocol.measuring(base, arm, arm.values[-1], (0, 1), Path("statistics"))
        assert row.search.space == {"seed": [0, 1]}
        assert (row.start, row.task, row.evaluation) == (base.start, base.task, base.evaluation)
        # The first value is the method's own setting, so that it can be trained without a search.
        first = with_values(arm.config(), {arm.field: arm.values[0]})
        assert type(first) is type(row.method)


def test_options_change_data_start_and_test(script: ModuleType, tmp_path: Path) -> None:
    options = script.Options(start_seed=3, limit_train=100, limit=50, attack_steps=2, epochs=1)
    base = script.prepared(options)
    assert (base.start.seed, base.start.method.seed) == (3, 3)
    assert base.task.limit_train == 100
    assert (base.evaluation.limit, base.evaluation.attack_steps) == (50, 2)
    arms = script.rows_of(script.KINDS["images"], options)
    assert {arm.config().epochs for arm in arms.values()} == {1}
    given = script.prepared(script.Options(checkpoint=str(tmp_path)))
    assert (given.start.checkpoint, given.start.method) == (str(tmp_path), None)


def test_the_order_of_methods_is_that_of_the_table(script: ModuleType) -> None:
    kind = script.KINDS["images"]
    one = script.rows_of(kind, script.Options(methods=("rift", "at", "e-at")))
    other = script.rows_of(kind, script.Options(methods=("e-at", "at", "rift")))
    assert list(one) == list(other) == ["at", "rift", "e-at"]
    with pytest.raises(UnknownNameError, match="riffft"):
        script.rows_of(kind, script.Options(methods=("riffft",)))


def test_bad_options_are_one_sentence(script: ModuleType) -> None:
    with pytest.raises(ConfigError, match="two different seeds"):
        script.Options(seeds=(1, 1))
    with pytest.raises(ConfigError, match="that of the searches"):
        script.Options(seeds=(0, protocol.SEARCH_SEED))
    with pytest.raises(ConfigError, match="tolerance"):
        script.Options(tolerance=1.5)


def test_every_run_gets_the_tag_beside_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TAGS_VARIABLE, raising=False)
    with protocol.tagged("comparison=one"):
        assert os.environ[TAGS_VARIABLE] == "comparison=one"
    assert TAGS_VARIABLE not in os.environ
    monkeypatch.setenv(TAGS_VARIABLE, "owner=me")
    with protocol.tagged("comparison=one"):
        assert os.environ[TAGS_VARIABLE] == "owner=me,comparison=one"
    assert os.environ[TAGS_VARIABLE] == "owner=me"


def test_memory_is_that_of_trials() -> None:
    assert memory.is_trial("ray::ImplicitFunc.train")
    assert not memory.is_trial("ray::run_item")
    assert not memory.is_trial("ray::IDLE")
    assert not memory.is_trial("python model.train.py")
    with memory.MemoryWatch(seconds=0.01) as watch:
        pass
    assert math.isnan(watch.largest)


def bench(script: ModuleType, output: Path, task: Task | None = None, **changes: Any) -> Any:
    fields = {
        "base": script.prepared(script.Options()),
        "kind": script.KINDS["images"],
        "options": script.Options(seeds=(0, 1)),
        "output": output,
        "task": task,
        "start": None,
        "sizes": sizes(),
        "mapper": None,
    }
    return protocol.Bench(**{**fields, **changes})


def test_what_is_finished_is_not_run_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def run(experiment: Experiment, *, run_dir: Path) -> None:
        calls.append(run_dir)
        if len(calls) == 1:
            raise KeyboardInterrupt
        write_run(run_dir)

    monkeypatch.setattr(protocol, "run", run)
    own = bench(script, tmp_path)
    experiment = protocol.measuring(own.base, own.kind.methods["at"], 0.01, (0, 1), None)
    with pytest.raises(KeyboardInterrupt):
        own.run(experiment, "row-at")
    first, memory = own.run(experiment, "row-at")
    again, _ = own.run(experiment, "row-at")
    assert math.isnan(memory)
    # The interrupted run goes on in its own folder; the finished one is only read.
    assert len(calls) == 2
    assert calls[0] == calls[1] == again.directory == first.directory
    other = dataclasses.replace(experiment, method=dataclasses.replace(experiment.method, lr=0.5))
    assert own.run(other, "row-at")[0].directory != first.directory


@pytest.fixture(scope="module")
def stored_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "stored"
    write_run(folder)
    return folder


def test_trials_are_judged_in_the_order_of_their_values(
    script: ModuleType, stored_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(stored_folder, tmp_path / "search"))
    for number, (lr, error) in enumerate([(0.01, ""), (0.1, "diverged")]):
        kept = folder / "search" / "tune" / f"trial{number}" / "checkpoint_000000"
        kept.mkdir(parents=True)
        write_json(kept / "trial.json", {"values": {"lr": lr}, "error": error})
        if not error:
            save_result(Result(state={"lr": torch.tensor(lr)}, metrics={}), kept)

    def judge(self: Any, state: Any) -> tuple[dict[str, float], float]:
        return {"clean": float(state["lr"]), "Linf/robust": 0.25, "L1/robust": 0.75}, 7.0

    monkeypatch.setattr(protocol.Bench, "judge", judge)
    stored = load_run(folder)
    failed, fine = protocol.judged(bench(script, tmp_path), stored, "lr", [0.1, 0.01])
    assert (failed.index, failed.error) == (0, "diverged")
    assert (fine.index, fine.value, fine.error) == (1, 0.01, "")
    assert (fine.clean, fine.robust, fine.judging) == (pytest.approx(0.01), 0.5, 7.0)
    with pytest.raises(RunError, match=r"lacks the trial lr = 0\.7"):
        protocol.judged(bench(script, tmp_path), stored, "lr", [0.7])


# --- what is concluded ---------------------------------------------------------------------------


def entry(name: str, folder: Path, **changes: Any) -> Any:
    chosen = candidate(0, 0.8, 0.5)
    fields = {
        "name": name,
        "method": "at",
        "field": "lr",
        "candidates": [chosen, candidate(1, 0.7, 0.4)],
        "chosen": chosen,
        "kept": True,
        "others": {"clean": 0.0, "robust": 0.1},
        "prepared": costs.Passes(100, 50),
        "trial": costs.Passes(1000, 500),
        "counted": None,
        "search_seconds": 12.0,
        "seconds": 5.0,
        "memory": 512.0,
        "test": {"clean": [0.8, 0.9], "Linf/robust": [0.6, 0.6]},
        "failed": [],
        "folder": folder,
    }
    return protocol.Entry(**{**fields, **changes})


def found(script: ModuleType, entries: list[Any], **changes: Any) -> protocol.Findings:
    kind = script.KINDS["images"]
    fields = {
        "data": "pictures",
        "command": "robustft compare",
        "options": {"seeds": [0, 1]},
        "seeds": (0, 1),
        "tolerance": 0.01,
        "budget": 5000.0,
        "sizes": {"train": 10, "val": 5, "norms": 1, "layers": 2},
        "columns": kind.columns,
        "paired": kind.paired,
        "reference": (0.7, 0.5),
        "methods": entries,
    }
    return protocol.Findings(**{**fields, **changes})


def test_the_table_has_known_numbers(script: ModuleType, tmp_path: Path) -> None:
    entries = [
        entry("at", tmp_path, failed=[1]),
        entry("rift", tmp_path, kept=False, test={"clean": [0.9], "Linf/robust": [0.5]}),
    ]
    start = {"clean": 0.75, "Linf/robust": 0.6}
    findings = found(script, entries)
    lines = protocol_report.table(findings, start).splitlines()
    assert lines[0] == "|  | clean | Linf | chosen |"
    assert lines[2] == "| start | 75.0 | 60.0 |  |"
    # Student's interval of two values 0.8 and 0.9: 12.71 standard errors of .05.
    assert lines[3] == ("| at | 85.0 [21.5, 148.5] | 60.0 [60.0, 60.0] | lr 0; seed 1 diverged |")
    assert lines[4] == "| rift | 90.0 | 50.0 | lr 0; robustness not kept on val |"
    assert "| rift | +15.0 | -10.0 |" in lines
    # 150 of preparation and two trials of 1,500; each was judged by 10.
    assert "| at | 2 | 3,150 | 20 | 12 | 1,500 | 5.0 | 512 |" in lines
    assert "| reference |  | 70.0 | 50.0 |  |  |  |  |  |" in lines
    # Nothing was attacked together in this record: no union.
    assert "| at | lr 0 | 80.0 | 50.0 |  | lr 0.1 | 70.0 | 40.0 |  |" in lines
    protocol_report.draw(findings, start)


def test_tests_are_paired_over_the_same_examples(
    script: ModuleType, stored_folder: Path, tmp_path: Path
) -> None:
    entries = [entry(name, tmp_path) for name in ("at", "rift")]
    stored = load_run(stored_folder)
    runs = protocol_report.compared(entries, [stored, stored])
    assert [one.name for one in runs] == ["start", "at", "rift"]
    assert list(runs[0].evaluations) == ["0"]
    assert list(runs[1].evaluations) == ["0", "1"]
    assert (runs[1].cost.forwards, runs[1].cost.all_forwards) == (1000, 100 + 2 * 1000)
    comparison = compare_runs(runs, metrics=["clean"])
    assert len(comparison.differences) == 3
    text = "\n".join(protocol_report.tested(comparison, found(script, entries)))
    assert "0 of 3 are decided" in text


def test_different_starts_are_refused(stored_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stored_folder, tmp_path / "other"))
    shutil.copy(other / "masks" / "seed-0.parquet", other / "masks" / "start.parquet")
    entries = [entry(name, tmp_path) for name in ("at", "rift")]
    with pytest.raises(RunError, match="began at different starts"):
        protocol_report.compared(entries, [load_run(stored_folder), load_run(other)])


def test_everything_is_written(script: ModuleType, stored_folder: Path, tmp_path: Path) -> None:
    test = {"clean": [0.8, 0.9], "Linf/robust": [0.4, 0.5]}
    entries = [entry(name, tmp_path, test=test) for name in ("at", "rift")]
    stored = load_run(stored_folder)
    columns = {"clean": "clean", "Linf": "Linf/robust"}
    findings = found(script, entries, columns=columns)
    document, text = protocol_report.conclude(tmp_path, findings, [stored, stored])
    for name in ("table.md", "results.json", "pareto.png", "report.html"):
        assert (tmp_path / name).is_file(), name
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in read["methods"]] == ["at", "rift"]
    assert read["methods"][0]["search_passes"] == 150 + 2 * 1500
    assert read["reference"] == [0.7, 0.5]
    assert read["budget"] == document["budget"] == 5000.0
    # One attack was run, so that its norm's worst case and the union are no metrics of their own.
    assert {one["metric"] for one in read["pairs"]["differences"]} == {"clean"}
    assert "Paired tests over examples of clean, every pair" in text
    assert "Not tested, because not measured apart by every row: Linf, robust." in text


def test_a_comparison_is_concluded_again_from_its_folder(
    script: ModuleType, stored_folder: Path, tmp_path: Path
) -> None:
    """Also after a move; nothing but its files is read."""
    failed = candidate(2, math.nan, math.nan)
    failed = dataclasses.replace(failed, error="diverged")
    test = {"clean": [0.8, 0.9], "Linf/robust": [0.4, 0.5]}
    entries = []
    for name in ("at", "rift"):
        folder = tmp_path / "first" / "runs" / f"row-{name}"
        shutil.copytree(stored_folder, folder)
        whole = entry(name, folder, test=test, memory=math.nan)
        entries.append(dataclasses.replace(whole, candidates=[*whole.candidates, failed]))
    columns = {"clean": "clean", "Linf": "Linf/robust"}
    stored = [load_run(one.folder) for one in entries]
    first = tmp_path / "first"
    document, text = protocol_report.conclude(
        first, found(script, entries, columns=columns), stored
    )
    moved = first.rename(tmp_path / "second")
    for name in ("table.md", "pareto.png", "report.html"):
        (moved / name).unlink()
    answer = report_again(Report(runs=(str(moved),)))
    assert answer.document == {"reports": [{"comparison": str(moved / "report.html")}]}
    assert (moved / "table.md").read_text(encoding="utf-8") == text
    assert (moved / "report.html").is_file()
    assert (moved / "pareto.png").is_file()
    again = json.loads((moved / "results.json").read_text(encoding="utf-8"))
    assert again["pairs"] == json.loads(json.dumps(document["pairs"]))
    assert math.isnan(protocol_report.load_findings(moved).methods[0].candidates[2].clean)
    (moved / "results.json").write_text('{"methods": []}', encoding="utf-8")
    with pytest.raises(DataError, match="of another version"):
        report_again(Report(runs=(str(moved),)))


def test_a_double_is_tested_under_its_own_name(
    script: ModuleType, stored_folder: Path, tmp_path: Path
) -> None:
    stored = load_run(stored_folder)
    runs = protocol_report.compared(
        [entry(name, tmp_path) for name in ("at", "rift")], [stored] * 2
    )
    against = compare_runs(runs, with_first=True)
    doubled = dataclasses.replace(
        against, metrics=("clean", "robust"), doubles={"Linf/robust": "Linf/apgd-dlr"}
    )
    paired = script.KINDS["images"].paired
    assert protocol_report.tested_metrics(paired, doubled) == ["clean", "Linf/robust", "robust"]
    assert protocol_report.tested_metrics(paired, against) == ["clean"]


# --- from end to end -----------------------------------------------------------------------------


class Runs:
    """Stands for ``run``: trials whose value decides what val says of them, and stored rows."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.known: dict[str, list[str]] = {}

    def __call__(self, experiment: Experiment, *, run_dir: Path) -> None:
        name = run_dir.name.rpartition("-")[0]
        self.names.append(name)
        self.known[name] = [path.stem for path in run_dir.glob("items/*/*.npz")]
        write_run(run_dir)
        (run_dir / "items" / "clean").mkdir(parents=True, exist_ok=True)
        (run_dir / "items" / "clean" / f"{name}.npz").touch()
        record = {"experiment": experiment_to_dict(experiment), "command": "robustft"}
        write_json(run_dir / "run.json", record)
        for field, values in experiment.search.space.items():
            if field == "seed":
                continue
            rows = pq.read_table(run_dir / "trials.parquet").to_pylist()
            kept = [{**rows[-1], field: v, "seconds": 2.0} for v in values]
            pq.write_table(pa.Table.from_pylist(kept), run_dir / "trials.parquet")
            for number, value in enumerate(values):
                folder = run_dir / "search" / "tune" / f"t{number}" / "checkpoint_000000"
                folder.mkdir(parents=True)
                write_json(folder / "trial.json", {"values": {field: value}, "error": ""})
                save_result(Result(state={"value": torch.tensor(float(value))}, metrics={}), folder)


@pytest.fixture
def runs(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Runs:
    class Session:
        num_cpus = 1

    def judge(self: Any, state: Any) -> tuple[dict[str, float], float]:
        # A higher value is cleaner and less robust; the start is at 0.
        value = float(state["value"])
        return {"clean": 0.5 + value, "Linf/robust": 0.5 - 0.9 * value}, 7.0

    found = Runs()
    monkeypatch.setattr(protocol, "run", found)
    monkeypatch.setattr(script, "connect", lambda _: contextlib.nullcontext(Session()))
    monkeypatch.setattr(script, "EventPump", lambda _: io.StringIO())
    monkeypatch.setattr(protocol, "start_state", lambda _: {"value": torch.tensor(0.0)})
    monkeypatch.setattr(protocol.Bench, "judge", judge)
    # These read saved networks, which stand-ins do not have: test_protocol_records.py.
    for name in ("add_surface", "record_row", "record_comparison"):
        monkeypatch.setattr(script, name, lambda *_: None)
    columns = {"clean": "clean", "Linf": "Linf/robust"}
    kind = dataclasses.replace(script.KINDS["images"], columns=columns)
    monkeypatch.setitem(script.KINDS, "images", kind)
    return found


def test_the_protocol_from_end_to_end(script: ModuleType, runs: Runs, tmp_path: Path) -> None:
    options = script.Options(
        preset="embedded", methods=("at", "flooding"), seeds=(0, 1), output=tmp_path / "out"
    )
    document, text = script.compare(options)
    names = ["search-at", "statistics", "search-flooding", "row-at", "row-flooding"]
    assert runs.names == names
    # The start is measured on test by the first row alone: the next one has those items.
    assert runs.known == {**{name: [] for name in names}, "row-flooding": ["row-at"]}
    at, flooding = document["methods"]
    # Three trials of continued training; that at 0.03 has lost more than a point.
    assert [one["value"] for one in at["candidates"]] == [0.01, 0.003, 0.03]
    assert (at["chosen"]["value"], at["kept"]) == (0.01, True)
    assert at["others"] == {"clean": 0.03, "robust": 0.003, "clean + robust": 0.03}
    # All levels lose more: the one that loses least.
    assert (flooding["chosen"]["value"], flooding["kept"]) == (0.5, False)
    assert document["reference"] == [0.5, 0.5]
    # 4 s of two trials of flooding, and those of collecting.
    assert at["search_seconds"] == 6.0
    assert flooding["search_seconds"] > 4.0
    # The same again, with the methods in another order: everything is read, nothing is run.
    again = dataclasses.replace(options, methods=("flooding", "at"))
    assert script.compare(again)[1] == text
    assert runs.names == names


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(
    script: ModuleType, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = script.Options(methods=("at", "full"), seeds=(0, 1), output=tmp_path / "one")
    undisturbed = script.compare(dataclasses.replace(options, output=tmp_path / "two"))[1]

    def dies(experiment: Experiment, *, run_dir: Path) -> None:
        if run_dir.name.startswith("row-full"):
            raise KeyboardInterrupt
        runs(experiment, run_dir=run_dir)

    runs.names.clear()
    monkeypatch.setattr(protocol, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        script.compare(options)
    assert runs.names == ["search-at", "search-full", "row-at"]
    monkeypatch.setattr(protocol, "run", runs)
    assert script.compare(options)[1] == undisturbed
    assert runs.names == ["search-at", "search-full", "row-at", "row-full"]


# --- the verb ------------------------------------------------------------------------------------


def test_the_verb_hands_over_to_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Script:
        @staticmethod
        def Options(**fields: Any) -> dict[str, Any]:
            return fields

        @staticmethod
        def compare(options: dict[str, Any]) -> tuple[dict[str, Any], str]:
            return {"options": str(options), "report": "report.html"}, "| table |"

    monkeypatch.setattr(compare_verb, "_script", lambda: Script)
    answer = compare_stored(Compare(preset="embedded", output=tmp_path))
    assert answer.document["options"] == str({"preset": "embedded", "output": tmp_path})
    assert str(answer.text).startswith("| table |")
    with pytest.raises(ConfigError, match="leave out RUN_DIR"):
        compare_stored(Compare(runs=(str(tmp_path),), preset="embedded"))


def test_the_verb_finds_the_script_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    module = compare_verb._script()
    assert module.Options(preset="text").preset == "text"
    monkeypatch.setattr(compare_verb, "SCRIPT", Path("experiments") / "nowhere.py")
    with pytest.raises(ConfigError, match="a part of the checkout and not of the installed"):
        compare_stored(Compare(preset="embedded"))


def test_the_verb_still_compares_runs(stored_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two runs"):
        compare_stored(Compare(output=tmp_path))
    other = Path(shutil.copytree(stored_folder, tmp_path / "other"))
    answer = compare_stored(
        Compare(runs=(str(stored_folder), str(other)), names=("a", "b"), output=tmp_path / "out")
    )
    assert (tmp_path / "out" / "report.html").is_file()
    assert list(answer.document["folders"]) == ["a", "b"]


TOY = """
name: compare-toy
task:
  data: fashion_mnist_mini
  threat_models: [{norm: Linf, eps: 0.1}, {norm: L2, eps: 1.0}, {norm: L1, eps: 10}]
  val_size: 40
  limit_train: 128
start:
  model: small_resnet
  method: {name: at, epochs: 1, attack: {num_steps: 1}, val_attack: {num_steps: 1}}
method: {name: at}
evaluation:
  suite: clean,apgd-ce
  limit: 20
  attack_steps: 2
  sanity: false
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_the_protocol_runs_and_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "toy.yaml"
    preset.write_text(TOY, encoding="utf-8")
    options = script.Options(
        preset=str(preset),
        methods=("at", "flooding", "full"),
        seeds=(0, 1),
        epochs=1,
        budget=5000,
        output=tmp_path / "out",
    )
    document, text = script.compare(options)
    assert [one["name"] for one in document["methods"]] == ["at", "flooding", "full"]
    assert all(len(one["test"]["clean"]) == 2 for one in document["methods"])
    assert document["start"].keys() >= {"clean", "Linf/robust", "robust"}
    for one in document["methods"]:
        assert one["search_passes"] <= 5000 or len(one["candidates"]) == 1

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("everything is finished")

    monkeypatch.setattr(protocol, "run", refuse)
    assert script.compare(options)[1] == text
