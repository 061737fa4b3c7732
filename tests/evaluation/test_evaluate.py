"""The evaluation protocol: shards and batches do not matter, masks combine, intervals hold."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from robustft.attacks import pgd
from robustft.data import Split, Task
from robustft.errors import ConfigError, UnknownNameError
from robustft.evaluation import Evaluation, EvaluationConfig, evaluate
from robustft.evaluation.intervals import wilson
from robustft.threat import ThreatModel

CONFIG = EvaluationConfig(
    suite="report", pgd_steps=3, apgd_steps=4, severities=(2,), shard_size=16, batch_size=8
)


class Doubled(nn.Module):
    """A linear model in float64, so that batch sizes cannot change a bit of the outcome."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(3 * 16 * 16, 4).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(inputs.double().flatten(1))
        return logits


def make_task(n: int = 40, *, selection: str = "val") -> Task:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, size=(n, 3, 16, 16)).astype(np.uint8)
    with torch.no_grad():
        labels = Doubled()(torch.from_numpy(images) / 255).argmax(1).numpy()
    labels[::5] = (labels[::5] + 1) % 4  # a fifth is wrong
    split = Split(images, labels.astype(np.int64), np.arange(100, 100 + n, dtype=np.int64))
    return Task(
        name="toy",
        splits={"train": split, "val": split, "test": split},
        class_names=tuple("abcd"),
        threat_models=(ThreatModel("Linf", 0.01), ThreatModel("L2", 0.1)),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        digest="toy",
        selection=selection,  # type: ignore[arg-type]
    )


def same(one: Evaluation, other: Evaluation) -> bool:
    return one.masks.keys() == other.masks.keys() and all(
        np.array_equal(one.masks[name], other.masks[name]) for name in one.masks
    )


def test_shards_and_batches_change_nothing() -> None:
    model, task = Doubled(), make_task()
    whole = evaluate(
        model, task, config=dataclasses.replace(CONFIG, shard_size=1000, batch_size=1000)
    )
    pieces = evaluate(model, task, config=dataclasses.replace(CONFIG, shard_size=7, batch_size=3))
    assert same(whole, pieces)
    assert len(whole.masks) == 1 + 2 * 2 + 15


def test_items_may_be_computed_in_any_order() -> None:
    def backwards(fn, items, *, shared, key, name):  # type: ignore[no-untyped-def]
        return [fn(shared, item) for item in reversed(list(items))][::-1]

    model, task = Doubled(), make_task()
    assert same(
        evaluate(model, task, config=CONFIG), evaluate(model, task, config=CONFIG, map=backwards)
    )


def test_metrics_follow_from_the_masks() -> None:
    found = evaluate(Doubled(), make_task(), config=CONFIG)
    metrics, masks = found.metrics, found.masks
    assert metrics["clean"] == pytest.approx(32 / 40)
    survivors = masks["clean"] & masks["L2/pgd"] & masks["L2/apgd"]
    assert metrics["L2/robust"] == pytest.approx(survivors.mean())
    both = survivors & masks["Linf/pgd"] & masks["Linf/apgd"]
    assert metrics["robust"] == pytest.approx(both.mean())
    types = [values for name, values in masks.items() if name.startswith("corruption/")]
    assert metrics["corruptions"] == pytest.approx(np.mean(types))
    assert metrics["robust"] <= metrics["clean"]
    assert found.interval("clean") == wilson(32, 40)


def test_pgd_is_the_attack_with_the_instance_ids() -> None:
    model, task = Doubled(), make_task()
    found = evaluate(model, task, suite="clean,pgd", config=CONFIG)
    split = task.splits["test"]
    result = pgd(
        model,
        torch.from_numpy(split.images.copy()).float() / 255,
        torch.from_numpy(split.labels.copy()),
        norm="Linf",
        eps=0.01,
        num_steps=3,
        generator=torch.Generator().manual_seed(0),
        sample_ids=torch.from_numpy(split.ids.copy()),
    )
    assert np.array_equal(found.masks["Linf/pgd"], found.masks["clean"] & result.robust.numpy())


def test_passes_are_counted_for_attacked_images_only() -> None:
    found = evaluate(Doubled(), make_task(), suite="pgd", config=CONFIG)
    # 2 norms x (40 clean forwards + 32 correct images x (3 steps + 1 report)).
    assert found.num_forwards == 2 * (40 + 32 * 4)
    assert found.num_backwards == 2 * 32 * 3


def test_limits_draw_a_fixed_sample() -> None:
    model, task = Doubled(), make_task()
    config = dataclasses.replace(CONFIG, suite="corruptions", limit=20, corruption_limit=8)
    found = evaluate(model, task, config=config)
    assert len(found.ids) == len(set(found.ids.tolist())) == 20
    assert len(found.masks["corruption/fog/2"]) == 8
    assert np.array_equal(found.ids, evaluate(model, task, config=config).ids)
    assert not np.array_equal(found.ids, np.sort(found.ids))


def test_masks_are_saved_with_their_ids(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = dataclasses.replace(CONFIG, corruption_limit=8)
    found = evaluate(Doubled(), make_task(), config=config)
    found.save(tmp_path / "masks.parquet")
    table = pq.read_table(tmp_path / "masks.parquet")
    assert table["id"].to_pylist() == found.ids.tolist()
    assert table["clean"].to_pylist() == found.masks["clean"].tolist()
    fog = table["corruption/fog/2"].to_pylist()
    assert fog[:8] == found.masks["corruption/fog/2"].tolist()
    assert fog[8:] == [None] * 32


def test_leaky_numbers_say_so() -> None:
    model = Doubled()
    assert evaluate(model, make_task(selection="official"), suite="clean").leaky
    assert not evaluate(model, make_task(), suite="clean").leaky


def test_the_model_is_left_as_it_was() -> None:
    model = Doubled().train()
    evaluate(model, make_task(), suite="quick", config=CONFIG)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_wrong_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'quick'"):
        EvaluationConfig(suite="quik")
    with pytest.raises(UnknownNameError, match="'tset'"):
        evaluate(Doubled(), make_task(), split="tset")
    with pytest.raises(ConfigError, match="severities"):
        EvaluationConfig(severities=(0,))
