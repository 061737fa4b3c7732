"""Time of our attacks against plain loops and other libraries over the same network.

PGD is compared with two textbook loops: one that calls ``loss.backward()``, as most papers' code
does, which also computes the gradients of all weights, and one that differentiates to the input.
Every attack is compared with the implementations in pyautoattack (the official one), adv-lib,
torchattacks and foolbox, as far as they are installed and have it, with the same number of steps.
The last column says how many of the points each leaves robust.

The attacks take turns in one process; each figure is a ratio of the smallest process times, so that
it does not depend on the machine's speed and little on its load.

    python benchmarks/attacks.py
    python benchmarks/attacks.py --batch-size 16 --repetitions 9 --write

adv-lib imports visdom, which only draws: an empty module of that name is put in its place.
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
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import AttackResult, apgd, fab, pgd, square

RESULTS = Path(__file__).parent / "results"
EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
NUM_TARGETS = 9
ORDERS = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}
PEERS = ("pyautoattack", "adv_lib", "torchattacks", "foolbox")

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``attack(model, inputs, labels)`` -> adversarial inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    batch_size: int = 32
    """Images of 3 x 32 x 32."""
    num_steps: int = 10
    """Steps of every attack, for each target."""
    num_queries: int = 200
    """Queries of Square."""
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
        model(points)  # the accuracy of the returned points, which our attack reports as well
    return points


def ours(attack: Callable[..., AttackResult], **options: object) -> Attack:
    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return attack(model, inputs, labels, **options).inputs

    return run


def official(kind: str, norm: str, count: int) -> Attack:
    """The classes of pyautoattack, one run each, called as its AutoAttack calls them."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    common = {"norm": norm, "eps": EPS[norm], "device": "cpu", "seed": 0}
    quiet = {**common, "logger": logging.getLogger("official")}

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        common["device"] = quiet["device"] = inputs.device
        if kind == "APGD":
            attack = APGDAttack(model, n_iter=count, **quiet)
        elif kind == "APGD-T":
            attack = APGDAttack_targeted(model, n_iter=count, n_target_classes=NUM_TARGETS, **quiet)
        elif kind == "FAB-T":
            attack = FABAttack_PT(
                model,
                n_iter=count,
                n_restarts=1,
                targeted=True,
                n_target_classes=NUM_TARGETS,
                **common,
            )
        else:
            attack = SquareAttack(model, n_queries=count, resc_schedule=False, **common)
        return attack.perturb(inputs, labels).detach()

    return run


def adversarial_library(kind: str, norm: str, count: int) -> Attack | None:
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))
    from adv_lib.attacks import apgd as their_apgd
    from adv_lib.attacks import apgd_targeted as their_targeted
    from adv_lib.attacks import fab as their_fab

    order, eps = ORDERS[norm], EPS[norm]
    found: dict[str, Attack] = {
        "APGD": lambda m, x, y: their_apgd(m, x, y, eps, order, n_iter=count, loss_function="ce"),
        "APGD-T": lambda m, x, y: their_targeted(
            m, x, y, eps, order, n_iter=count, num_targets=NUM_TARGETS
        ),
        "FAB-T": lambda m, x, y: their_fab(
            m, x, y, order, n_iter=count, restarts=NUM_TARGETS, targeted_restarts=True
        ),
    }
    return found.get(kind)


def torch_attacks(kind: str, norm: str, count: int) -> Attack | None:
    if norm == "L1":
        return None
    import torchattacks

    options = {"norm": norm, "eps": EPS[norm]}
    found: dict[str, Attack] = {
        "APGD": lambda m, x, y: torchattacks.APGD(m, steps=count, **options)(x, y),
        "APGD-T": lambda m, x, y: torchattacks.APGDT(m, steps=count, **options)(x, y),
        "FAB-T": lambda m, x, y: torchattacks.FAB(
            m, steps=count, n_classes=NUM_TARGETS + 1, multi_targeted=True, **options
        )(x, y),
        "Square": lambda m, x, y: torchattacks.Square(
            m, n_queries=count, resc_schedule=False, **options
        )(x, y),
        "PGD": lambda m, x, y: (
            torchattacks.PGD(m, eps=EPS[norm], alpha=2.5 * EPS[norm] / count, steps=count)(x, y)
            if norm == "Linf"
            else torchattacks.PGDL2(m, eps=EPS[norm], alpha=2.5 * EPS[norm] / count, steps=count)(
                x, y
            )
        ),
    }
    return found.get(kind)


