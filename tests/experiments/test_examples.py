"""The examples of ``examples/`` run, small, and do what they say."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import robustft as rft
from robustft.attacks import ATTACKS, pgd
from robustft.data import DATASETS
from robustft.evaluation import load_evaluation
from robustft.models import load_model_dir
from robustft.training.context import LocalContext

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def registers() -> Iterator[None]:
    """Forget what an example has registered."""
    tables = (rft.MODELS, rft.METHODS, ATTACKS, DATASETS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module of a class that they make anew.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_own_model_goes_from_pictures_to_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("own_model")
    root = example.draw_pictures(tmp_path / "pictures", per_class=20)
    output = tmp_path / "out"
    options = ["--image_size", "24", "--val_size", "12", "--eps", "4/255", "--epochs", "1"]
    assert example.main(["--root", str(root), "--output", str(output), *options]) == 0
    text = capsys.readouterr().out
    assert "start" in text
    assert "fine-tuned" in text
    assert (output / "report.html").is_file()
    before, _ = load_model_dir(output / "start")
    after, card = load_model_dir(output / "model")
    assert card["method"] == "rft"
    assert after.image_shape == (3, 24, 24)
    assert type(after.build().network).__name__ == "MyNet"
    # Fine-tuning moved the weights, not only BatchNorm's running statistics.
    assert before.state is not None
    assert after.state is not None
    weights = [name for name in before.state if name.endswith("weight")]
    assert len(weights) == 5
    for name in weights:
        assert not torch.equal(before.state[name], after.state[name]), name
    # What was measured of each model is what that model does, picture by picture.
    config = rft.TaskConfig(
        data="imagefolder",
        root=str(root),
        image_size=24,
        val_size=12,
        threat_models=(rft.ThreatModel("Linf", 4 / 255),),
        mean=before.mean,
        std=before.std,
    )
    test = rft.load_task(config).splits["test"]
    pictures = torch.from_numpy(test.images).float() / 255
    for name, model in (("start", before), ("fine-tuned", after)):
        stored = load_evaluation(output / f"{name}.parquet")
        assert {row["eps"] for row in stored.steps} == {4 / 255}
        with torch.no_grad():
            chances = model.build().eval()(pictures).softmax(1)
        assert stored.confidence == pytest.approx(chances.amax(1).numpy(), abs=1e-5)
        right = chances.argmax(1).numpy() == test.labels
        assert stored.masks["clean"].tolist() == right.tolist()
        assert not (stored.masks["Linf/pgd"] & ~right).any()


def test_own_model_says_where_pictures_belong(tmp_path: Path) -> None:
    with pytest.raises(rft.RobustftError, match="put pictures into"):
        load("own_model").main(["--root", str(tmp_path), "--output", str(tmp_path / "out")])


def test_own_method_resumes_where_it_stopped() -> None:
    example = load("own_method")
    assert "val/robust" in example.run(epochs=1, limit=100)
    task = rft.load_task(rft.TaskConfig(limit_train=60, limit_val=20))
    start = rft.Start(
        architecture="small_resnet",
        num_classes=10,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    attack = example.AttackConfig(num_steps=1)
    config = example.MixedConfig(epochs=2, batch_size=30, attack=attack)
    whole = example.train(config, LocalContext(task=task, start=start))

    class Interrupted(LocalContext):
        def report(self, *args: object, **options: object) -> None:
            super().report(*args, **options)  # type: ignore[arg-type]
            raise KeyboardInterrupt

    first = Interrupted(task=task, start=start)
    with pytest.raises(KeyboardInterrupt):
        example.train(config, first)
    second = LocalContext(task=task, start=start, checkpoint=first.checkpoint)
    resumed = example.train(config, second)
    assert len(second.reports) == 1
    assert resumed.metrics == whole.metrics
    for name, value in whole.state.items():
        assert torch.equal(resumed.state[name], value), name


def test_own_data_is_a_task_like_any_other(tmp_path: Path) -> None:
    example = load("own_data")
    text = example.run(tmp_path)
    assert text == "corners: train 320, val 80, test 200; 4 classes; images (1, 20, 20)\n"
    config = rft.TaskConfig(data="corners", root=str(tmp_path / "nowhere"))
    with pytest.raises(rft.RobustftError, match="which writes it"):
        rft.load_task(config)


def test_own_attack_is_reported_beside_the_others() -> None:
    text = load("own_attack").run(limit=20, epochs=1)
    found = dict(line.split() for line in text.splitlines())
    assert set(found) == {"clean", "Linf/apgd", "Linf/mi_fgsm", "Linf/robust", "robust"}
    assert float(found["robust"]) <= float(found["Linf/mi_fgsm"])


def test_own_attack_is_pgd_where_momentum_does_not_matter() -> None:
    """Without momentum and on a linear model: the same steps as PGD from the clean image."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    mine = load("own_attack").mi_fgsm(model, images, labels, eps=0.1, num_steps=5, decay=0.0)
    theirs = pgd(
        model,
        images,
        labels,
        norm="Linf",
        eps=0.1,
        step_size=0.02,
        num_steps=5,
        random_start=False,
    )
    assert torch.allclose(mine.inputs, theirs.inputs, atol=1e-6)
    assert (mine.inputs - images).abs().max() <= 0.1 + 1e-6
    # With momentum the first step is the same and later ones differ only where gradients turn.
    more = load("own_attack").mi_fgsm(model, images, labels, eps=0.1, num_steps=5)
    assert (more.loss > mine.loss - 0.05).all()


def test_the_sentences_of_the_faq_are_those_of_the_code() -> None:
    """Quotes are parts of strings in the source; "..." stands for what depends on the case."""
    root = EXAMPLES.parent
    told: list[str] = []
    for path in sorted((root / "library" / "robustft").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        told += [value for value in constants if isinstance(value, str)]
    faq = (root / "docs" / "faq.md").read_text(encoding="utf-8")
    quotes = [line.removeprefix("> ") for line in faq.splitlines() if line.startswith("> ")]
    assert len(quotes) > 20
    for quote in quotes:
        for part in filter(None, (part.strip() for part in quote.split("..."))):
            assert any(part in text for text in told), f"no string of the code has {part!r}"
