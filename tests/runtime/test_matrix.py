"""The support matrix: every yes runs here at toy size, every no is a sentence."""

import importlib.util
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_fixtures import tiny_text_start, tiny_text_task
from torch import Tensor, distributed, multiprocessing

from robustft.data.base import Split, Task
from robustft.errors import ConfigError
from robustft.methods import METHODS
from robustft.methods.adversarial import ATConfig, TradesConfig
from robustft.methods.autolora import AutoLoraConfig
from robustft.methods.common import AttackConfig
from robustft.methods.instance_perturbations import EmbeddingPerturbation
from robustft.methods.instances import InstancesConfig
from robustft.methods.multinorm_config import MultiNormConfig
from robustft.methods.natural import NaturalConfig
from robustft.methods.rift import RiftConfig
from robustft.methods.rose import RoseConfig
from robustft.methods.text_instances import TextInstancesConfig
from robustft.methods.twins import TwinsConfig
from robustft.methods.vanilla import RftConfig
from robustft.models import Start
from robustft.runtime import matrix
from robustft.runtime.deepspeed_engine import DeepSpeedEngine
from robustft.runtime.engines import DDPEngine
from robustft.runtime.experiment import method_name
from robustft.runtime.matrix import FILES, OPTIONS, UNTESTED, rewrite
from robustft.runtime.trainer import Job, WorkerContext, run_job
from robustft.threat import ThreatModel
from robustft.training import engine_options
from robustft.training.context import Engine, LocalContext, PlainEngine, State
from robustft.training.engine_options import EngineOptions

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

# --- toys ----------------------------------------------------------------------------------------

ATTACK = AttackConfig(num_steps=1)
SHARED: dict[str, Any] = {"epochs": 2, "batch_size": 7, "lr": 0.01}
ATTACKED: dict[str, Any] = {**SHARED, "attack": ATTACK, "val_attack": ATTACK}
CONFIGS: dict[str, Any] = {
    "at": ATConfig(**ATTACKED),
    "trades": TradesConfig(**ATTACKED),
    "rift": RiftConfig(
        **SHARED, modules="linear2", curve_attack=ATTACK, curve_runs=1, alphas=(0.0, 1.0)
    ),
    "multinorm": MultiNormConfig(**SHARED, num_steps=1, val_steps=1, val_batch_size=7),
    # A dropout that drops nothing: ranks would draw masks of their own.
    "rose": RoseConfig(**SHARED, upper=50.0, kl_dropout=1e-9),
    "rose, variant second": RoseConfig(**SHARED, upper=50.0, variant="second"),
    "instances": InstancesConfig(**SHARED, val_attack=ATTACK),
    "text-instances": TextInstancesConfig(
        **SHARED, val_attack=EmbeddingPerturbation(eps=0.1, num_steps=1)
    ),
    "autolora": AutoLoraConfig(**ATTACKED, rank=2),
    "rft": RftConfig(**ATTACKED),
    "twins": TwinsConfig(**ATTACKED),
    "fine-tune": NaturalConfig(**SHARED, val_attack=ATTACK),
}
# TWINS needs BatchNorm in train mode, with which each worker normalises its own share: its ranks
# agree, and every engine for two gives the same, which is not what one process gives.
WITH_BATCH_NORM = ("twins",)
PLACES = ("DDP", *(matrix.ZERO.values() if HAS_DEEPSPEED else ()))


def stripes(count: int, first_id: int) -> Split:
    labels = np.arange(count) % 3
    images = np.random.default_rng(first_id).integers(0, 110, (count, 1, 8, 8))
    images[labels == 1, :, ::3] += 120
    images[labels == 2, :, :, ::3] += 120
    ids = np.arange(first_id, first_id + count, dtype=np.int64)
    return Split(images.astype(np.uint8), labels.astype(np.int64), ids)


def toy(label: str) -> tuple[Any, Any]:
    """Return the task and the start of a row."""
    if METHODS[method_name(CONFIGS[label])].kinds == ("text",):
        texts = tiny_text_task(13)
        return texts, tiny_text_start(texts, layers=1, dropout=0.0)
    task = Task(
        name="stripes",
        splits={"train": stripes(13, 0), "val": stripes(5, 100), "test": stripes(3, 200)},
        class_names=("none", "rows", "columns"),
        threat_models=(
            ThreatModel("Linf", 0.05),
            *((ThreatModel("L1", 2.0),) if label == "multinorm" else ()),
        ),
        mean=(0.3,),
        std=(0.2,),
        digest="stripes",
    )
    start = Start(
        architecture="small_resnet" if label in WITH_BATCH_NORM else "resnet4b",
        num_classes=3,
        image_shape=(1, 8, 8),
        mean=task.mean,
        std=task.std,
    )
    return task, start


class Interrupted(Exception):
    """Raised in a run that is to be resumed."""