def fool_box(kind: str, norm: str, count: int) -> Attack | None:
    if kind != "PGD" or norm == "L1":
        return None
    import foolbox

    attacks = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=inputs.device)
        attack = attacks[norm](steps=count, rel_stepsize=2.5 / count)
        return attack(wrapped, inputs, labels, epsilons=EPS[norm])[1]

    return run


def contestants(norm: str, config: Config) -> dict[str, dict[str, Attack]]:
    """Return attack -> {implementation: function}; ours comes first."""
    steps, queries = config.num_steps, config.num_queries
    shared = {"norm": norm, "eps": EPS[norm]}
    targeted = {**shared, "num_steps": steps, "num_targets": NUM_TARGETS, "check_clean": True}
    groups: dict[str, dict[str, Attack]] = {
        "APGD": {"robustft": ours(apgd, num_steps=steps, check_clean=True, **shared)},
        "APGD-T": {"robustft": ours(apgd, loss="dlr-targeted", **targeted)},
        "FAB-T": {"robustft": ours(fab, **targeted)},
        "Square": {"robustft": ours(square, num_queries=queries, check_clean=True, **shared)},
    }
    if norm != "L1":
        plain = functools.partial(plain_pgd, norm=norm, num_steps=steps)
        groups["PGD"] = {
            "robustft": ours(pgd, num_steps=steps, **shared),
            "robustft, report=False": ours(pgd, num_steps=steps, report=False, **shared),
            "loop, loss.backward()": functools.partial(plain, weights_too=True),
            "loop, autograd.grad": functools.partial(plain, weights_too=False),
        }
    makers: dict[str, Callable[[str, str, int], Attack | None]] = {
        "pyautoattack": lambda kind, *rest: None if kind == "PGD" else official(kind, *rest),
        "adv_lib": adversarial_library,
        "torchattacks": torch_attacks,
        "foolbox": fool_box,
    }
    for kind, group in groups.items():
        for package in PEERS:
            if importlib.util.find_spec(package) is None:
                continue
            attack = makers[package](kind, norm, queries if kind == "Square" else steps)
            if attack is not None:
                group[package] = attack
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
        for attack, implementations in contestants(norm, config).items():
            times: dict[str, list[float]] = {name: [] for name in implementations}
            for turn in range(config.repetitions + 1):
                for name, function in implementations.items():
                    spent = seconds(function, model, inputs, labels)
                    if turn > 0:
                        times[name].append(spent)
            best = min(times["robustft"])
            for name, function in implementations.items():
                passes = Passes(model)
                points = function(passes, inputs, labels)
                with torch.no_grad():
                    robust = int((model(points).argmax(1) == labels).sum())
                least = min(times[name])
                rows.append(
                    f"| {attack} {norm} | {name} | {passes.forwards} | {passes.backwards} "
                    f"| {least:.3f} | {max(times[name]) / least:.2f} | {best / least:.3f} "
                    f"| {robust} |"
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def report(config: Config, rows: list[str]) -> str:
    packages = ["torch", "robustft"]
    packages += [name for name in PEERS if importlib.util.find_spec(name)]
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
        f"# Attacks against loops and other libraries, {config.device}, {datetime.date.today()}",
        "",
        f"Command: `python benchmarks/attacks.py`, {', '.join(settings)}.",
        f"Versions: Python {platform.python_version()}, {', '.join(versions)}; commit "
        f"{commit or 'unknown'}.",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, {config.num_threads} used.",
        f"Each figure is the smallest of n = {config.repetitions} turns; `spread` is largest / "
        "smallest.",
        "`ratio` is our time over that implementation's: below 1 means ours is faster.",
        f"`robust`: how many of the {config.batch_size} points the attack leaves correct.",
        "",
        "| attack | implementation | forwards | backwards | seconds | spread | ratio | robust |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    logging.getLogger("official").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of the other libraries
    text = report(config, measure(config))
    print(text)
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        threads = f"_{config.num_threads}threads" if config.num_threads > 1 else ""
        path = RESULTS / f"attacks_{config.device}{threads}_{datetime.date.today()}.md"
        path.write_text(text, encoding="utf-8")
        print(f"written to {path.name}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
