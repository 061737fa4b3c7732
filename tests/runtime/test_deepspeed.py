"""DeepSpeed equals DistributedDataParallel: stages 0 to 3, attacks, ROSE, resuming."""

import dataclasses
import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional

from robustft.data.base import Split, Task
from robustft.data.text import TextSplit, TextTask
from robustft.errors import ConfigError, NonFiniteLossError, RobustftError
from robustft.methods import rose
from robustft.methods.adversarial import ATConfig, train_at
from robustft.methods.autolora import AutoLoraConfig
from robustft.methods.base import Result
from robustft.methods.child_tuning import ChildTuningConfig
from robustft.methods.common import AttackConfig
from robustft.methods.rose import MaskOptions, RoseConfig
from robustft.methods.text_losses import TextLossConfig
from robustft.models import Start
from robustft.runtime import deepspeed_engine
from robustft.runtime.deepspeed_engine import DeepSpeedEngine, why_not
from robustft.runtime.engines import DDPEngine
from robustft.runtime.experiment import RuntimeConfig, experiment_from_dict
from robustft.runtime.preflight import validate
from robustft.runtime.trainer import Job, WorkerContext
from robustft.threat import ThreatModel
from robustft.training.context import Engine, LocalContext, PlainEngine, State, detached
from robustft.training.rose_adamw import RoseAdamW

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
)
CPU = torch.device("cpu")
STAGES = (0, 1, 2, 3)
# Weights of fewer numbers stay whole; the others leave as soon as they have been used.
IN_PIECES = {
    "stage3_param_persistence_threshold": 10,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
OPTIONS: dict[int, dict[str, Any]] = {3: IN_PIECES}
CLIP = 0.1
STEPS, HALF = 5, 3


# --- a network and its training ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # No bias before BatchNorm: its gradient is rounding, of which Adam makes whole steps.
        first = nn.Linear(5, 7, bias=False)
        self.layer = nn.ModuleList([first, nn.Linear(7, 7), nn.Linear(7, 3)])
        self.norm = nn.BatchNorm1d(7)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.layer[0](inputs)).tanh()
        logits: Tensor = self.layer[2](self.layer[1](hidden).tanh())
        return logits


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    weights = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


def second(model: nn.Module, variant: Any = "second", **more: Any) -> RoseAdamW:
    named = model.named_parameters()
    return RoseAdamW(named, lr=0.01, variant=variant, upper=50, eligible="matrices", **more)


def held(model: nn.Module) -> RoseAdamW:
    return second(model, options=MaskOptions(mask_every=2))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "second": second,
    "held masks": held,
}


