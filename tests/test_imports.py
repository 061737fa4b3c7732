"""Everything below ``runtime`` imports and trains with ray, mlflow and deepspeed absent."""

import subprocess
import sys
import textwrap

BLOCK = """
import sys

for name in ("ray", "mlflow", "deepspeed"):
    sys.modules[name] = None  # type: ignore[assignment]  # importing it now raises ImportError

import importlib
import pkgutil

import robustft
"""

IMPORT_ALL = """
rooms = ("data", "models", "attacks", "training", "evaluation", "methods")
names = ["robustft.errors", "robustft.threat", "robustft.config"]
for room in rooms:
    package = importlib.import_module(f"robustft.{room}")
    names += [m.name for m in pkgutil.walk_packages(package.__path__, f"robustft.{room}.")]
for name in names:
    importlib.import_module(name)
assert not any(name.startswith("robustft.runtime") for name in sys.modules), "runtime came along"
print(len(names))
"""

TRAIN = """
import dataclasses
import numpy as np
from robustft.data.base import Split, Task
from robustft.methods import METHODS
from robustft.methods.adversarial import ATConfig
from robustft.methods.common import AttackConfig
from robustft.methods.rift import RiftConfig
from robustft.models import Start
from robustft.threat import ThreatModel
from robustft.training.context import LocalContext

def split(first):
    images = np.random.default_rng(first).integers(0, 256, (12, 1, 8, 8)).astype(np.uint8)
    return Split(images, np.arange(12) % 2, np.arange(first, first + 12))

task = Task(
    name="noise",
    splits={"train": split(0), "val": split(12), "test": split(24)},
    class_names=("a", "b"),
    threat_models=(ThreatModel("Linf", 0.1),),
    mean=(0.5,),
    std=(0.25,),
    digest="noise",
)
start = Start(
    architecture="small_resnet", num_classes=2, image_shape=(1, 8, 8), mean=(0.5,), std=(0.25,)
)
attack = AttackConfig(num_steps=1)
trained = METHODS["at"].train(
    ATConfig(epochs=1, batch_size=6, attack=attack, val_attack=attack),
    LocalContext(task=task, start=start),
)
start = dataclasses.replace(start, state=trained.state)
result = METHODS["rift"].train(
    RiftConfig(epochs=1, mrc_epochs=1, mrc_attack=attack, curve_attack=attack, curve_runs=1),
    LocalContext(task=task, start=start),
)
print(result.choices["layer"])
"""


def run(*scripts: str) -> str:
    script = "\n".join(textwrap.dedent(part) for part in scripts)
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_lower_rooms_import_without_ray_mlflow_and_deepspeed() -> None:
    assert int(run(BLOCK, IMPORT_ALL)) > 40


def test_lower_rooms_train_without_ray_mlflow_and_deepspeed() -> None:
    assert run(BLOCK, TRAIN)
