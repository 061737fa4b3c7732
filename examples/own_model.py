"""Your model and your pictures, from nothing to a comparison of two robust models.

What it shows: a module of your own, a folder of pictures, adversarial training as the start, robust
fine-tuning, an evaluation with attacks, and a page that compares both models picture by picture.

Command: ``python examples/own_model.py --root PICTURES --output OUT``; the pictures lie in
``PICTURES/train/<class>/`` and ``PICTURES/test/<class>/``. Without ``--root`` a few are drawn.
Your network takes the place of ``MyNet``; ``--help`` lists size, radius and what is held out.

Time: about ten seconds on a laptop with the drawn pictures. Everything runs in this process; a
:class:`robustft.LocalContext` is all that a method needs.

Output: ``start/`` and ``model/`` (weights and card), ``start.parquet`` and ``fine-tuned.parquet``
(the outcome of every test picture), ``report.html`` (both models, picture by picture).
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from torch import Tensor, nn

import robustft as rft
from robustft.evaluation.comparison import ComparedRun, compare_runs
from robustft.evaluation.comparison_report import comparison_lines, write_comparison_report
from robustft.methods.adversarial import ATConfig, train_at
from robustft.methods.common import AttackConfig
from robustft.methods.vanilla import RftConfig
from robustft.methods.vanilla import train as fine_tune
from robustft.models import save_model
from robustft.threat import parse_number
from robustft.training.augment import AugmentConfig
from robustft.training.schedules import ScheduleConfig

SIDE = 32
CLASSES = ("checks", "rings", "stripes")
"""Of the drawn pictures; yours may have any size and any classes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Your model and your pictures, from nothing to a comparison of two robust models."""

    root: Path | None = None
    """Folder with train/<class>/ and test/<class>/; None: a few pictures are drawn."""
    output: Path = Path("own_model")
    """Folder for models, outcomes and the page."""
    image_size: int = SIDE
    """Side to which pictures are scaled and cut, in pixels."""
    val_size: int = 30
    """Pictures of train that choose the epoch and are not trained on; 100 or more if you can."""
    eps: str = "8/255"
    """Radius of the Linf ball, in [0, 1] pixel units."""
    epochs: int = 8
    """Of adversarial training, and again of fine-tuning."""


class MyNet(nn.Module):
    """Any module from pictures ``[n, channels, height, width]`` to logits ``[n, classes]``.

    Pixels come normalised: :func:`robustft.models.build_model` puts that in front of it, so that
    attacks see plain pixels in [0, 1].
    """

    def __init__(self, *, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels = image_shape[0]
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(32 * 16, num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(pictures))
        return logits


def draw_pictures(root: Path, *, per_class: int) -> Path:
    """Write noisy patterns as PNG files into ``root/train/<class>`` and ``root/test/<class>``."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for split, count in (("train", per_class), ("test", per_class // 2)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                shift, width = draw.integers(0, 8), draw.integers(3, 6)
                centre = np.hypot(rows - 16 - shift / 2, columns - 16 + shift / 2)
                pattern = {
                    "checks": (rows + shift) // width % 2 ^ (columns // width) % 2,
                    "rings": centre // width % 2,
                    "stripes": (rows + columns + shift) // width % 2,
                }[name]
                ink = draw.uniform(0.2, 0.5, 3)
                pixels = pattern[:, :, None] * ink + draw.normal(0, 0.2, (SIDE, SIDE, 3))
                picture = (255 * np.clip(pixels, 0, 1)).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{number:03d}.png")
    return root


def run(root: Path, options: Options) -> str:
    """Train, fine-tune, evaluate and compare; return the comparison as text."""
    output = options.output
    # The name by which starts, cards and checkpoints know the architecture.
    rft.MODELS["my_net"] = MyNet

    task = rft.load_task(
        rft.TaskConfig(
            data="imagefolder",
            root=str(root),
            image_size=options.image_size,
            val_size=options.val_size,
            threat_models=(rft.ThreatModel("Linf", parse_number(options.eps)),),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        )
    )
    fresh = rft.Start(
        architecture="my_net",
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    attack = AttackConfig(num_steps=3)
    augment = AugmentConfig(crop_padding=2)
    trained = train_at(
        ATConfig(
            epochs=options.epochs,
            lr=0.05,
            batch_size=16,
            schedule=ScheduleConfig(name="cyclic"),
            augment=augment,
            attack=attack,
            val_attack=attack,
        ),
        rft.LocalContext(task=task, start=fresh),
    )
    start = dataclasses.replace(fresh, state=trained.state, source="my_net trained by at")
    tuned = fine_tune(
        RftConfig(
            epochs=options.epochs,
            lr=0.02,
            batch_size=16,
            schedule=ScheduleConfig(name="cosine"),
            augment=augment,
            attack=attack,
            val_attack=attack,
        ),
        rft.LocalContext(task=task, start=start),
    )
    # Folders that `rft.models.load_model_dir` and start.checkpoint read, once MyNet is registered.
    save_model(output / "start", start=start, state=trained.state, card={"method": "at"})
    save_model(output / "model", start=start, state=tuned.state, card={"method": "rft"})

    # To report numbers, take suite="standard" (AutoAttack) and leave the steps as they are.
    config = rft.EvaluationConfig(suite="quick", pgd_steps=10, apgd_steps=10, sanity=False)
    runs = [
        ComparedRun(
            name=name,
            evaluations={"0": rft.evaluate(model.build(), task, config=config)},
            data=task.name,
            data_digest=task.digest,
        )
        for name, model in (
            ("start", start),
            ("fine-tuned", dataclasses.replace(start, state=tuned.state)),
        )
    ]
    for one in runs:
        one.first.save(output / f"{one.name}.parquet")
    comparison = compare_runs(runs)
    page = write_comparison_report(output, comparison, described={}, title="My two models")
    return f"{comparison_lines(comparison)}\n{page}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example and print the comparison."""
    options = tyro.cli(Options, args=arguments, use_underscores=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or draw_pictures(Path(folder), per_class=80)
        sys.stdout.write(run(root, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