def share(step: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    inputs, labels = torch.randn(8, 5, generator=draw), torch.randint(3, (8,), generator=draw)
    return inputs[rank::2], labels[rank::2]


def fit(
    name: str, engine: Engine, rank: int, *, saved: State | None = None, steps: int = STEPS
) -> Any:
    """Train and return (state, the second step's gradients, every step's masks)."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model)
    network = engine.prepare(model, optimizer)
    clip = CLIP if name != "sgd" else None
    if saved is not None:
        engine.load_state(saved)
    network.train()
    grads: dict[str, Tensor] = {}
    masks = []
    for step in range(0 if saved is None else HALF, steps):
        for group in engine.optimizer.param_groups:
            group["lr"] *= 0.9
        inputs, labels = share(step, rank)
        for scale in (1.0, 2.0) if name == "adamw" else (1.0,):  # two backwards of one step
            logits = network(scale * inputs)
            # As an attack does, and ROSE's disagreement: no training gradient, no synchronisation.
            torch.autograd.grad(logits.sum(), logits, retain_graph=True)
            engine.backward(functional.cross_entropy(logits, labels))
        if step == 1:
            named = model.named_parameters()
            grads = {key: detached(engine.full_grad(value)) for key, value in named}
        if clip is not None:
            engine.clip(model.parameters(), clip)
        engine.step()
        if isinstance(optimizer, RoseAdamW) and optimizer.record is not None:
            masks.append(dict(optimizer.record.masks))
    return detached(engine.state()), grads, masks


def zero_engine(name: str, stage: int) -> DeepSpeedEngine:
    return DeepSpeedEngine(CPU, stage=stage, zero_options=OPTIONS.get(stage))


def not_finite(stage: int, rank: int) -> dict[str, Any]:
    """Return what a NaN in the last tensor's gradient, of which one rank has nothing, does."""
    model = Net()
    optimizer = second(model, variant="vanilla")
    engine = zero_engine("vanilla", stage)
    network = engine.prepare(model, optimizer)
    before = detached(engine.state())["model"]
    network.train()
    inputs, labels = share(0, rank)
    loss = functional.cross_entropy(network(inputs), labels)
    if stage < 3:
        loss = loss + model.layer[2].bias.sum() * torch.nan
    engine.backward(loss if stage < 3 else loss * torch.nan)
    engine.step()
    assert optimizer.record is not None
    names = [key for key, _ in Net().named_parameters()]
    after = engine.state()["model"]
    return {
        "skipped": optimizer.record.skipped,
        "same": all(torch.equal(before[name], after[name]) for name in names),
    }


def raises_not_finite(rank: int) -> str:
    model = Net()
    engine = zero_engine("sgd", 3)
    network = engine.prepare(model, sgd(model))
    network.train()
    inputs, labels = share(0, rank)
    engine.backward(functional.cross_entropy(network(inputs), labels) * torch.nan)
    try:
        engine.step()
    except NonFiniteLossError as error:
        return str(error)
    return ""


# --- methods -------------------------------------------------------------------------------------


class Words(nn.Module):
    """A text model: the mean of its words, through two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pad_id = 0
        self.embeddings = nn.Embedding(12, 6)
        self.layer = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embeddings(inputs[:, 0]).mean(1)
        for layer in self.layer:
            hidden = hidden + self.dropout(layer(hidden).tanh())
        logits: Tensor = self.classifier(hidden)
        return logits


class WordsStart:
    num_classes = 2

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        return Words().eval()


def words(count: int, first_id: int) -> TextSplit:
    labels = np.arange(count) % 2
    draw = np.random.default_rng(first_id)
    tokens = draw.integers(1, 6, (count, 3)) + 6 * labels[:, None]
    return TextSplit(
        text_a=pa.array([str(row) for row in tokens]),
        text_b=None,
        labels=labels.astype(np.int64),
        ids=np.arange(first_id, first_id + count, dtype=np.int64),
        tokens=tokens.astype(np.int32).reshape(-1),
        token_types=np.zeros(3 * count, dtype=np.int8),
        offsets=3 * np.arange(count + 1, dtype=np.int64),
    )


# Nine to validate in batches of four: one rank takes two passes, the other one.
TEXTS = {"train": words(13, 0), "val": words(9, 100), "test": words(2, 200)}
ROSE = RoseConfig(variant="second", upper=50, epochs=2, batch_size=4, lr=0.01, eligible="official")


def stripes(count: int, first_id: int) -> Split:
    labels = np.arange(count) % 3
    images = np.random.default_rng(first_id).integers(0, 110, (count, 1, 8, 8))
    images[labels == 1, :, ::3] += 120
    images[labels == 2, :, :, ::3] += 120
    ids = np.arange(first_id, first_id + count, dtype=np.int64)
    return Split(images.astype(np.uint8), labels.astype(np.int64), ids)


PICTURES = Task(
    name="stripes",
    splits={"train": stripes(13, 0), "val": stripes(5, 100), "test": stripes(3, 200)},
    class_names=("none", "rows", "columns"),
    threat_models=(ThreatModel("Linf", 0.05),),
    mean=(0.3,),
    std=(0.2,),
    digest="stripes",
)
PICTURE_START = Start(
    architecture="small_resnet", num_classes=3, image_shape=(1, 8, 8), mean=(0.3,), std=(0.2,)
)
ATTACK = AttackConfig(num_steps=1)
AT = ATConfig(epochs=1, batch_size=7, lr=0.01, attack=ATTACK, val_attack=ATTACK)

CONFIGS: dict[str, Any] = {
    "second": ROSE,
    "bf16, in parts": dataclasses.replace(ROSE, precision="bf16", accumulate=2),
    "first": dataclasses.replace(ROSE, variant="first", kl_dropout=0.1),
    "at": AT,
}

# What runs at which stages: everything at all of them would take minutes.
FITS = {"sgd": STAGES, "adamw": STAGES, "second": STAGES, "held masks": (2,)}
RESUMED = [("sgd", 0), ("adamw", 1), ("held masks", 2), ("second", 3)]
RUNS = {"second": (3,), "bf16, in parts": (1,), "first": (2,), "at": (2, 3)}
NOT_FINITE = (1, 3)


@dataclasses.dataclass(kw_only=True)
class TwoRanks(LocalContext):
    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total


def train(name: str, stage: int | None, rank: int) -> Result:
    """Train as on a worker of two; ``stage`` None: under DistributedDataParallel."""
    config = CONFIGS[name]
    engine: Engine = DDPEngine(CPU)
    if stage is not None:
        engine = DeepSpeedEngine(CPU, stage=stage, zero_options=OPTIONS.get(stage))
    ranks: dict[str, Any] = {"engine": engine, "rank": rank, "world_size": 2}
    if isinstance(config, ATConfig):
        return train_at(config, TwoRanks(task=PICTURES, start=PICTURE_START, **ranks))
    task: Any = TextTask(
        name="words",
        splits=TEXTS,
        fixed={},
        class_names=("bad", "good"),
        tokenizer="words",
        max_length=8,
        digest="words",
    )
    start: Any = WordsStart()
    return rose.train(config, TwoRanks(task=task, start=start, **ranks))


# --- two processes -------------------------------------------------------------------------------


def worker(rank: int, port: int, folder: str) -> None:
    """Do everything that the tests below look at: starting processes is what takes the time."""
    # DeepSpeed compiles a function that nobody calls; loading the compiler takes most of the time.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    output = os.open(f"{folder}/{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    saved: dict[str, Any] = {}
    try:
        for name, stages in FITS.items():
            saved[name] = fit(name, DDPEngine(CPU), rank)
            for stage in stages:
                engine = zero_engine(name, stage)
                saved[f"{name} {stage}"] = fit(name, engine, rank)
                if engine._shards is not None:
                    parts = engine._shards._parts
                    saved[f"parts {stage}"] = [
                        (part.begin, len(part.values), part.shape.numel()) for part in parts
                    ]
        for name, stage in RESUMED:
            half, *_ = fit(name, zero_engine(name, stage), rank, steps=HALF)
            saved[f"{name} {stage} resumed"] = fit(name, zero_engine(name, stage), rank, saved=half)
        # What stage 2 has saved goes on under stage 3 and in DistributedDataParallel.
        half, *_ = fit("second", zero_engine("second", 2), rank, steps=HALF)
        later = zero_engine("second", 3)
        saved["2 then 3"] = fit("second", later, rank, saved=detached(half))
        saved["2 then ddp"] = fit("second", DDPEngine(CPU), rank, saved=half)
        for name, stages in RUNS.items():
            for stage in (None, *stages):
                result = train(name, stage, rank)
                saved[f"run {name} {stage}"] = {
                    "state": dict(result.state),
                    "epochs": list(result.tables["epochs"]),
                    "frequency": list(result.tables.get("mask_frequency", [])),
                }
        for stage in NOT_FINITE:
            saved[f"nan {stage}"] = not_finite(stage, rank)
        saved["nan raises"] = raises_not_finite(rank)
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(port, str(folder)), nprocs=2, join=True)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    """What each of two workers got."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_state(got: Any, expected: Any, **tolerance: float) -> None:
    """Compare nested dicts and lists of tensors and scalars."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(got[key], value, **tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same_state(one, other, **tolerance)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected, **(tolerance or {"rtol": 0.0, "atol": 0.0}))
    else:
        assert got == expected


@needs_deepspeed
@pytest.mark.parametrize(("name", "stage"), [(n, stage) for n in FITS for stage in FITS[n]])
def test_a_stage_trains_what_ddp_trains(name: str, stage: int, ranks: list[Any]) -> None:
    """Weights, buffers of BatchNorm, the optimiser's whole state, gradients, masks."""
    for rank in ranks:
        state, grads, masks = rank[f"{name} {stage}"]
        expected_state, expected_grads, expected_masks = rank[name]
        assert_same_state(state, expected_state, rtol=1e-4, atol=1e-6)
        assert_same_state(grads, expected_grads, rtol=1e-4, atol=1e-6)
        assert masks == expected_masks
    if masks:
        assert {value for mask in masks for value in mask.values()} == {0.0, 1.0}


@needs_deepspeed
@pytest.mark.parametrize(("name", "stage"), RESUMED)
def test_a_run_resumes_exactly(name: str, stage: int, ranks: list[Any]) -> None:
    for rank in ranks:
        assert_same_state(rank[f"{name} {stage} resumed"][0], rank[f"{name} {stage}"][0])


@needs_deepspeed
def test_a_run_resumes_under_another_engine(ranks: list[Any]) -> None:
    for rank in ranks:
        for name in ("2 then 3", "2 then ddp"):
            assert_same_state(rank[name][0], rank["second"][0], rtol=1e-4, atol=1e-6)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES[1:])