def train(
    label: str,
    engine: Engine,
    *,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: State | None = None,
    epochs: int | None = None,
) -> Any:
    """Train a row's method as a worker does; return (result, checkpoint).

    With ``epochs`` it is killed after so many, and the result is None.
    """
    config = CONFIGS[label]
    task, start = toy(label)
    kept: list[State | None] = [checkpoint]

    class Context(LocalContext):
        def report(self, *given: Any, **more: Any) -> None:
            super().report(*given, **more)
            kept[0] = self.checkpoint
            if more["step"] == epochs:
                raise Interrupted

        def sum(self, values: Tensor) -> Tensor:
            total = values.clone()
            if world_size > 1:
                distributed.all_reduce(total)
            return total

    context = Context(
        task=task,
        start=start,
        engine=engine,
        rank=rank,
        world_size=world_size,
        checkpoint=checkpoint,
    )
    torch.manual_seed(0)
    try:
        result = METHODS[method_name(config)].train(config, context)
    except Interrupted:
        return None, kept[0]
    told = {
        "state": dict(result.state),
        "metrics": dict(result.metrics),
        "epochs": [dict(row) for row in result.tables.get("epochs", ())],
        "reports": context.reports,
    }
    return told, kept[0]


# --- two processes -------------------------------------------------------------------------------


def worker(rank: int, port: int, folder: str) -> None:
    """Run every cell for two workers: starting processes is what takes the time."""
    # DeepSpeed compiles a function that nobody calls; loading the compiler takes most of the time.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    ranks: dict[str, Any] = {"rank": rank, "world_size": 2}
    saved: dict[str, Any] = {}
    try:
        for label, cells in matrix.matrix().items():
            for place in PLACES:
                if cells[place].answer == "yes":
                    saved[f"{label} {place}"], _ = train(label, engine(label, place), **ranks)
            _, half = train(label, DDPEngine(CPU), epochs=1, **ranks)
            resumed, _ = train(label, DDPEngine(CPU), checkpoint=half, **ranks)
            saved[f"{label} resumed"] = resumed
            # What one process has saved goes on on two: workers may come and go.
            _, half = train(label, PlainEngine(), epochs=1)
            saved[f"{label} grown"], _ = train(label, DDPEngine(CPU), checkpoint=half, **ranks)
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def engine(label: str, place: str) -> Engine:
    """Return what wraps a row's model on a worker of two."""
    if place == "DDP":
        return DDPEngine(CPU)
    # As the trainer does it for methods that clip by themselves.
    clip_norm = getattr(CONFIGS[label], "clip_norm", None)
    stage = int(place.removeprefix("ZeRO "))
    return DeepSpeedEngine(CPU, stage=stage, clip_norm=clip_norm)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two workers got."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Any]:
    """What one process gets, computed once for each row."""
    known: dict[str, Any] = {}

    def of(label: str) -> Any:
        if label not in known:
            known[label], _ = train(label, PlainEngine())
        return known[label]

    return of


def assert_close(got: Any, expected: Any, *, tolerance: float = 1e-5) -> None:
    assert got["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(
            got["state"][name], value, rtol=10 * tolerance, atol=tolerance, msg=name
        )
    assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-3)


ROWS = tuple(matrix.matrix())
YES = [
    (label, place)
    for label, place in itertools.product(ROWS, PLACES)
    if matrix.matrix()[label][place].answer == "yes"
]


def test_every_row_has_a_toy() -> None:
    assert set(CONFIGS) == set(ROWS), "a method without a toy here: add its config to CONFIGS"


@pytest.mark.parametrize(("label", "place"), YES)
def test_two_workers_train_what_one_trains(
    label: str, place: str, two: list[Any], alone: Callable[[str], Any]
) -> None:
    first, second = (rank[f"{label} {place}"] for rank in two)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name])
    expected = two[0][f"{label} DDP"] if label in WITH_BATCH_NORM else alone(label)
    assert_close(first, expected)


@pytest.mark.parametrize("label", ROWS)
def test_a_run_of_two_workers_resumes(label: str, two: list[Any]) -> None:
    for rank in two:
        assert_close(rank[f"{label} resumed"], rank[f"{label} DDP"], tolerance=1e-7)


@pytest.mark.parametrize("label", [label for label in ROWS if label not in WITH_BATCH_NORM])
def test_a_run_goes_on_with_more_workers(
    label: str, two: list[Any], alone: Callable[[str], Any]
) -> None:
    """As after Ray Train has found another node: the global batches stay the same."""
    for rank in two:
        assert_close(rank[f"{label} grown"], alone(label))


# --- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ROWS)
def test_the_table_of_epochs_says_what_was_reported(
    label: str, alone: Callable[[str], Any]
) -> None:
    """Nothing else: what a dying worker could not say is filled in from there, once."""
    whole = alone(label)
    reported = {
        (name, report["step"], value)
        for report in whole["reports"]
        for name, value in report.items()
        if name not in ("step", "total")
    }
    tabled = {
        (name, row["epoch"], value)
        for row in whole["epochs"]
        for name, value in row.items()
        if name != "epoch" and isinstance(value, int | float)
    }
    assert reported == tabled
    assert reported


