"""ROSE's training loop, on texts that can be learnt in seconds."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.config import from_dict, to_dict
from robustft.data.text import TextSplit, TextTask
from robustft.errors import ConfigError, NonFiniteLossError
from robustft.methods import rose
from robustft.methods.child_tuning import ChildTuningConfig
from robustft.methods.rose import (
    MaskOptions,
    RoseAdamW,
    RoseConfig,
    dropout_rates,
    linear_rate,
    set_dropout,
    train,
)
from robustft.methods.text_losses import TextLossConfig
from robustft.training.context import LocalContext
from robustft.training.mask_log import MaskLog, kind_of
from robustft.training.rose_adamw import StepRecord
from robustft.training.seeding import derive_seed
from robustft.training.text_loader import TextLoader

VOCABULARY = 24
GOOD, BAD = range(4, 8), range(8, 12)
WIDTH = 8
PAD = 0


class Block(nn.Module):
    """Named as a transformer's block, but each token by itself: padding cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})
        self.LayerNorm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = functional.gelu(self.attention["dense"](hidden))
        inner = self.dropout(self.intermediate["dense"](inner))
        output: Tensor = self.LayerNorm(hidden + inner)
        return output


class Toy(nn.Module):
    """A classifier with the interface of TextModel.

    ``fixed_noise`` puts noise in the place of dropout that depends on the tokens and on whether
    the pass is an odd or an even one: the same for any number of workers and parts of a batch.
    """

    def __init__(self, fixed_noise: bool = False) -> None:
        super().__init__()
        self.pad_id = PAD
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Block(), Block()])})
        self.classifier = nn.Linear(WIDTH, 2)
        self.fixed_noise, self.num_passes = fixed_noise, 0

    def embed(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = self.embeddings(inputs[:, 0])
        return embeddings

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        hidden = embeddings
        for block in self.encoder["layer"]:  # type: ignore[attr-defined]
            hidden = block(hidden)
        if self.fixed_noise and self.training:
            keys = 7.0 * inputs[:, 0].sum(1, keepdim=True) + 13 * (self.num_passes % 2)
            noise = torch.sin(keys + torch.arange(WIDTH))
            hidden = hidden * (1 + 0.5 * noise.unsqueeze(1))
            self.num_passes += 1
        real = (inputs[:, 0] != PAD).unsqueeze(2)
        logits: Tensor = self.classifier((hidden * real).sum(1) / real.sum(1))
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.from_embeddings(self.embed(inputs), inputs)


@dataclasses.dataclass(frozen=True)
class ToyStart:
    dropout: float = 0.1
    fixed_noise: bool = False
    num_classes: int = 2
    scale: float = 1.0

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            model = Toy(self.fixed_noise)
        set_dropout(model, self.dropout)
        if self.fixed_noise:
            model.attention_dropout = 0.1  # type: ignore[assignment]
        model.classifier.weight.data *= self.scale
        return model.eval()


def make_split(count: int, first_id: int) -> TextSplit:
    """Rows of filler words and three good or three bad ones."""
    draw = np.random.default_rng(first_id)
    labels = np.arange(count) % 2
    rows = []
    for label in labels:
        words = draw.choice(GOOD if label else BAD, 3)
        filler = draw.integers(12, VOCABULARY, draw.integers(1, 5))
        rows.append(draw.permutation(np.concatenate([words, filler])))
    tokens = np.concatenate(rows).astype(np.int32)
    texts = pa.array([" ".join(map(str, row)) for row in rows])
    return TextSplit(
        text_a=texts,
        text_b=None,
        labels=labels.astype(np.int64),
        ids=np.arange(first_id, first_id + count, dtype=np.int64),
        tokens=tokens,
        token_types=np.zeros(len(tokens), dtype=np.int8),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
    )


def make_task(train_size: int = 37) -> TextTask:
    return TextTask(
        name="words",
        splits={
            "train": make_split(train_size, 0),
            "val": make_split(21, 100),
            "test": make_split(9, 200),
        },
        fixed={},
        class_names=("bad", "good"),
        tokenizer="words",
        max_length=8,
        digest="words",
    )


def make_context(start: ToyStart | None = None, **fields: Any) -> LocalContext:
    task: Any = make_task()
    chosen: Any = ToyStart() if start is None else start
    return LocalContext(task=task, start=chosen, **fields)


# 37 texts in batches of 12: the last one has a single text.
BASE = RoseConfig(variant="second", upper=50, epochs=2, batch_size=12, lr=0.01, keep="last")


def run(**changes: Any) -> tuple[Any, LocalContext]:
    start = changes.pop("start", None)
    context = make_context(start)
    return train(dataclasses.replace(BASE, **changes), context), context


def assert_same(first: Any, second: Any) -> None:
    assert first.state.keys() == second.state.keys()
    for name, value in first.state.items():
        assert torch.equal(value, second.state[name]), name


# What is computed.


@pytest.mark.parametrize("variant", ["vanilla", "first", "second", "ensemble"])
def test_every_variant_learns(variant: Any) -> None:
    config = RoseConfig(variant=variant, upper=60, epochs=6, batch_size=8, lr=0.02)
    context = make_context()
    result = train(config, context)
    assert result.metrics["val/clean"] > 0.9
    assert context.reports[0]["train/loss"] > context.reports[-1]["train/loss"]
    model = ToyStart().build()
    model.load_state_dict(dict(result.state))
    split = make_task().splits["test"]
    loader = TextLoader(split, batch_size=9, seed=0, device=torch.device("cpu"), pad_id=PAD)
    (batch,) = loader.epoch(0)
    assert (model(batch.inputs).argmax(1) == batch.labels).float().mean() > 0.8


def test_a_step_is_the_one_of_the_method() -> None:
    """Once more, in plain code: two passes, two masks, clipped gradients, AdamW."""
    config = dataclasses.replace(
        BASE, variant="ensemble", upper=60, gamma=0.3, epochs=1, batch_size=10
    )
    context = make_context()
    result = train(config, context)

    model = ToyStart().build().train()
    named = dict(model.named_parameters())
    chosen = [name for name in named if "layer" in name and "weight" in name]
    assert len(chosen) == 6
    m = {name: torch.zeros_like(value) for name, value in named.items()}
    v = {name: torch.zeros_like(value) for name, value in named.items()}
    loader = TextLoader(
        make_task().splits["train"], batch_size=10, seed=0, device=torch.device("cpu"), pad_id=PAD
    )
    for step, batch in enumerate(loader.epoch(0)):
        torch.manual_seed(derive_seed(0, "layers", 0, step, 0))
        a, b = model(batch.inputs), model(batch.inputs)
        p, q = a.softmax(1), b.softmax(1)
        kl = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 4
        kl_grads = torch.autograd.grad(kl, [named[name] for name in chosen], retain_graph=True)
        loss = functional.cross_entropy(torch.cat([a, b]), torch.cat([batch.labels] * 2))
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        total = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        grads = {name: grad * min(1.0, 1 / (total + 1e-6)) for name, grad in grads.items()}

        def kept(scores: list[float]) -> np.ndarray[Any, Any]:
            return (np.array(scores) <= np.percentile(scores, 60)).astype(float)

        first = kept([float(grad.norm()) for grad in kl_grads])
        second = np.ones(6)
        if step:
            second = kept(
                [abs(0.1 * float(grads[n].norm()) / float(m[n].norm()) - 1) for n in chosen]
            )
        masks = dict(zip(chosen, 0.3 * first + 0.7 * second, strict=True))
        t, lr = step + 1, 0.01 * (4 - step) / 4
        with torch.no_grad():
            for name, parameter in named.items():
                mask = masks.get(name, 1.0)
                replaced = mask * grads[name] + (1 - mask) * m[name]
                m[name] = 0.9 * m[name] + 0.1 * replaced
                v[name] = 0.98 * v[name] + 0.02 * replaced**2
                size = lr * math.sqrt(1 - 0.98**t) / (1 - 0.9**t)
                parameter -= size * mask * m[name] / (v[name].sqrt() + 1e-6)
                if "bias" not in name and "Norm" not in name:
                    parameter -= lr * 0.01 * mask * parameter
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-4, atol=1e-6)


