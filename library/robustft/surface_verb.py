"""The verb ``robustft surface``: the loss around one model's weights, or around several models'.

torch is imported only when it runs, so that ``robustft --help`` is quick.
"""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from robustft.errors import ConfigError, ResourceError, UnknownNameError
from robustft.verbs import Answer, Flag, Options, table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from robustft.data import Task
    from robustft.evaluation.loss_surface import LossSurface
    from robustft.evaluation.mapping import Mapper
    from robustft.threat import ThreatModel

    Subject = tuple[nn.Module, Iterable[tuple[Tensor, Tensor]]]

__all__ = ["Surface", "draw_surfaces"]

SplitT = TypeVar("SplitT")

DATA, MAX_LENGTH = "fashion_mnist_mini", 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surface(Options):
    """Draw the loss on a plane through the weights of one model, or of several to compare them.

    Example: robustft surface runs/rift-embedded/RUN_ID other/model --output surface/

    A command that was interrupted goes on where it stopped when it is given again.
    """

    models: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN|MODEL [RUN|MODEL ...]")]
    ]
    """Folders of runs or of models; for images also .safetensors or .pt/.pth state dicts (with
    --architecture) or robustbench/<threat>/<id>; for texts minilm or a hub id. All get the same
    random directions."""
    names: tuple[str, ...] = ()
    """What the models are called in the pictures, one each; none: their paths."""
    architecture: str | None = None
    """Architecture of bare weights (see `robustft ls models`); a model folder knows its own."""
    data: str | None = None
    """Data set (see `robustft ls datasets`), of images or of texts. None: that of the first run,
    with its --root and --max_length; where no run is named, fashion_mnist_mini."""
    root: str | None = None
    """Folder with the data files; None: under $ROBUSTFT_HOME."""
    tokenizer: str | None = None
    """For texts: a model's folder, minilm or a hub id; None: that of the first model."""
    max_length: int | None = None
    """For texts: tokens that a row is cut to; None: 128."""
    split: str = "train"
    """train, val or test."""
    limit: int = 512
    """Examples that the loss is a mean of, drawn with a fixed seed."""
    radius: float = 0.25
    """The grid goes from minus this to this, in units of each filter's norm."""
    points: int = 25
    """Points of the grid along either direction, odd: the model is the one in the middle."""
    seed: int = 0
    """Of the random directions, and of the attack's noise."""
    threat: str | None = None
    """Attack the images anew at every point: Linf:8/255 or L2:0.5. None: the plain loss."""
    attack_steps: int = 10
    """Steps of that attack (PGD)."""
    batch_size: int = 128
    """Examples per forward pass."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    ray: Flag = False
    """A Ray task per row of the grid, on the cluster at --address or on this machine's CPUs; with
    --device cuda each has a GPU."""
    address: str | None = None
    """Ray address, with --ray; None: $RAY_ADDRESS, else an embedded Ray."""
    output: Path = Path("surface")
    """Folder for report.html, plots/*.png and surfaces/*.npz."""


def draw_surfaces(verb: Surface) -> Answer:
    """Measure and draw the surfaces of the models that the command line names."""
    from robustft.evaluation.loss_surface import loss_surface

    names = _names(verb)
    verb = _with_data(verb)
    attack = None if verb.threat is None else _threat(verb.threat)
    _check_device(verb)
    # All before the first is measured: a wrong path is to be known now.
    subjects = dict(zip(names, _subjects(verb, attack), strict=True))
    try:
        verb.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write {verb.output}: {error.strerror}") from error
    try:
        with _mapper(verb) as mapper:
            surfaces = {
                name: loss_surface(
                    model,
                    batches,
                    grid=(-verb.radius, verb.radius, verb.points),
                    num_examples=verb.limit,
                    seed=verb.seed,
                    attack=attack,
                    attack_steps=verb.attack_steps,
                    map=mapper,
                    device=verb.device,
                )
                for name, (model, batches) in subjects.items()
            }
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what is finished is kept in {verb.output}: give the same command again"
        ) from None
    page = _write(verb, surfaces)
    rows = [{"model": name, **surface.scalars} for name, surface in surfaces.items()]
    files = dict(zip(names, map(str, _files(verb, names)), strict=True))
    document = {"output": str(verb.output), "report": str(page), "rows": rows, "surfaces": files}
    return Answer(document, f"{table(rows)}\n\n{page}")


def _with_data(verb: Surface) -> Surface:
    """Fill in what is not given of the data from the first run that is named."""
    from robustft.config import load_yaml
    from robustft.runtime.experiment import experiment_from_dict

    if verb.data is not None:
        return verb
    configs = (Path(reference).expanduser() / "config.yaml" for reference in verb.models)
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        return dataclasses.replace(verb, data=DATA)
    task = experiment_from_dict(load_yaml(config)).task
    return dataclasses.replace(
        verb,
        data=task.data,
        root=verb.root or task.root,
        max_length=verb.max_length or getattr(task, "max_length", None),
    )


def _subjects(verb: Surface, attack: "ThreatModel | None") -> list["Subject"]:
    """Return every model with the examples to measure it on."""
    from robustft.data.text_sets import TEXT_DATASETS

    return _text_subjects(verb) if verb.data in TEXT_DATASETS else _image_subjects(verb, attack)


def _image_subjects(verb: Surface, attack: "ThreatModel | None") -> list["Subject"]:
    from robustft.data import TaskConfig, load_task
    from robustft.evaluation.loss_surface import split_batches

    config = TaskConfig(data=verb.data or DATA, root=verb.root)
    if attack is not None:
        config = dataclasses.replace(config, threat_models=(attack,))
    task = load_task(config)
    split = _split(verb, task.splits)
    return [
        (
            _image_model(verb, reference, task),
            split_batches(split, num_examples=verb.limit, batch_size=verb.batch_size),
        )
        for reference in verb.models
    ]


def _text_subjects(verb: Surface) -> list["Subject"]:
    from robustft.data.text import TextTaskConfig, load_text_task
    from robustft.data.tokens import load_tokenizer, model_source
    from robustft.evaluation.loss_surface import split_batches
    from robustft.models.text import load_text_model_dir, load_text_start, require_fit
    from robustft.training.text_loader import text_rows

    folders = [_folder(reference) for reference in verb.models]
    # The folder of a model holds its tokeniser; a name, such as minilm, stands for both.
    tokenizer = verb.tokenizer or str(folders[0] or verb.models[0])
    config = TextTaskConfig(
        data=verb.data or DATA,
        root=verb.root,
        tokenizer=tokenizer,
        max_length=verb.max_length or MAX_LENGTH,
    )
    task = load_text_task(config)
    split = _split(verb, task.splits)
    cut = load_tokenizer(tokenizer)
    subjects: list[Subject] = []
    for folder, reference in zip(folders, verb.models, strict=True):
        if folder is None:
            start = load_text_start(model_source(reference), num_classes=task.num_classes)
        else:
            start, _ = load_text_model_dir(folder)
        if start.num_classes != task.num_classes:
            raise ConfigError(
                f"{reference} has {start.num_classes} classes and {verb.data} has "
                f"{task.num_classes}: name its own data"
            )
        require_fit(start, vocab_size=cut.vocab_size, pad_id=cut.pad_id, max_length=task.max_length)
        batches = split_batches(
            split,
            num_examples=verb.limit,
            batch_size=verb.batch_size,
            rows=functools.partial(text_rows, pad_id=cut.pad_id),
        )
        subjects.append((start.build(), batches))
    return subjects


def _check_device(verb: Surface) -> None:
    """Refuse a device that this machine lacks; tasks of a cluster have their own."""
    import torch

    if not verb.ray:
        try:
            torch.empty(0, device=verb.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {verb.device!r} cannot be used here: {reason}") from error


@contextlib.contextmanager
def _mapper(verb: Surface) -> Iterator["Mapper"]:
    """Give what computes the rows: this process, or Ray tasks. Both store what is finished."""
    store = verb.output / ".rows"
    if not verb.ray:
        from robustft.runtime.stored import StoredMap

        yield StoredMap(store)
        return
    from robustft.runtime.experiment import RuntimeConfig
    from robustft.runtime.session import connect

    with contextlib.ExitStack() as stack:
        session = stack.enter_context(connect(RuntimeConfig(address=verb.address)))
        gpus = 1.0 if verb.device.startswith("cuda") else 0.0
        session.require(1, cpus=1, gpus=gpus, growing=False)
        from robustft.runtime.events import EventPump
        from robustft.runtime.fanout import Fanout
        from robustft.runtime.progress import ProgressLines

        progress = ProgressLines()
        stack.callback(progress.close)
        pump = EventPump([progress])
        stack.callback(pump.close)
        most = 2 * max(1, session.num_cpus)
        yield Fanout(store, pump, stage="surface", max_in_flight=most, gpus=gpus)


def _write(verb: Surface, surfaces: dict[str, "LossSurface"]) -> Path:
    """Write the surfaces and the page; return the page's path."""
    from robustft.evaluation.surface_plots import write_surface_report
    from robustft.runtime.outputs import command_line, provenance

    for path, surface in zip(_files(verb, list(surfaces)), surfaces.values(), strict=True):
        surface.save(path)
    origin = provenance()
    facts = {
        **{
            f"model {number}": f"{reference}, weights {surface.metadata['model_digest'][:12]}"
            for number, (reference, surface) in enumerate(
                zip(verb.models, surfaces.values(), strict=True), start=1
            )
        },
        "data": f"{verb.data}, {verb.split}",
        "commit": origin["commit"],
        **origin["versions"],
    }
    return write_surface_report(
        verb.output,
        surfaces,
        title=f"Loss around {', '.join(surfaces)} on {verb.data}",
        facts=facts,
        command=command_line(sys.argv),
    )


def _files(verb: Surface, names: list[str]) -> list[Path]:
    """Return where the surfaces are written: numbered, since names may agree in their letters."""
    return [
        verb.output / "surfaces" / f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}.npz"
        for number, name in enumerate(names, start=1)
    ]


def _names(verb: Surface) -> list[str]:
    if not verb.models:
        raise ConfigError("name at least one model: a run's folder, a model folder, or weights")
    names = list(verb.names or verb.models)
    if len(names) != len(verb.models) or len(set(names)) < len(names):
        raise ConfigError(
            f"{len(verb.models)} models need as many different names: give --names, one each"
        )
    return names


def _threat(text: str) -> "ThreatModel":
    from robustft.threat import ThreatModel

    norm, _, eps = text.partition(":")
    if norm not in ("Linf", "L2") or not eps:
        raise ConfigError(f"--threat {text} cannot be used: write Linf:8/255 or L2:0.5")
    return ThreatModel(norm, eps)  # type: ignore[arg-type]  # it converts "8/255" itself


def _split(verb: Surface, splits: Mapping[str, SplitT]) -> SplitT:
    if verb.split not in splits:
        raise UnknownNameError("split", verb.split, splits)
    return splits[verb.split]


def _folder(reference: str) -> Path | None:
    """Return the folder of a saved model, or of the model of a run, if ``reference`` is one."""
    path = Path(reference).expanduser()
    return next((f for f in (path / "model", path) if (f / "card.json").is_file()), None)


def _image_model(verb: Surface, reference: str, task: "Task") -> "nn.Module":
    """Return the model of a run, a model folder or bare weights, if it fits the data."""
    from robustft.models import ROBUSTBENCH, load_model_dir, load_robustbench, load_start

    folder = _folder(reference)
    if folder is not None:
        start, _ = load_model_dir(folder)
        if (start.num_classes, tuple(start.image_shape)) != (task.num_classes, task.image_shape):
            raise ConfigError(
                f"{reference} takes {start.image_shape} images of {start.num_classes} classes and "
                f"{verb.data} has {task.image_shape} images of {task.num_classes}: name its own "
                "data"
            )
        return start.build()
    if reference.startswith(ROBUSTBENCH):
        return load_robustbench(reference, task.num_classes).eval()
    if verb.architecture is None:
        raise ConfigError(
            f"{reference} is no folder of a run or a model: give one, or weights together with "
            "--architecture (a name of `robustft ls models`)"
        )
    return load_start(
        reference,
        architecture=verb.architecture,
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    ).build()