def test_tensors_are_split_between_the_ranks(stage: int, ranks: list[Any]) -> None:
    """Otherwise the tests above would not show much."""
    first, second = (rank[f"parts {stage}"] for rank in ranks)
    split = 0
    for (begin, count, whole), (other_begin, other_count, _) in zip(first, second, strict=True):
        assert count + other_count == whole
        if count and other_count:
            assert (begin, other_begin) == (0, count)
            split += 1
    assert split > 0


@needs_deepspeed
@pytest.mark.parametrize(("name", "stage"), [(n, stage) for n in RUNS for stage in RUNS[n]])
def test_methods_train_what_they_train_under_ddp(name: str, stage: int, ranks: list[Any]) -> None:
    """Attacks through the bare module, validation with other numbers of passes on the ranks."""
    tolerance = 1e-3 if "bf16" in name else 1e-5
    for rank in ranks:
        got, expected = rank[f"run {name} {stage}"], rank[f"run {name} None"]
        assert_same_state(got["state"], expected["state"], rtol=tolerance, atol=tolerance)
        assert got["frequency"] == expected["frequency"]
        for row, other in zip(got["epochs"], expected["epochs"], strict=True):
            assert row == pytest.approx(other, rel=1e-3)
        assert_same_state(got["state"], ranks[0][f"run {name} {stage}"]["state"])