@pytest.mark.parametrize("label", ROWS)
def test_a_run_resumes_and_learns(label: str, alone: Callable[[str], Any]) -> None:
    _, half = train(label, PlainEngine(), epochs=1)
    resumed, _ = train(label, PlainEngine(), checkpoint=half)
    whole = alone(label)
    for name, value in whole["state"].items():
        assert torch.equal(resumed["state"][name], value)
    assert resumed["metrics"] == whole["metrics"]
    before = toy(label)[1].build().state_dict()
    moved = [name for name, value in whole["state"].items() if not torch.equal(value, before[name])]
    # What RiFT interpolates back to its start has moved before.
    assert moved or whole["metrics"]["movement"] > 0, (
        "nothing was trained, so the comparisons show nothing"
    )


@pytest.mark.parametrize("label", ROWS)
def test_a_trial_reports_what_a_search_maximises(label: str, tmp_path: Path) -> None:
    """The function that Tune calls for a trial; Tune itself is tested with a few methods."""
    config = CONFIGS[label]
    task, start = toy(label)
    records: list[dict[str, Any]] = []
    job = Job(
        method=method_name(config),
        config=config,
        task=task,
        start=start,
        prepared=None,
        stage="search",
        run="0",
        threads=torch.get_num_threads(),
        gpu=False,
        send=lambda event: None,
    )
    context = WorkerContext(
        job, save=lambda record, folder: records.append(record), restore=lambda: None
    )
    result = run_job(job, context)
    assert [record["step"] for record in records] == [1, 2]
    assert set(METHODS[job.method].metrics) <= set(result.metrics)


def with_options(label: str, **options: Any) -> Any:
    result, _ = train(label, PlainEngine(EngineOptions(**options)))
    return result


def labels_with(column: str) -> list[str]:
    return [label for label, cells in matrix.matrix().items() if cells[column].answer == "yes"]


@pytest.mark.parametrize("label", labels_with("accumulate"))
def test_parts_of_a_batch_train_what_the_whole_trains(
    label: str, alone: Callable[[str], Any]
) -> None:
    assert_close(with_options(label, accumulate=3), alone(label))


@pytest.mark.parametrize("label", labels_with("checkpoint_activations"))
def test_recomputed_blocks_train_the_same(label: str, alone: Callable[[str], Any]) -> None:
    """TWINS has BatchNorm: its statistics are not updated a second time."""
    assert_close(with_options(label, checkpoint_activations=True), alone(label), tolerance=1e-7)


# torch's tracer looks at the .grad of an attack's iterates.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("label", labels_with("compile"))
def test_a_compiled_network_trains_the_same(
    label: str, alone: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tracer alone: generating code takes a compiler minutes."""
    monkeypatch.setattr(engine_options, "COMPILER", "eager")
    assert_close(with_options(label, compile=True), alone(label))


@pytest.mark.parametrize("label", labels_with("bf16"))
def test_bf16_trains_nearly_the_same(label: str, alone: Callable[[str], Any]) -> None:
    low, whole = with_options(label, precision="bf16"), alone(label)
    if label == "rift":
        # The weights are those of its start again; how far they had gone is rounded.
        movement = whole["metrics"]["movement"]
        assert low["metrics"]["movement"] != movement
        assert low["metrics"]["movement"] == pytest.approx(movement, rel=0.1)
        return
    names = [name for name, value in whole["state"].items() if value.is_floating_point()]
    assert any(not torch.equal(low["state"][name], whole["state"][name]) for name in names)
    for name in names:
        assert low["state"][name].dtype == torch.float32
    before = toy(label)[1].build().state_dict()

    def moved(result: Any) -> Tensor:
        return torch.cat([(result["state"][name] - before[name]).flatten() for name in names])

    similarity = torch.cosine_similarity(moved(low), moved(whole), dim=0)
    assert similarity > 0.9


# --- the table -----------------------------------------------------------------------------------


def test_every_no_is_a_sentence_with_a_remedy() -> None:
    reasons = {
        cell.reason for cells in matrix.matrix().values() for cell in cells.values() if cell.reason
    }
    assert len(reasons) >= 6
    for reason in reasons:
        assert any(word in reason for word in ("choose", "leave", "set ")), reason
    answers = {cell.answer for cells in matrix.matrix().values() for cell in cells.values()}
    assert answers == {"yes", "no", UNTESTED}
    assert all(set(OPTIONS) < set(cells) for cells in matrix.matrix().values())


@pytest.mark.parametrize("name", FILES)
def test_the_files_have_the_table_of_today(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert rewrite(text, FILES[name]) == text, "run: python -m robustft.runtime.matrix"


def test_a_file_without_a_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="add the lines"):
        rewrite("no table", "full")
