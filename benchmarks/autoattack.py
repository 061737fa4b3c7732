"""AutoAttack of this package against pyautoattack: time, and whom each leaves standing.

Both attack the same points of the same model in one process. Theirs runs twice: called by itself,
as its users call it, and behind our interface, which counts its passes and says who is standing.
The ratio of process times does not depend on the machine's speed and little on its load. Accuracies
may differ by an example at the edge: both draw noise, each in its own way.

    python benchmarks/autoattack.py
    python benchmarks/autoattack.py --model weights.safetensors --architecture resnet4b \
        --data cifar10 --root DATA --threat Linf:2/255 L2:0.25 L1:4 --num-examples 200 --write
"""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from robustft.attacks import AutoAttackResult, autoattack, pgd
from robustft.data import Task, TaskConfig, load_task
from robustft.models import build_model, load_model_dir, load_start
from robustft.threat import ThreatModel
from robustft.training.precision import full_float32

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    model: str | None = None
    """Weights or model folder; None: a small network is trained here for a few seconds."""
    architecture: str | None = None
    """Its architecture; a model folder knows its own."""
    data: str = "fashion_mnist_mini"
    """Data set."""
    root: str | None = None
    """Folder with its files."""
    split: str = "test"
    """Split to take the points from."""
    threat: tuple[str, ...] = ("Linf:0.1", "L2:1.0", "L1:10")
    """Threat models, norm:radius."""
    version: str = "standard"
    """Version of AutoAttack."""
    num_examples: int = 200
    """Points, drawn with a fixed seed."""
    batch_size: int = 250
    """Points per pass, for both."""
    num_threads: int = 1
    """Threads of torch."""
    device: str = "cpu"
    """On cuda wall time is measured instead of process time."""
    write: bool = False
    """Write benchmarks/results/autoattack_<data>_<device>_<date>.md."""


TRAINING_EPS = 0.1
"""Linf radius at which the small network is trained, whatever it is measured at."""