@needs_deepspeed
@pytest.mark.parametrize("stage", NOT_FINITE)
def test_all_ranks_leave_out_a_step_that_one_cannot_take(stage: int, ranks: list[Any]) -> None:
    assert [rank[f"nan {stage}"] for rank in ranks] == [{"skipped": True, "same": True}] * 2


@needs_deepspeed
def test_stage_three_says_that_a_gradient_is_not_finite(ranks: list[Any]) -> None:
    """DeepSpeed would leave the step out in silence."""
    assert all("NaN" in rank["nan raises"] for rank in ranks)


@needs_deepspeed
def test_deepspeed_is_quiet(folder: Path) -> None:
    for rank in range(2):
        text = (folder / f"{rank}.txt").read_text()
        assert [line for line in text.splitlines() if "[Gloo]" not in line] == []


# --- one process ---------------------------------------------------------------------------------


@needs_deepspeed
def test_trainer_takes_the_engine_and_the_clipping_norm() -> None:
    def engine(config: Any, world_size: int, **wanted: Any) -> Any:
        job = Job(
            method="rose",
            config=config,
            task=None,
            start=None,
            prepared=None,
            stage="",
            run="",
            threads=1,
            gpu=False,
            send=lambda event: None,
            **wanted,
        )
        context = WorkerContext(
            job, save=lambda *_: None, restore=lambda: None, world_size=world_size
        )
        return context.engine

    chosen = engine(ROSE, 2, engine="deepspeed", zero_stage=2)
    assert isinstance(chosen, DeepSpeedEngine)
    assert (chosen._stage, chosen._clip_norm) == (2, 1.0)
    assert engine(AT, 2, engine="deepspeed")._clip_norm is None
    assert isinstance(engine(ROSE, 1, engine="deepspeed"), PlainEngine)
    assert isinstance(engine(ROSE, 2), DDPEngine)
    assert isinstance(engine(ROSE, 2, engine="ddp"), DDPEngine)


