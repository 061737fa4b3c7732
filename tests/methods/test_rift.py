"""RiFT as a whole: which entries change, which module is chosen, and that the numbers are true."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from robustft.data.base import Split, Task
from robustft.errors import ConfigError, NonFiniteLossError, UnknownNameError
from robustft.methods import METHODS, rift
from robustft.methods.adversarial import ATConfig, train_at
from robustft.methods.common import AttackConfig, craft
from robustft.methods.criticality import CriticalityConfig
from robustft.methods.interpolation import CurveWork, curve_point
from robustft.methods.rift import RiftConfig, choose_modules
from robustft.models import Start, batch_norms, weight_layers
from robustft.training.context import LocalContext

ATTACK = AttackConfig(num_steps=2)
SMALL: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.01,
    "mrc_epochs": 2,
    "mrc_attack": ATTACK,
    "curve_attack": ATTACK,
    "curve_runs": 2,
    "alphas": (0.0, 0.5, 1.0),
}
WEIGHT = "network.layer2.0.conv2.weight"


@pytest.fixture(scope="module")
def robust(task: Task, fresh: Start) -> Start:
    """An adversarially trained model, good but not perfect."""
    config = ATConfig(epochs=4, batch_size=16, lr=0.02, attack=ATTACK, val_attack=ATTACK)
    result = train_at(config, LocalContext(task=task, start=fresh))
    return dataclasses.replace(fresh, state=result.state)


def changed(before: Any, after: Any) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def tuned(config: RiftConfig, task: Task, start: Start) -> set[str]:
    """Return which entries fine-tuning changed, before any interpolation."""
    context = LocalContext(task=task, start=start)
    rift.train(dataclasses.replace(config, keep="last"), context)
    return changed(start.state, context.engine.state()["model"])


def test_frozen_changes_exactly_the_chosen_tensor(task: Task, robust: Start) -> None:
    config = RiftConfig(**SMALL, modules="layer2.0.conv2", bn_mode="frozen")
    assert tuned(config, task, robust) == {WEIGHT}


def test_update_also_changes_every_batch_norms_buffers(task: Task, robust: Start) -> None:
    config = RiftConfig(**SMALL, modules="layer2.0.conv2", bn_mode="update")
    buffers = {
        f"network.{name}.{buffer}"
        for name in batch_norms(robust.build())
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert tuned(config, task, robust) == {WEIGHT} | buffers


def test_recalibrate_only_changes_nothing_but_buffers(task: Task, robust: Start) -> None:
    config = RiftConfig(**SMALL, modules="layer2.0.conv2", bn_mode="recalibrate_only")
    names = tuned(config, task, robust)
    assert names
    assert all("running_" in name or "num_batches" in name for name in names)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("last", {"network.linear.weight", "network.linear.bias"}),
        ("conv1", {"network.conv1.weight"}),
        (
            "conv1, linear",
            {f"network.{n}" for n in ("conv1.weight", "linear.weight", "linear.bias")},
        ),
    ],
)
def test_names_are_exact_not_substrings(
    modules: str, expected: set[str], task: Task, robust: Start
) -> None:
    assert tuned(RiftConfig(**SMALL, modules=modules), task, robust) == expected


def test_all_and_bn_are_the_controls(task: Task, robust: Start) -> None:
    model = robust.build()
    everything = {name for name, _ in model.named_parameters()}
    norms = {name for name in everything if ".bn" in name or "shortcut.1" in name}
    assert tuned(RiftConfig(**SMALL, modules="all"), task, robust) == everything
    assert tuned(RiftConfig(**SMALL, modules="bn"), task, robust) == norms


def table_of(values: dict[str, float], *, ineligible: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    eligible = [name for name in values if name not in ineligible]
    ranking = rift.rank_layers(values, eligible=eligible)
    return [
        {
            "layer": name,
            "criticality": value,
            "eligible": name in eligible,
            "rank": ranking.index(name) + 1 if name in ranking else None,
        }
        for name, value in values.items()
    ]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("mrc-1", ["layer2.0.conv1"]),
        ("mrc-2", ["layer1.0.conv1"]),
        ("top-2", ["layer2.0.conv1", "layer1.0.conv1"]),
        ("top-1,last", ["layer2.0.conv1", "linear"]),
        ("most-critical", ["conv1"]),
        ("last", ["linear"]),
        ("mrc-1,layer2.0.conv1", ["layer2.0.conv1"]),
        (("conv1", "linear"), ["conv1", "linear"]),
    ],
)
def test_selection(modules: Any, expected: list[str], fresh: Start) -> None:
    values = dict.fromkeys(weight_layers(fresh.build()), 5.0)
    values |= {"conv1": 9.0, "layer1.0.conv1": 0.4, "layer2.0.conv1": 0.2, "linear": 0.1}
    values["layer3.0.conv1"] = 12.0
    table = table_of(values, ineligible=("linear", "layer3.0.conv1"))
    assert choose_modules(RiftConfig(modules=modules), fresh.build(), table) == expected


def test_selection_refuses_what_is_not_there(fresh: Start) -> None:
    model = fresh.build()
    table = table_of(dict.fromkeys(weight_layers(model), 1.0))
    with pytest.raises(ConfigError, match="only 10 layers are eligible"):
        choose_modules(RiftConfig(modules="mrc-11"), model, table)
    with pytest.raises(UnknownNameError, match="layer2"):
        choose_modules(RiftConfig(modules="layer2"), model, table)
    with pytest.raises(ConfigError, match="modules is empty"):
        RiftConfig(modules=" , ")


def test_result_is_consistent(task: Task, robust: Start) -> None:
    context = LocalContext(task=task, start=robust)
    config = RiftConfig(**SMALL)
    result = rift.train(config, context)

    ranking = sorted(result.tables["criticality"], key=lambda row: row["rank"])
    assert result.choices["layer"] == ranking[0]["layer"]
    assert all(row["criticality"] >= 0 for row in ranking)
    assert all(row["movement"] <= 0.1 * (1 + 1e-6) for row in ranking)
    assert {row["num_examples"] for row in ranking} == {21}
    curve = result.tables["interpolation"]
    assert [row["alpha"] for row in curve] == [0.0, 0.5, 1.0]
    for row in curve:
        assert row["pgd_worst_case"] <= row["pgd_min_over_runs"] <= row["clean"] + 2 / 21
    chosen = next(row for row in curve if row["chosen"])
    assert chosen["alpha"] == result.choices["alpha"]
    assert result.metrics["val/clean"] == chosen["clean"]
    assert result.metrics["val/robust"] >= curve[0]["robust"] - config.tolerance - 1e-9
    assert result.metrics["val/start_clean"] == curve[0]["clean"]
    assert result.choices["leaky"] is False
    # At most the chosen layer differs; the returned state measures as the curve says.
    layer = f"network.{result.choices['layer']}."
    assert all(name.startswith(layer) for name in changed(robust.state, result.state))
    work = CurveWork(
        start=dataclasses.replace(robust, state=result.state),
        tuned={},
        split=task.splits["val"],
        threat=task.threat,
        config=config,
        device="cpu",
    )
    again = curve_point(work, 0.0)
    assert (again["clean"], again["robust"]) == (chosen["clean"], chosen["robust"])


def test_ends_of_the_curve_are_the_two_models(task: Task, robust: Start) -> None:
    """alpha = 0 is the start exactly, alpha = 1 the fine-tuned model, in all three BN modes."""
    for bn_mode in ("frozen", "update", "recalibrate_only"):
        config = RiftConfig(**SMALL, modules="conv1", bn_mode=bn_mode, keep="last")  # type: ignore[arg-type]
        context = LocalContext(task=task, start=robust)
        curve = rift.train(config, context).tables["interpolation"]
        final = {k: v.clone() for k, v in context.engine.state()["model"].items()}
        for alpha, state in ((0, robust.state), (2, final)):
            work = CurveWork(
                start=dataclasses.replace(robust, state=state),
                tuned={},
                split=task.splits["val"],
                threat=task.threat,
                config=config,
                device="cpu",
            )
            expected = curve_point(work, 0.0)
            for key in ("clean", "robust", "pgd_worst_case"):
                assert curve[alpha][key] == expected[key]


def test_common_and_fresh_noise(task: Task, robust: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def recording(model: Any, inputs: Any, labels: Any, *, start_noise: Any, **options: Any) -> Any:
        seeds.append(start_noise.initial_seed())
        return craft(model, inputs, labels, start_noise=start_noise, **options)

    monkeypatch.setattr("robustft.methods.interpolation.craft", recording)

    def measure(*, fresh_noise: bool) -> tuple[list[dict[str, Any]], list[int]]:
        seeds.clear()
        work = CurveWork(
            start=robust,
            tuned={},
            split=task.splits["val"],
            threat=task.threat,
            config=RiftConfig(**SMALL, fresh_noise=fresh_noise),
            device="cpu",
        )
        points = [{**curve_point(work, alpha), "alpha": 0} for alpha in (0.0, 0.3, 1.0)]
        return points, list(seeds)

    # Nothing was tuned, so all alphas are the same model: under common noise they measure alike.
    points, common = measure(fresh_noise=False)
    assert all(point == points[0] for point in points)
    assert common == common[:2] * 3
    assert len(set(common)) == 2
    _, fresh = measure(fresh_noise=True)
    assert len(set(fresh)) == 6


def test_robust_metric_is_a_choice_between_two_named_numbers(task: Task, robust: Start) -> None:
    for metric, key in (
        ("min_over_runs", "pgd_min_over_runs"),
        ("worst_case", "pgd_worst_case"),
    ):
        work = CurveWork(
            start=robust,
            tuned={},
            split=task.splits["val"],
            threat=task.threat,
            config=RiftConfig(**SMALL, robust_metric=metric),  # type: ignore[arg-type]
            device="cpu",
        )
        point = curve_point(work, 0.0)
        assert point["robust"] == point[key]


def test_prepared_once_equals_prepared_inside(task: Task, robust: Start) -> None:
    config = RiftConfig(**SMALL)
    prepared = METHODS["rift"].prepare(config, LocalContext(task=task, start=robust))  # type: ignore[misc]
    inside = rift.train(config, LocalContext(task=task, start=robust))
    outside = rift.train(config, LocalContext(task=task, start=robust, prepared=prepared))
    assert inside.tables == outside.tables
    assert inside.metrics == outside.metrics
    # What a search may vary does not make the preparation stale; what it depends on does.
    varied = dataclasses.replace(config, lr=0.002, seed=4, modules="mrc-2")
    other = rift.train(varied, LocalContext(task=task, start=robust, prepared=prepared))
    assert other.choices["layer"] != outside.choices["layer"]
    stale = dataclasses.replace(config, mrc_eps=0.2)
    with pytest.raises(ConfigError, match="measured with other settings"):
        rift.train(stale, LocalContext(task=task, start=robust, prepared=prepared))


def test_shards_do_not_change_the_stored_examples(task: Task, robust: Start) -> None:
    values = [
        [
            row["criticality"]
            for row in rift.prepare(
                RiftConfig(**SMALL, eval_batch_size=size), LocalContext(task=task, start=robust)
            )["criticality"]
        ]
        for size in (5, 512)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5)


def test_resumed_fine_tuning_equals_undisturbed(task: Task, robust: Start) -> None:
    for bn_mode in ("frozen", "update"):
        config = RiftConfig(**SMALL, modules="layer2.0.conv2", bn_mode=bn_mode)  # type: ignore[arg-type]
        whole = rift.train(config, LocalContext(task=task, start=robust))
        stopped = LocalContext(task=task, start=robust)
        original = stopped.report

        def report(*args: Any, original: Any = original, **options: Any) -> None:
            original(*args, **options)
            raise KeyboardInterrupt

        stopped.report = report  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            rift.train(config, stopped)
        again = LocalContext(task=task, start=robust, checkpoint=stopped.checkpoint)
        resumed = rift.train(config, again)
        assert len(again.reports) == 1
        assert resumed.tables == whole.tables
        assert not changed(whole.state, resumed.state)


def test_keep_chooses_the_epoch_and_its_weights(
    task: Task, robust: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep, expected in (("best", 2), ("last", 3)):
        scores, states = [0.5, 0.9, 0.9], []

        def scripted(
            model: Any, *_: Any, scores: Any = scores, states: Any = states, **__: Any
        ) -> Any:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            return {"val/clean": scores[len(states) - 1]}

        monkeypatch.setattr(rift, "validate", scripted)
        config = RiftConfig(
            **{**SMALL, "epochs": 3, "alphas": (0.0, 1.0)}, modules="last", tolerance=1.0, keep=keep
        )
        monkeypatch.setattr(rift, "select_alpha", lambda curve, *, tolerance: 1.0)
        result = rift.train(config, LocalContext(task=task, start=robust))
        assert result.choices["epoch"] == expected
        assert not changed(result.state, states[expected - 1])
        assert changed(states[1], states[2])


def test_a_grid_that_ends_early_says_nothing_about_its_end(task: Task, robust: Start) -> None:
    config = RiftConfig(**{**SMALL, "alphas": (0.0, 0.2)}, modules="last")
    result = rift.train(config, LocalContext(task=task, start=robust))
    assert "val/tuned_clean" not in result.metrics
    assert "val/start_clean" in result.metrics


def test_controls_need_no_criticality(task: Task, robust: Start) -> None:
    result = rift.train(RiftConfig(**SMALL, modules="last"), LocalContext(task=task, start=robust))
    assert result.tables["criticality"] == []


def test_test_split_is_read_only_on_request_and_then_marked(task: Task, robust: Start) -> None:
    split = task.splits["test"]
    scrambled = Split(255 - split.images, split.labels[::-1].copy(), split.ids)
    other = dataclasses.replace(task, splits={**task.splits, "test": scrambled})
    config = RiftConfig(**SMALL)
    first, second = (
        rift.train(config, LocalContext(task=each, start=robust)) for each in (task, other)
    )
    assert first.tables == second.tables
    leaky = rift.train(
        dataclasses.replace(config, mrc_split="test"), LocalContext(task=task, start=robust)
    )
    assert leaky.choices["leaky"] is True
    assert leaky.tables["criticality"][0]["num_examples"] == 9


def test_every_option_reaches_the_ascent(task: Task, robust: Start) -> None:
    options: dict[str, Any] = {
        "eps": 0.2,
        "lr": 0.5,
        "batch_size": 7,
        "projection": "step",
        "start_at_zero": True,
        "prefix_cache": False,
        "cache_mib": 5,
        "seed": 4,
    }
    shared_of: dict[str, Any] = {}

    class Capturing(LocalContext):
        def map(self, fn: Any, items: Any, *, shared: Any, key: str, name: str) -> list[Any]:
            shared_of[name] = shared
            return super().map(fn, items, shared=shared, key=key, name=name)

    fields = {f"mrc_{name}": value for name, value in options.items()}
    config = RiftConfig(**SMALL, **fields, eligible=("linear",))
    rift.prepare(config, Capturing(task=task, start=robust))
    assert shared_of["criticality"].config == CriticalityConfig(num_epochs=2, **options)
    assert shared_of["adversarial examples"].seed == 4
    assert shared_of["adversarial examples"].attack == ATTACK


def test_subset_of_examples(task: Task, robust: Start) -> None:
    config = RiftConfig(**SMALL, mrc_examples=7)
    table = rift.prepare(config, LocalContext(task=task, start=robust))["criticality"]
    assert {row["num_examples"] for row in table} == {7}


def test_divergence_is_an_error(task: Task, robust: Start) -> None:
    config = RiftConfig(**{**SMALL, "lr": 1e30}, modules="all", bn_mode="update")
    with pytest.raises(NonFiniteLossError, match="lower lr"):
        rift.train(config, LocalContext(task=task, start=robust))


def test_official_preset_is_the_published_behaviour() -> None:
    config = rift.official(modules="layer2.1.conv2")
    assert config.modules == "layer2.1.conv2"
    assert (config.bn_mode, config.mrc_split, config.curve_runs) == ("update", "test", 1)
    assert config.mrc_attack.step_size == config.curve_attack.step_size == 2 / 225
    assert config.mrc_start_at_zero
    assert config.fresh_noise
    assert (config.epochs, config.lr, config.batch_size) == (10, 1e-3, 128)
    assert config.schedule.name == "halfway"
    assert config.optimizer.weight_decay == 5e-4


def test_default_grid_is_the_nearest_doubles() -> None:
    assert RiftConfig().alphas == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alphas": (0.1, 1.0)}, "must ascend from 0"),
        ({"alphas": (0.0, 0.5, 0.5)}, "must ascend from 0"),
        ({"alphas": (0.0, 1.1)}, "end at most at 1"),
        ({"tolerance": 2.0}, "tolerance = 2.0: must be a number >= 0 and <= 1"),
        ({"mrc_eps": 0.0}, "mrc_eps = 0.0: must be a number > 0"),
        ({"mrc_examples": 0}, "mrc_examples = 0"),
        ({"bn_mode": "freeze"}, "did you mean 'frozen'"),
        ({"eligible": ()}, "eligible is empty"),
        ({"curve_runs": 0}, "curve_runs = 0"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RiftConfig(**fields)


def test_unknown_pattern_is_refused(task: Task, robust: Start) -> None:
    config = RiftConfig(**SMALL, eligible=("*.conv7",))
    with pytest.raises(UnknownNameError, match="pattern"):
        rift.prepare(config, LocalContext(task=task, start=robust))


def test_values_of_fan_out_are_plain(task: Task, robust: Start) -> None:
    """What ``map`` returns must be JSON scalars, lists and NumPy arrays."""
    seen: list[Any] = []

    class Recording(LocalContext):
        def map(self, fn: Any, items: Any, **options: Any) -> list[Any]:
            values = LocalContext.map(self, fn, items, **options)
            seen.extend(values)
            return values

    rift.train(RiftConfig(**SMALL), Recording(task=task, start=robust))
    leaves = [leaf for value in seen for leaf in value.values()]
    assert leaves
    assert all(isinstance(leaf, (int, float, np.ndarray)) for leaf in leaves)
