"""Precision, parts of batches, recomputed blocks, compiling: what they change and what not."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.errors import ConfigError, ResourceError, UnknownNameError
from robustft.training import engine_options
from robustft.training.augment import AugmentConfig
from robustft.training.context import LocalContext, PlainEngine
from robustft.training.engine_options import (
    EngineOptions,
    blocks,
    cores,
    synchronise_batch_norm,
)
from robustft.training.loaders import Batch
from robustft.training.loop import Best, pieces, run_epoch
from robustft.training.schedules import ScheduleConfig

CPU = torch.device("cpu")


class Block(nn.Module):
    """Everything that a second forward could disturb: dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor, *, shift: float = 0.0) -> Tensor:
        hidden = self.cumulative(self.norm(self.linear(inputs)).tanh())
        return inputs + self.dropout(hidden) + shift


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Block(), Block()), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stages[1](self.stages[0](inputs), shift=0.1)
        logits: Tensor = self.head(hidden)
        return logits


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(inputs), self.model(-inputs)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def gradients(options: EngineOptions) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state after two forwards and two backwards of one graph, and the gradients."""
    model = net()
    engine = PlainEngine(options)
    network = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    network.train()
    torch.manual_seed(2)
    with engine.computing():
        logits = network(INPUTS) + network(2 * INPUTS)
    # As ROSE does: the graph is kept, so that blocks are recomputed twice.
    torch.autograd.grad(logits.sum(), list(model.parameters()), retain_graph=True)
    engine.backward(functional.cross_entropy(logits, LABELS))
    found = {name: value.grad for name, value in model.named_parameters()}
    return dict(model.state_dict()), {n: g for n, g in found.items() if g is not None}


def test_recomputed_blocks_change_nothing() -> None:
    """Gradients, running statistics, how often they were updated, and dropout's draws."""
    state, grads = gradients(EngineOptions(checkpoint_activations=True))
    expected_state, expected_grads = gradients(EngineOptions())
    assert state.keys() == expected_state.keys()
    assert expected_state["stages.1.norm.num_batches_tracked"] == 2
    for name, value in expected_state.items():
        assert torch.equal(state[name], value), name
    for name, value in expected_grads.items():
        torch.testing.assert_close(grads[name], value)


def test_blocks_are_recomputed_and_without_gradients_called() -> None:
    model = net()
    calls: list[bool] = []
    for block in blocks(model):
        block.linear.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    engine = PlainEngine(EngineOptions(checkpoint_activations=True))
    engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model(INPUTS)
    assert len(calls) == 3
    engine.backward(model(INPUTS).sum())
    assert len(calls) == 3 + 3 + 3, "prepared twice, but recomputed once"
    other = copy.deepcopy(model)
    assert other.stages[1].forward.args[0] is other.stages[1]


def test_blocks_are_found_in_any_depth() -> None:
    model = net()
    assert blocks(Wrapper(model)) == [*model.stages[0], model.stages[1]]
    with pytest.raises(ConfigError, match="no blocks of several layers"):
        PlainEngine(EngineOptions(checkpoint_activations=True)).prepare(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU()), None
        )


def test_cores_go_inwards_as_long_as_nothing_is_left_out() -> None:
    outer, rest = Wrapper(net()), nn.ReLU()
    assert cores(outer) == [outer, outer.model]
    assert cores(rest) == [rest]


def test_bf16_rounds_forwards_and_nothing_else() -> None:
    model = Wrapper(net())
    seen: list[torch.dtype] = []
    model.model.head.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    engine = PlainEngine(EngineOptions(precision="bf16"))
    network = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with engine.computing():
        first, second = network(INPUTS)
        inner = model.model(INPUTS)
    assert seen == [torch.bfloat16] * 3
    assert {first.dtype, second.dtype, inner.dtype} == {torch.float32}
    engine.backward(first.sum())
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    seen.clear()
    model.model(INPUTS)
    assert seen == [torch.float32], "an evaluation is outside of computing()"


def test_a_forward_without_gradients_before_leaves_them_to_the_next() -> None:
    """TRADES: autocast's cache of weights must not hand some without a history to the second."""
    model = net().eval()
    engine = PlainEngine(EngineOptions(precision="bf16"))
    network = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with engine.computing():
        with torch.no_grad():
            network(INPUTS)
        loss = network(INPUTS).sum()
    engine.backward(loss)
    assert all(value.grad is not None for value in model.parameters())


# --- parts of a batch ----------------------------------------------------------------------------


@dataclasses.dataclass
class Pace:
    epochs: int = 1
    lr: float = 0.1
    seed: int = 0
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(crop_padding=0, flip=0.0)
    )


class OneBatch:
    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int) -> Any:
        yield Batch(INPUTS.reshape(6, 1, 2, 2), LABELS, torch.arange(6), scale=1.0, count=6)