@needs_deepspeed
def test_a_model_without_trained_weights_is_left_alone() -> None:
    model = Net()
    engine = DeepSpeedEngine(CPU, stage=2)
    assert engine.prepare(model, None) is model
    assert engine.module is model


@needs_deepspeed
def test_what_cannot_be_shared_out_is_refused() -> None:
    model = Net()
    engine = DeepSpeedEngine(CPU, stage=1)
    with pytest.raises(ConfigError, match="granularity = 'row'"):
        engine.prepare(model, second(model, options=MaskOptions(granularity="row")))
    half = Net().half()
    with pytest.raises(ConfigError, match="float32 parameters"):
        engine.prepare(half, sgd(half))
    optimizer = sgd(model)
    model.layer[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="freeze before building the optimiser"):
        engine.prepare(model, optimizer)


@pytest.mark.parametrize(
    ("config", "lowest", "sentence"),
    [
        (dataclasses.replace(ROSE, child_tuning=ChildTuningConfig(name="free")), 0, "'ddp'"),
        (dataclasses.replace(ROSE, precision="fp16"), 0, "'bf16'"),
        (dataclasses.replace(ROSE, options=MaskOptions(granularity="row")), 1, "'tensor'"),
        (dataclasses.replace(ROSE, variant="ensemble"), 3, "choose 'second', or zero_stage = 2"),
        (dataclasses.replace(ROSE, loss=TextLossConfig(name="smart")), 3, "another loss"),
        (AutoLoraConfig(), 3, "branches of autolora"),
        (ROSE, 4, ""),
        (AT, 4, ""),
    ],
)
def test_a_method_that_cannot_be_trained_is_refused(
    config: Any, lowest: int, sentence: str
) -> None:
    for stage in STAGES:
        reason = why_not(config, stage)
        assert (reason is not None) == (stage >= lowest)
        assert reason is None or sentence in reason


def test_without_deepspeed_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RobustftError, match=r"pip install 'robustft\[deepspeed\]'"):
        DeepSpeedEngine(CPU, stage=1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"engine": "horovod"}, "horovod"),
        ({"engine": "deepspeed", "zero_stage": 4}, "from 0 to 3"),
        ({"engine": "deepspeed", "zero_stage": 1.5}, "from 0 to 3"),
        ({"zero_stage": 2}, "set runtime.engine"),
    ],
)
def test_the_runtime_refuses_what_is_no_engine(values: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RuntimeConfig(**values)


def errors(**changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "name": "mine",
        "start": {"method": {"name": "at", "epochs": 1}},
        "method": {"name": "autolora", "epochs": 1},
        "task": {"limit_train": 20, "limit_val": 20, "limit_test": 20},
        "runtime": {"engine": "deepspeed", "workers": 2, "zero_stage": 3},
    }
    found = validate(experiment_from_dict({**values, **changes}))
    return [finding.text for finding in found if finding.level == "error"]


@needs_deepspeed
def test_preflight_refuses_before_anything_starts() -> None:
    assert [text for text in errors() if "branches of autolora" in text]
    searched = {"search": {"space": {"child_tuning.name": ["none", "free"]}}}
    one = {"engine": "deepspeed"}
    assert [text for text in errors(runtime=one) if "nobody to share with" in text]
    two = {"engine": "deepspeed", "workers": 2, "zero_stage": 2}
    assert not [text for text in errors(runtime=two) if "zero_stage" in text]
    text_task = {"data": "rotten_tomatoes", "limit_train": 20}
    method = {"name": "rose", "variant": "second"}
    found = errors(
        start={"model": "minilm"}, task=text_task, method=method, runtime=two, **searched
    )
    assert [text for text in found if "child_tuning = 'free'" in text]


def test_preflight_asks_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        deepspeed_engine.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "deepspeed" else find(name, *rest),
    )
    assert [text for text in errors() if "robustft[deepspeed]" in text]