def test_keeping_everything_is_plain_fine_tuning_bit_for_bit() -> None:
    """Second equals vanilla, First equals vanilla on two passes: nothing else differs."""
    vanilla, _ = run(variant="vanilla")
    second, _ = run(variant="second", upper=100)
    assert_same(vanilla, second)
    twice, _ = run(variant="vanilla", loss=TextLossConfig(name="two_pass"))
    first, _ = run(variant="first", upper=100)
    assert_same(twice, first)
    masked, _ = run(variant="first", upper=50)
    assert not torch.equal(masked.state["classifier.weight"], first.state["classifier.weight"])
    # The extra passes of a loss without a pair do not disturb its own dropout.
    extra, _ = run(variant="first", upper=100, loss=TextLossConfig(name="ce"))
    assert_same(vanilla, extra)


class Counting(nn.Module):
    """The toy, with every pass of a text counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder, self.embeddings = model.encoder, model.embeddings
        self.classifier, self.pad_id, self.model = model.classifier, PAD, [model]
        self.forwards = self.backwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        model = self.model[0].train(self.training)
        hidden = model.embed(inputs)
        self.forwards += len(inputs)

        def hook(grad: Tensor) -> None:
            self.backwards += len(grad)

        if hidden.requires_grad:
            hidden.register_hook(hook)
        logits: Tensor = model.from_embeddings(hidden, inputs)
        return logits


@pytest.mark.parametrize(
    ("changes", "forwards", "backwards"),
    [
        ({"variant": "vanilla"}, 1, 1),
        ({"variant": "second"}, 1, 1),
        # The disagreement is differentiated for the blocks only: embeddings see the loss's alone.
        ({"variant": "first"}, 2, 2),
        ({"variant": "ensemble"}, 2, 2),
        ({"variant": "ensemble", "loss": TextLossConfig(name="r_drop")}, 2, 2),
        ({"variant": "first", "loss": TextLossConfig(name="ce")}, 3, 1),
        ({"variant": "vanilla", "loss": TextLossConfig(name="two_pass")}, 2, 2),
    ],
    ids=str,
)
def test_passes(changes: dict[str, Any], forwards: int, backwards: int) -> None:
    counting = Counting(ToyStart().build())

    class Start:
        num_classes = 2

        def build(self) -> nn.Module:
            return counting

    start: Any = Start()
    config = dataclasses.replace(BASE, epochs=1, **changes)
    result = train(config, dataclasses.replace(make_context(), start=start))
    assert counting.forwards == 37 * forwards + 21
    assert counting.backwards == 37 * backwards
    assert result.metrics["passes/forwards"] == counting.forwards
    kl = 2 * 37 if config.uses_first_order else 0
    assert result.metrics["passes/backwards"] == counting.backwards + kl


@pytest.mark.parametrize("variant", ["second", "ensemble"])
def test_parts_of_a_batch_add_up(variant: Any) -> None:
    """Also those of unequal size, and the last batch, whose one text cannot be cut."""
    start = ToyStart(dropout=0.0, fixed_noise=variant == "ensemble")
    whole, _ = run(variant=variant, start=start, clip_norm=None)
    parts, _ = run(variant=variant, start=start, clip_norm=None, accumulate=5)
    for name, value in whole.state.items():
        torch.testing.assert_close(parts.state[name], value, rtol=1e-4, atol=1e-6)
    assert parts.tables["mask_frequency"] == whole.tables["mask_frequency"]
    for row, expected in zip(parts.tables["epochs"], whole.tables["epochs"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_gradients_are_clipped_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    original = RoseAdamW.step

    def step(self: RoseAdamW, grads: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms.append(float(nn.utils.get_total_norm([p.grad for p in parameters])))
        original(self, grads)

    monkeypatch.setattr(RoseAdamW, "step", step)
    start = ToyStart(scale=50.0)
    run(start=start, epochs=1)
    assert max(norms) == pytest.approx(1, abs=1e-4)
    norms.clear()
    run(start=start, epochs=1, clip_norm=None)
    assert max(norms) > 2
    norms.clear()
    # Child-Tuning multiplies what it keeps by 1 / 0.1, after the clipping.
    child = ChildTuningConfig(name="free", keep=0.1)
    run(start=start, epochs=1, variant="vanilla", child_tuning=child)
    assert max(norms) > 2


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "ensemble"},
        {"variant": "first", "mask": "fixed", "options": MaskOptions(fixed_steps=2)},
        {"variant": "second", "mask": "random", "accumulate": 2},
        {"variant": "vanilla", "loss": TextLossConfig(name="smart")},
        {"variant": "second", "loss": TextLossConfig(name="freelb"), "keep": "best"},
        {"variant": "second", "child_tuning": ChildTuningConfig(name="data")},
        {"variant": "vanilla", "child_tuning": ChildTuningConfig(name="free")},
        {"variant": "ensemble", "options": MaskOptions(mask_every=3), "precision": "bf16"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_undisturbed_one(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(BASE, epochs=3, **changes)
    whole = train(config, make_context())
    saved: list[Any] = []

    class Stopped(Exception):
        pass

    class Stopping(LocalContext):
        def report(self, *args: Any, **kwargs: Any) -> None:
            super().report(*args, **kwargs)
            saved.append(copy.deepcopy(self.checkpoint))
            raise Stopped

    context = make_context()
    with pytest.raises(Stopped):
        train(config, Stopping(task=context.task, start=context.start))
    torch.manual_seed(99)
    resumed = train(config, make_context(checkpoint=saved[0]))
    assert_same(whole, resumed)
    assert resumed.tables == whole.tables
    assert resumed.metrics == whole.metrics


# What is recorded.


def test_what_an_epoch_reports() -> None:
    result, context = run(variant="first", upper=50, epochs=2)
    report = context.reports[0]
    assert {"train/loss", "train/clean", "train/kl", "val/clean", "lr"} <= report.keys()
    assert report["train/kl"] > 0
    assert report["mask/kept"] == pytest.approx(0.5)
    kinds = ("attention", "ffn", "norm")
    assert report["mask/kept"] == pytest.approx(
        sum(report[f"mask/kept_{kind}"] for kind in kinds) / 3
    )
    rows = result.tables["mask_frequency"]
    assert len(rows) == 6
    assert {row["steps"] for row in rows} == {8}
    assert sum(row["frequency"] for row in rows) == pytest.approx(3)
    scalars = sum(row["frequency"] * row["scalars"] for row in rows) / (4 * 64 + 2 * 8)
    per_epoch = [report["mask/kept_scalars"] for report in context.reports]
    assert sum(per_epoch) / 2 == pytest.approx(scalars)
    vanilla, context = run(variant="vanilla")
    assert "mask/kept" not in context.reports[0]
    assert vanilla.tables["mask_frequency"][0]["frequency"] is None


def test_the_log_by_hand() -> None:
    names = ["e.layer.0.attention.q.weight", "e.layer.0.LayerNorm.weight", "e.layer.1.w.weight"]
    log = MaskLog(dict(zip(names, (10, 2, 8), strict=True)))
    log.add(StepRecord(dict(zip(names, (1.0, 0.0, 0.5), strict=True))))
    log.add(StepRecord({}, skipped=True))
    log.add(StepRecord(dict(zip(names, (0.0, 0.0, 1.0), strict=True)), first_order_skipped=True))
    assert log.metrics() == pytest.approx(
        {
            "mask/skipped_steps": 1,
            "mask/first_order_skipped": 1,
            "mask/kept": (0.5 + 0 + 0.75) / 3,
            "mask/kept_scalars": (5 + 0 + 6) / 20,
            "mask/kept_attention": 0.5,
            "mask/kept_norm": 0.0,
            "mask/kept_ffn": 0.75,
            "mask/churn": (1 + 0 + 0.5) / 3,
        }
    )
    log.start_epoch()
    log.add(StepRecord(dict(zip(names, (1.0, 1.0, 1.0), strict=True))))
    assert log.metrics()["mask/kept"] == 1
    assert log.metrics()["mask/churn"] == pytest.approx(2 / 3)
    assert [row["frequency"] for row in log.table()] == pytest.approx([2 / 3, 1 / 3, 2.5 / 3])
    assert kind_of("classifier.weight") == "other"


def test_the_best_epoch_is_kept() -> None:
    result, context = run(keep="best", epochs=4, lr=0.02)
    scores = [report["val/clean"] for report in context.reports]
    assert result.metrics["val/clean"] == max(scores)
    assert result.choices["epoch"] == scores.index(max(scores)) + 1
    last, _ = run(keep="last", epochs=4, lr=0.02)
    assert last.choices["epoch"] == 4


def test_diverging_is_an_error() -> None:
    with pytest.raises(NonFiniteLossError, match="lower lr"):
        run(start=ToyStart(scale=math.inf), variant="vanilla")


# Dropout and rate.


def test_every_dropout_is_set() -> None:
    model = ToyStart(dropout=0.3).build()
    model.attention = nn.MultiheadAttention(4, 1, dropout=0.2)  # type: ignore[assignment]
    assert sorted(dropout_rates(model)) == [0.2, 0.3, 0.3]
    set_dropout(model, 0.05)
    assert dropout_rates(model) == [0.05] * 3
    result, _ = run(kl_dropout=0.0, variant="vanilla")
    other, _ = run(start=ToyStart(dropout=0.0), variant="vanilla")
    assert_same(result, other)


def test_first_order_needs_dropout() -> None:
    with pytest.raises(ConfigError, match="set kl_dropout"):
        run(variant="first", start=ToyStart(dropout=0.0))
    run(variant="first", start=ToyStart(dropout=0.0), kl_dropout=0.1, epochs=1)


def test_the_rate_falls_linearly() -> None:
    assert [linear_rate(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    rates = [linear_rate(step, 10, warmup=0.2) for step in range(10)]
    assert rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    _, context = run(epochs=2)
    assert [report["lr"] for report in context.reports] == pytest.approx([0.00625, 0.00125])


# The configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "third"}, "variant"),
        ({"upper": 130.0}, "upper"),
        ({"mask": "fixed", "variant": "vanilla"}, "masks nothing"),
        ({"precision": "fp8"}, "precision"),
        ({"keep": "first"}, "keep"),
        ({"accumulate": 0}, "accumulate"),
        ({"lr": 0.0}, "lr"),
        ({"lr_warmup": 1.0}, "lr_warmup"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"kl_dropout": 1.0}, "kl_dropout"),
        (
            {"first_order_reduce": "norm", "options": MaskOptions(granularity="row")},
            "whole gradients",
        ),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)


def test_fp16_needs_cuda() -> None:
    with pytest.raises(ConfigError, match="needs CUDA"):
        run(precision="fp16")


@pytest.mark.parametrize("variant", ["second", "ensemble"])
def test_the_loss_scale_of_fp16_changes_nothing(
    variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two is exact, so risks, clipping and masks must be the same bit for bit."""
    plain, _ = run(variant=variant)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=2.0**10))
    scaled, context = run(variant=variant)
    assert_same(plain, scaled)
    assert plain.tables == scaled.tables
    assert context.checkpoint is not None
    assert context.checkpoint["scaler"]["scale"] == 2.0**10


