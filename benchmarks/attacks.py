"""Time of our attacks against plain loops over the same network.

PGD is compared with two textbook loops: one that calls ``loss.backward()``, as most papers' code
does, which also computes the gradients of all weights, and one that differentiates to the input.
APGD is compared with the official implementation, if pyautoattack is installed.

The attacks take turns in one process; each figure is a ratio of the smallest process times, so that
it does not depend on the machine's speed and little on its load.

    python benchmarks/attacks.py
    python benchmarks/attacks.py --batch-size 16 --repetitions 9 --write
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import apgd, pgd

RESULTS = Path(__file__).parent / "results"
EPS = {"Linf": 8 / 255, "L2": 0.5}

Attack = Callable[[nn.Module, Tensor, Tensor], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    batch_size: int = 32
    """Images of 3 x 32 x 32."""
    num_steps: int = 10
    """Steps of every attack."""
    width: int = 32
    """Channels of the residual network."""
    num_blocks: int = 4
    """Residual blocks of the network."""
    repetitions: int = 5
    """Turns of each attack, after one that does not count."""
    num_threads: int = 1
    """Threads of torch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On "cuda" wall time is measured instead of process time."""
    write: bool = False
    """Write benchmarks/results/attacks_<device>_<date>.md."""


class Block(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(functional.relu(self.norms[0](inputs)))
        return inputs + self.second(functional.relu(self.norms[1](hidden)))


class Passes(nn.Module):
    """Counts forwards, and backwards that reach the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        if inputs.requires_grad:
            inputs.register_hook(self._count)
        return self.model(inputs)

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


def network(config: Config) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, config.width, 3, stride=2, padding=1),
        *[Block(config.width) for _ in range(config.num_blocks)],
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(config.width * 16, 10),
    ).eval()


def plain_pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str,
    num_steps: int,
    weights_too: bool,
) -> Tensor:
    """The loop of the papers, with a last forward for the accuracy."""
    eps = EPS[norm]
    step_size = 2.5 * eps / num_steps
    points = (inputs + (2 * torch.rand_like(inputs) - 1) * eps).clamp(0, 1)
    for _ in range(num_steps):
        points = points.detach().requires_grad_()
        loss = functional.cross_entropy(model(points), labels, reduction="sum")
        if weights_too:
            loss.backward()
            gradient = points.grad
        else:
            (gradient,) = torch.autograd.grad(loss, points)
        with torch.no_grad():
            if norm == "Linf":
                delta = (points + step_size * gradient.sign() - inputs).clamp(-eps, eps)
            else:
                length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = points + step_size * gradient / (length + 1e-12) - inputs
                length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = delta * (eps / length).clamp(max=1)
            points = (inputs + delta).clamp(0, 1)
    with torch.no_grad():
        return model(points).argmax(1) == labels


def official_apgd(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, norm: str, num_steps: int
) -> Tensor:
    """One run of the official class, from its own random start."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(
        model,
        n_iter=num_steps,
        norm=norm,
        eps=EPS[norm],
        device=inputs.device,
        logger=logging.getLogger("official"),
    )
    attack.init_hyperparam(inputs)
    return attack.attack_single_run(inputs, labels)[1]


def contestants(norm: str, num_steps: int) -> dict[str, dict[str, Attack]]:
    """Return attack -> {implementation: function}; ours comes first."""
    ours_pgd = functools.partial(pgd, norm=norm, eps=EPS[norm], num_steps=num_steps)
    ours_apgd = functools.partial(apgd, norm=norm, eps=EPS[norm], num_steps=num_steps)
    plain = functools.partial(plain_pgd, norm=norm, num_steps=num_steps)
    groups: dict[str, dict[str, Attack]] = {
        "PGD": {
            "robustft": ours_pgd,
            "robustft, report=False": functools.partial(ours_pgd, report=False),
            "loop, loss.backward()": functools.partial(plain, weights_too=True),
            "loop, autograd.grad": functools.partial(plain, weights_too=False),
        },
        "APGD": {"robustft": ours_apgd},
    }
    if importlib.util.find_spec("pyautoattack"):
        official = functools.partial(official_apgd, norm=norm, num_steps=num_steps)
        groups["APGD"]["pyautoattack"] = official
    return groups


def seconds(attack: Attack, model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    if inputs.device.type == "cpu":
        begin = time.process_time()
        attack(model, inputs, labels)
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    attack(model, inputs, labels)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(config: Config) -> list[str]:
    """Return the rows of the table."""
    torch.manual_seed(0)
    model = network(config).to(config.device)
    inputs = torch.rand(config.batch_size, 3, 32, 32).to(config.device)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    rows = []
    for norm in EPS:
        for attack, implementations in contestants(norm, config.num_steps).items():
            times: dict[str, list[float]] = {name: [] for name in implementations}
            for turn in range(config.repetitions + 1):
                for name, function in implementations.items():
                    spent = seconds(function, model, inputs, labels)
                    if turn > 0:
                        times[name].append(spent)
            ours = min(times["robustft"])
            for name, function in implementations.items():
                passes = Passes(model)
                function(passes, inputs, labels)
                least = min(times[name])
                rows.append(
                    f"| {attack} {norm} | {name} | {passes.forwards} | {passes.backwards} "
                    f"| {least:.3f} | {max(times[name]) / least:.2f} | {ours / least:.3f} |"
                )
    return rows


def report(config: Config, rows: list[str]) -> str:
    packages = ["torch", "robustft"]
    packages += ["pyautoattack"] if importlib.util.find_spec("pyautoattack") else []
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    settings = [f"{k} {v}" for k, v in dataclasses.asdict(config).items() if k != "write"]
    lines = [
        f"# Attacks against plain loops, {config.device}, {datetime.date.today()}",
        "",
        f"Command: `python benchmarks/attacks.py`, {', '.join(settings)}.",
        f"Versions: Python {platform.python_version()}, {', '.join(versions)}; commit "
        f"{commit or 'unknown'}.",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, {config.num_threads} used.",
        f"Each figure is the smallest of n = {config.repetitions} turns; `spread` is largest / "
        "smallest.",
        "`ratio` is our time over that implementation's: below 1 means ours is faster.",
        "",
        "| attack | implementation | forwards | backwards | seconds | spread | ratio |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    text = report(config, measure(config))
    print(text)
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"attacks_{config.device}_{datetime.date.today()}.md"
        path.write_text(text, encoding="utf-8")
        print(f"written to {path.name}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
