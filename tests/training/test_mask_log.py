"""What the loops that take any optimiser say of ROSE's masks."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.training.augment import AugmentConfig
from robustft.training.context import LocalContext
from robustft.training.loaders import Batch
from robustft.training.loop import epoch_metrics, run_epoch
from robustft.training.mask_log import EpochMasks, MaskLog
from robustft.training.optimizers import OptimizerConfig, build_optimizer
from robustft.training.rose_adamw import RoseAdamW, StepRecord
from robustft.training.schedules import ScheduleConfig

STEPS = 4
KERNELS = 10
SCALARS = (KERNELS - 1) * 16 + 12


@dataclasses.dataclass(frozen=True)
class Pace:
    epochs: int = 2
    lr: float = 0.01
    seed: int = 0
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(crop_padding=0, flip=0.0)
    )


class Numbers:
    """Batches of random numbers; the one called ``broken`` has a NaN."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int) -> Any:
        draw = torch.Generator().manual_seed(epoch)
        for step in range(STEPS):
            inputs = torch.randn(6, 1, 2, 2, generator=draw)
            scale = float("nan") if step == self.broken else 1.0
            yield Batch(inputs, torch.arange(6) % 3, torch.arange(6), scale=scale, count=6)


def loss(network: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = network(batch.inputs)
    return functional.cross_entropy(logits, batch.labels), logits


def prepared(config: OptimizerConfig) -> tuple[Any, nn.Module]:
    """Return a context and a network whose blocks have ten kernels."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(KERNELS - 1)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(4, 3))
    context: Any = LocalContext(task=None, start=None)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, model.named_parameters(), lr=0.01)
    return context, context.engine.prepare(model, optimizer)


def test_an_epoch_says_what_the_steps_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 kernels the percentile 60 keeps 6; a run's first step has no average and keeps all."""
    seen: list[dict[str, float]] = []
    step = RoseAdamW.step

    def spying(self: RoseAdamW, grads: Any = None) -> None:
        step(self, grads)
        assert self.record is not None
        seen.append(dict(self.record.masks))

    monkeypatch.setattr(RoseAdamW, "step", spying)
    context, network = prepared(OptimizerConfig(name="rose", upper=60.0))
    found = [run_epoch(Pace(), context, network, Numbers(), loss, epoch=e) for e in (0, 1)]
    assert [one["mask/kept"] for one in found] == pytest.approx([(1 + 3 * 0.6) / STEPS, 0.6])
    for metrics, masks in zip(found, (seen[:STEPS], seen[STEPS:]), strict=True):
        assert {len(mask) for mask in masks} == {KERNELS}
        changes = [
            abs(after[name] - before[name])
            for before, after in itertools.pairwise(masks)
            for name in after
        ]
        assert metrics["mask/churn"] == pytest.approx(sum(changes) / (KERNELS * (STEPS - 1)))
        assert metrics["mask/churn"] > 0
        scalars = sum(
            value * (12 if name == f"{KERNELS}.weight" else 16)
            for mask in masks
            for name, value in mask.items()
        )
        assert metrics["mask/kept_scalars"] == pytest.approx(scalars / SCALARS / STEPS)
        # Linear layers without attention are no transformer's.
        assert metrics.keys() == {
            *("loss", "accuracy", "lr", "mask/kept", "mask/kept_scalars", "mask/churn"),
            *("mask/skipped_steps", "mask/first_order_skipped"),
        }


def test_skipped_steps_are_counted_and_have_no_mask() -> None:
    context, network = prepared(OptimizerConfig(name="rose", upper=60.0))
    found = run_epoch(Pace(), context, network, Numbers(broken=2), loss, epoch=0)
    assert found["mask/skipped_steps"] == 1
    assert found["mask/kept"] == pytest.approx((1 + 2 * 0.6) / 3)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_other_optimizers_have_no_masks(name: Any) -> None:
    context, network = prepared(OptimizerConfig(name=name))
    found = run_epoch(Pace(), context, network, Numbers(), loss, epoch=0)
    assert found.keys() == {"loss", "accuracy", "lr"}


def test_without_updates_there_are_no_masks() -> None:
    context, network = prepared(OptimizerConfig(name="rose"))
    found = run_epoch(Pace(), context, network, Numbers(), loss, epoch=0, update=False)
    assert found.keys() == {"loss", "accuracy", "lr"}
    assert EpochMasks(None).metrics() == {}


def test_only_networks_with_attention_have_kinds_and_one_mask_has_no_churn() -> None:
    names = ("layer1.0.conv1.weight", "layer1.0.conv2.weight")
    log = MaskLog(dict.fromkeys(names, 9))
    log.add(StepRecord(dict(zip(names, (1.0, 0.0), strict=True))))
    assert log.metrics() == {
        "mask/skipped_steps": 0,
        "mask/first_order_skipped": 0,
        "mask/kept": 0.5,
        "mask/kept_scalars": 0.5,
    }
    names = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    log = MaskLog(dict.fromkeys(names, 9))
    log.add(StepRecord(dict(zip(names, (1.0, 0.0), strict=True))))
    found = log.metrics()
    assert (found["mask/kept_attention"], found["mask/kept_ffn"]) == (1.0, 0.0)


def test_reports_have_the_methods_names() -> None:
    trained = {"loss": 1.0, "accuracy": 0.5, "lr": 0.1, "mask/kept": 0.6}
    assert epoch_metrics(trained, accuracy="train/clean") == {
        "train/loss": 1.0,
        "train/clean": 0.5,
        "lr": 0.1,
        "mask/kept": 0.6,
    }