def trained(task: Task, images: Tensor, labels: Tensor, eps: float = TRAINING_EPS) -> nn.Module:
    """A small network after four epochs of adversarial training, so that half stays robust."""
    torch.manual_seed(0)
    model = build_model(
        "small_resnet",
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(4):
        for rows in torch.randperm(len(images)).split(64):
            inputs = pgd(
                model,
                images[rows],
                labels[rows],
                norm="Linf",
                eps=eps,
                step_size=eps / 2,
                num_steps=3,
                sample_ids=rows + epoch * len(images),
                report=False,
            ).inputs
            loss = nn.functional.cross_entropy(model.train()(inputs), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def as_shipped(
    config: Config, threat: ThreatModel, model: nn.Module, images: Tensor, labels: Tensor
) -> float:
    """Time the package as its users call it; our adapter spares it the gradients of the weights."""
    from pyautoattack import AutoAttack

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    attack = AutoAttack(
        model,
        norm=threat.norm,
        eps=threat.eps,
        version=config.version,
        device=config.device,
        seed=0,
    )
    begin = clock(config.device)
    attack.run_standard_evaluation(images, labels, batch_size=config.batch_size)
    spent = clock(config.device) - begin
    model.zero_grad(set_to_none=True)
    return spent


class Passes:
    """Record the batches that go through a network, to time them again without any attack."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[tuple[int, bool]] = []
        self._model = model

    def __enter__(self) -> "Passes":
        def remember(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            images = inputs[0]
            self.batches.append((len(images), torch.is_grad_enabled() and images.requires_grad))

        self._hook = self._model.register_forward_pre_hook(remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def alone(self, images: Tensor, device: str) -> float:
        """Return the seconds of the same batches, below which nothing that asks as often can go."""
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        filler = images.repeat(-(-max(size for size, _ in self.batches) // len(images)), 1, 1, 1)
        begin = clock(device)
        for size, with_gradient in self.batches:
            if with_gradient:
                inputs = filler[:size].clone().requires_grad_(True)
                torch.autograd.grad(self._model(inputs).sum(), inputs)
            else:
                with torch.no_grad():
                    self._model(filler[:size])
        return clock(device) - begin


@full_float32()
def measure(config: Config) -> list[str]:
    """Return the rows of the tables."""
    threats = [ThreatModel(*text.split(":")) for text in config.threat]
    task = load_task(TaskConfig(data=config.data, root=config.root, threat_models=(threats[0],)))

    def tensors(split: str) -> tuple[Tensor, Tensor]:
        data = task.splits[split]
        return torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)

    if config.model is None:
        model = trained(task, *tensors("train"))
    elif config.architecture is None:
        model = load_model_dir(config.model)[0].build()
    else:
        model = load_start(
            config.model,
            architecture=config.architecture,
            num_classes=task.num_classes,
            image_shape=task.image_shape,
            mean=task.mean,
            std=task.std,
        ).build()
    model = model.to(config.device).eval()
    images, labels = tensors(config.split)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = rows[: config.num_examples]
    images, labels = images[rows].to(config.device), labels[rows].to(config.device)
    with torch.no_grad():
        clean = int((model(images).argmax(1) == labels).sum())
    lines = []
    for threat in threats:
        raw = as_shipped(config, threat, model, images, labels)
        found: dict[str, tuple[AutoAttackResult, float]] = {}
        asked: dict[str, Passes] = {}
        for backend in ("native", "pyautoattack"):
            begin = clock(config.device)
            with Passes(model) as asked[backend]:
                result = autoattack(
                    model,
                    images,
                    labels,
                    norm=threat.norm,
                    eps=threat.eps,
                    version=config.version,
                    backend=backend,
                    batch_size=config.batch_size,
                )
            found[backend] = result, clock(config.device) - begin
        (ours, our_time), (theirs, their_time) = found["native"], found["pyautoattack"]
        for backend, (result, spent) in found.items():
            standing = ", ".join(f"{name} {count}" for name, count in result.standing.items())
            lines.append(
                f"| {threat} | {backend} | {clean} | {int(result.robust.sum())} | {standing} "
                f"| {result.total_forwards:,} | {result.total_backwards:,} | {spent:.1f} "
                f"| {spent / their_time:.2f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        lines.append(
            f"| {threat} | pyautoattack, called by itself | | | | | | {raw:.1f} "
            f"| {raw / their_time:.2f} |"
        )
        for backend, passes in asked.items():
            alone = passes.alone(images, config.device)
            lines.append(
                f"| {threat} | {backend}, the network's passes alone | | | | | | {alone:.1f} "
                f"| {alone / their_time:.2f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        differing = int((ours.robust != theirs.robust).sum())
        lines.append(
            f"| {threat} | both | | {differing} differ | | | | | {their_time / our_time:.2f}x, "
            f"{raw / our_time:.2f}x |"
        )
    return lines


def report(config: Config, rows: list[str]) -> str:
    names = ("torch", "robustft", "pyautoattack")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    shown = {**dataclasses.asdict(config), "root": None}
    if config.model is not None:
        shown["model"] = Path(config.model).name
    settings = [f"{k} {v}" for k, v in shown.items() if k != "write" and v is not None]
    lines = [
        f"# AutoAttack, ours and pyautoattack, {config.data}, {config.device}, "
        f"{datetime.date.today()}",
        "",
        f"Command: `python benchmarks/autoattack.py`, {', '.join(settings)}.",
        f"Versions: Python {platform.python_version()}, {', '.join(versions)}; commit "
        f"{commit or 'unknown'}.",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, {config.num_threads} used; one "
        "run each.",
        f"Of {config.num_examples} points: how many are right without an attack and how many are "
        "still standing after each attack.",
        "`time` is relative to pyautoattack's; the last line of a norm gives how many points the "
        "two disagree on, and how many times faster ours is than either way of calling it. Passes "
        "alone: the same batches through the network once more, without an attack around them.",
        "",
        "| threat | backend | clean | robust | standing after | forwards | backwards | seconds "
        "| time |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    text = report(config, measure(config))
    print(text)
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        name = f"autoattack_{config.data}_{config.device}_{datetime.date.today()}.md"
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(f"written to {name}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