def test_steps_that_overflow_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=2.0**127)
    )
    result, context = run(variant="ensemble", start=ToyStart(scale=50.0), epochs=4)
    assert context.reports[0]["mask/skipped_steps"] > 0
    assert context.reports[-1]["mask/skipped_steps"] == 0
    assert all(value.isfinite().all() for value in result.state.values())
    assert context.checkpoint is not None
    assert context.checkpoint["scaler"]["scale"] < 2.0**127


def test_the_configuration_survives_yaml() -> None:
    config = RoseConfig(loss=TextLossConfig(name="r3f"), options=MaskOptions(norm="rms"))
    assert from_dict(RoseConfig, to_dict(config)) == config
    assert RoseConfig().text_loss.name == "two_pass"
    assert RoseConfig(variant="second").text_loss.name == "ce"


@pytest.fixture(autouse=True)
def restored_random_state() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_first_order_gradients_leave_the_loss_alone() -> None:
    model = ToyStart().build().train()
    inputs = torch.stack([torch.randint(1, VOCABULARY, (4, 5)), torch.zeros(4, 5).long()], 1)
    named = {name: value for name, value in model.named_parameters() if "layer" in name}
    first = rose._FirstOrder(named)
    pair = model(inputs), model(inputs)
    first.add(pair, 1.0, keep_graph=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    (pair[0].sum() + pair[1].sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