def stepped(options: EngineOptions, *, norm: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(4) if norm else nn.Identity()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), middle, nn.Tanh(), nn.Linear(4, 3))
    context: Any = LocalContext(task=None, start=None, engine=PlainEngine(options))  # type: ignore[arg-type]
    network = context.engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    noises: list[float] = []

    def loss(network: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        noises.append(float(torch.rand((), generator=noise)))
        logits = network(batch.inputs)
        return functional.cross_entropy(logits, batch.labels), logits

    metrics = run_epoch(Pace(), context, network, OneBatch(), loss, epoch=0)
    assert len(set(noises)) == 1
    assert len(noises) == options.accumulate
    return dict(model.state_dict()), metrics


@pytest.mark.parametrize("parts", [2, 4, 6, 8])
def test_parts_take_the_step_of_the_whole(parts: int) -> None:
    whole, metrics = stepped(EngineOptions(), norm=False)
    state, found = stepped(EngineOptions(accumulate=parts), norm=False)
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value)
    assert found == pytest.approx(metrics)


def test_parts_normalise_by_themselves() -> None:
    whole, _ = stepped(EngineOptions(), norm=True)
    state, _ = stepped(EngineOptions(accumulate=2), norm=True)
    assert [whole["2.num_batches_tracked"], state["2.num_batches_tracked"]] == [1, 2]
    assert not torch.allclose(state["1.weight"], whole["1.weight"], rtol=1e-4)


def test_pieces_add_up() -> None:
    batch = Batch(INPUTS, LABELS, torch.arange(6), scale=0.5, count=6)
    assert list(pieces(batch, 1)) == [batch]
    found = list(pieces(batch, 8))
    assert [piece.count for piece in found] == [1] * 6 + [0] * 2
    assert sum(piece.scale for piece in found) == pytest.approx(0.5)
    stand_in = dataclasses.replace(batch, scale=0.0, count=0)
    assert {piece.count for piece in pieces(stand_in, 2)} == {0}


# --- compiling, synchronising, refusing ----------------------------------------------------------


def test_a_compiled_network_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tracer alone: generating code takes a compiler minutes."""
    monkeypatch.setattr(engine_options, "COMPILER", "eager")
    model = Wrapper(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    expected = model.model(INPUTS)
    names = list(model.state_dict())
    PlainEngine(EngineOptions(compile=True)).prepare(model, None)
    assert model.model._compiled_call_impl is not None
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.model(INPUTS), expected)


def test_a_machine_that_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler\nsecond line")

    monkeypatch.setattr(engine_options, "COMPILER", broken)
    with pytest.raises(ResourceError, match="install a C\\+\\+ compiler") as caught:
        PlainEngine(EngineOptions(compile=True)).prepare(nn.Linear(4, 3), None)
    assert "second line" not in str(caught.value)


def test_batch_norm_is_not_synchronised_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="on GPUs only"):
        synchronise_batch_norm(net(), CPU)
    plain = nn.Linear(2, 2)
    synchronise_batch_norm(plain, CPU)


def test_synchronised_layers_keep_their_parameters() -> None:
    model = net()
    before = dict(model.named_parameters())
    synchronise_batch_norm(model, torch.device("cuda"))
    assert isinstance(model.stages[1].norm, nn.SyncBatchNorm)
    assert all(value is before[name] for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"precision": "fp16"}, ConfigError, "choose 'bf16'"),
        ({"precision": "fp8"}, UnknownNameError, "fp8"),
        ({"accumulate": 0}, ConfigError, "accumulate = 0"),
        ({"compile": True, "checkpoint_activations": True}, ConfigError, "choose one"),
    ],
)
def test_options_out_of_range_are_refused(
    fields: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        EngineOptions(**fields)


def test_numerics_are_what_changes_results() -> None:
    assert EngineOptions().numerics == {}
    assert EngineOptions(compile=True).numerics == {}
    assert EngineOptions(checkpoint_activations=True).numerics == {}
    assert EngineOptions(precision="bf16", accumulate=2, sync_bn=True).numerics == {
        "precision": "bf16",
        "accumulate": 2,
        "sync_bn": True,
    }


# --- the plain engine ----------------------------------------------------------------------------


def test_the_plain_engine_clips_and_gives_its_model() -> None:
    model = nn.Linear(2, 1, bias=False)
    engine = PlainEngine()
    network = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    engine.backward((network(torch.tensor([[3.0, 4.0]]))).sum())
    engine.clip(model.parameters(), 0.5)
    grad = engine.full_grad(model.weight)
    assert grad is not None
    torch.testing.assert_close(grad, torch.tensor([[0.3, 0.4]]), rtol=1e-5, atol=0)
    best = Best()
    best.offer(1.0, epoch=1, state=engine.model_state)
    assert list(engine.model_state()) == ["model"]
    assert torch.equal(best.model["weight"], model.weight)
