"""What is run: an experiment's configuration, its presets and its checks before anything starts."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from robustft.config import config_hash, from_dict, load_yaml, to_dict
from robustft.data import TaskConfig
from robustft.data.storage import is_uri, require_uri
from robustft.data.text import TextTaskConfig
from robustft.data.text_sets import TEXT_DATASETS
from robustft.errors import ConfigError, UnknownNameError
from robustft.evaluation import EvaluationConfig
from robustft.evaluation.text_evaluate import TextEvaluationConfig
from robustft.methods import METHODS, method_name
from robustft.methods.interpolation import InterpolateConfig
from robustft.methods.natural import NaturalConfig
from robustft.methods.rift_config import RiftConfig
from robustft.training.checks import require_choice
from robustft.training.engine_options import EngineOptions, Precision

__all__ = [
    "Experiment",
    "RuntimeConfig",
    "SearchConfig",
    "StartConfig",
    "experiment_from_dict",
    "experiment_to_dict",
    "list_presets",
    "load_experiment",
    "method_name",
    "with_values",
]


NUM_ZERO_STAGES = 4
LINE_METRICS = ("val/clean", "val/robust")
"""What an interpolation measures at every point, and so what a search over it can maximise."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """The model to start from: an architecture with given weights, or trained on the spot."""

    model: str = "small_resnet"
    """Architecture: a name of `robustft ls models`, or torchvision/<name>."""
    checkpoint: str | None = None
    """Weights: a model folder of ours, a .safetensors or a .pt/.pth state dict, or in a released
    layout <layout>:<file> (docs/models.md); None: train."""
    method: Any = None
    """How to train the start where no checkpoint is given: a method's config ({name: at, ...})."""
    before: Any = None
    """A method's config: trains what ``method`` begins from, in place of fresh weights ({name: at}
    before {name: multinorm}), on the same data."""
    task: Any = None
    """What ``method`` trains it on, or the checkpoint was trained on, in the form of the
    experiment's own task. None: that task."""
    head: Literal["keep", "fresh"] | None = None
    """Its classifier. "keep": as it was trained; "fresh": a new one for the task's classes, the
    same in all trials. None: "fresh" where ``task`` has other class names, else "keep"."""
    seed: int = 0
    """Seed of fresh weights, >= 0."""

    def __post_init__(self) -> None:
        if self.before is not None and (self.method is None or self.checkpoint is not None):
            raise ConfigError(
                "start.before trains what start.method begins from: give start.method and no "
                "start.checkpoint, or leave start.before out"
            )
        if self.task is None:
            return
        if not isinstance(self.task, (TaskConfig, TextTaskConfig)):
            raise ConfigError(f"start.task must be a task ({{data: ...}}), got {self.task!r}")
        if self.method is None and self.checkpoint is None:
            raise ConfigError(
                "start.task says what the start is trained on, and nothing is: give start.method "
                "or start.checkpoint, or leave start.task out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What Ray Tune varies in the method's config, and how."""

    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Field of the method ("lr", "optimizer.weight_decay") -> list of values (a grid), or
    {uniform|loguniform|randint: [low, high]} for random and Optuna search. Empty: one run without
    a search."""
    num_samples: int = 1
    """How often the grid is repeated, or how many random samples are drawn, >= 1."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """grid and random: Tune's basic variants; optuna: TPE (extra `search`)."""
    scheduler: Literal["fifo", "asha"] = "fifo"
    """asha stops weak trials early. RiFT's clean accuracy before interpolation misleads it."""
    metric: str = "val/clean"
    """What the search maximises, on the selection split only."""
    max_concurrent: int | None = None
    """Trials at a time; None: as many as the cluster has CPUs (or GPUs) for."""
    seed: int = 0
    """Seed of random and Optuna search."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"search.num_samples = {self.num_samples} must be at least 1")
        if self.metric.startswith("test"):
            raise ConfigError(
                f"search.metric = {self.metric!r} would choose on the test split: use a val/ metric"
            )
        if self.algorithm == "grid":
            for name, values in self.space.items():
                if not isinstance(values, (list, tuple)) or not values:
                    raise ConfigError(
                        f"search.space.{name} must be a list of values for a grid, got {values!r}"
                    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how wide it runs, and how its forwards are computed (docs/engines.md)."""

    workers: int = 1
    """Processes of a single training run (data parallel), >= 1."""
    min_workers: int | None = None
    """Fewest processes a single training run goes on with where nodes come and go, from 1 to
    ``workers``; the global batch stays the same. None: always ``workers``."""
    workers_per_trial: int = 1
    """Processes of each trial of a search, >= 1; more than 1 runs Ray Train inside each trial."""
    cpus_per_worker: int | None = None
    """CPUs (and torch threads) per process. None: 1 in trials; a single run shares the node's."""
    gpus_per_worker: float = 0.0
    """GPUs per process; fractions share one."""
    engine: Literal["auto", "ddp", "deepspeed"] = "auto"
    """How the processes of one training run work together; auto is ddp. deepspeed needs the extra
    `deepspeed` (docs/deepspeed.md)."""
    zero_stage: int = 0
    """With deepspeed: what is shared out among the processes, in place of a copy in each. 0:
    nothing, 1: the optimiser's state, 2: also gradients, 3: also weights."""
    precision: Precision = "float32"
    """Of forwards in training and of its attacks: "float32" or "bf16". Weights, optimiser and every
    evaluation are float32 in any case. Rose has a field of its own."""
    accumulate: int = 1
    """Parts that a worker's share of a batch is computed in, to save memory, >= 1."""
    checkpoint_activations: bool = False
    """True: blocks of the network keep only their inputs, and are computed again in backward."""
    compile: bool = False
    """True: torch.compile compiles the network of a training run."""
    sync_bn: bool = False
    """True: BatchNorm in train mode normalises with the global batch. Needs GPUs."""
    autoscaling: bool = False
    """True: the cluster grows on demand, so asking for more than it has now is no error."""
    max_failures: int = 2
    """How often a killed worker or trial is restarted from its checkpoint, >= 0."""
    storage: str | None = None
    """Folder of all runs, or a URI: s3://bucket/prefix, gs://, abfs:// (docs/storage.md; without
    credentials, which the environment holds). None: $ROBUSTFT_STORAGE, else ./runs (in a Ray job:
    under $ROBUSTFT_HOME, since the job's folder is temporary)."""
    tracking_uri: str | None = None
    """MLflow address. None: $MLFLOW_TRACKING_URI, else SQLite beside the runs."""
    register: bool = True
    """False: the final model is logged in MLflow, and no version of the registered model is made
    of it."""
    address: str | None = None
    """Ray address. None: $RAY_ADDRESS, else an embedded Ray in this process tree."""

    def __post_init__(self) -> None:
        if self.storage is not None and is_uri(self.storage):
            require_uri(self.storage)
        for name in ("workers", "workers_per_trial"):
            if getattr(self, name) < 1:
                raise ConfigError(f"runtime.{name} = {getattr(self, name)} must be at least 1")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ConfigError(f"runtime.cpus_per_worker = {self.cpus_per_worker}: at least 1")
        if self.gpus_per_worker < 0:
            raise ConfigError(f"runtime.gpus_per_worker = {self.gpus_per_worker}: 0 or more")
        require_choice(self, "engine", Literal["auto", "ddp", "deepspeed"])
        if self.zero_stage not in range(NUM_ZERO_STAGES):
            raise ConfigError(
                f"runtime.zero_stage = {self.zero_stage!r}: a whole number from 0 to "
                f"{NUM_ZERO_STAGES - 1}"
            )
        if self.zero_stage and self.engine != "deepspeed":
            raise ConfigError(
                f"runtime.zero_stage = {self.zero_stage}: only engine = 'deepspeed' shares out; "
                "set runtime.engine, or leave zero_stage at 0"
            )
        if self.max_failures < 0:
            raise ConfigError(f"runtime.max_failures = {self.max_failures}: 0 or more")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"runtime.min_workers = {self.min_workers}: from 1 to runtime.workers = "
                f"{self.workers}"
            )
        if self.options.sync_bn and not self.gpus_per_worker:
            raise ConfigError(
                "runtime.sync_bn = True: torch synchronises BatchNorm on GPUs only: set "
                "runtime.gpus_per_worker, or leave it off"
            )

    @property
    def worker_range(self) -> int | tuple[int, int]:
        """Processes of a single run: their number, or the fewest and the most."""
        return self.workers if self.min_workers is None else (self.min_workers, self.workers)

    @property
    def options(self) -> EngineOptions:
        """What the engine of a training run does beside wrapping and stepping."""
        names = [field.name for field in dataclasses.fields(EngineOptions)]
        return EngineOptions(**{name: getattr(self, name) for name in names})

    @property
    def engine_fields(self) -> dict[str, Any]:
        """The fields of a ``Job`` that say how its model is wrapped and computed."""
        return {"engine": self.engine, "zero_stage": self.zero_stage, "options": self.options}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """start -> method (searched) -> evaluation -> report, recorded as one MLflow parent run."""

    name: str
    """Name of the experiment: letters, digits, - and _ ; a folder and an MLflow experiment."""
    task: Any = dataclasses.field(default_factory=TaskConfig)
    """What is being made robust: images (TaskConfig) or text (TextTaskConfig)."""
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    """The model it starts from."""
    method: Any
    """The method's config."""
    # The command line has options for its fields where a preset gives it, and no subcommands.
    interpolate: Annotated[InterpolateConfig | None, tyro.conf.AvoidSubcommands] = None
    """Go back from the method's result towards the start as RiFT does: the cleanest point of the
    line that stays as robust as the start on "val". In a search, of every trial. None: keep the
    result."""
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    """What is varied."""
    evaluation: Any = None
    """How start and result are measured on test, once, at the end: EvaluationConfig, for text
    TextEvaluationConfig. None: its defaults."""
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    """Where and how wide it runs; but for ``EngineOptions.numerics`` it never changes what is
    computed."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ConfigError(
                f"name = {self.name!r} must be letters, digits, - and _ (it names a folder)"
            )
        self._check_kinds()
        self._check_interpolation()
        fixed = METHODS[method_name(self.method)].prepare_fields
        for name in self.search.space:
            _require_field(self.method, name)
            field = name.partition(".")[0]
            if field in fixed:
                raise ConfigError(
                    f"search.space.{name}: all trials share what depends on {field}, "
                    "so it cannot vary in one search; run one experiment per value"
                )
            inside = [other for other in self.search.space if other.startswith(f"{name}.")]
            if inside:
                raise ConfigError(
                    f"search.space.{inside[0]} is a part of search.space.{name}: keep one of them"
                )

    def _check_kinds(self) -> None:
        """Fill in the evaluation; raise ConfigError if task, method and evaluation do not match."""
        kind = "text" if isinstance(self.task, TextTaskConfig) else "images"
        expected = EVALUATIONS[kind]
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", expected())
        if not isinstance(self.evaluation, expected):
            raise ConfigError(
                f"evaluation is a {type(self.evaluation).__name__}, and {self.task.data} needs a "
                f"{expected.__name__}"
            )
        method = METHODS[method_name(self.method)]
        if kind not in method.kinds:
            raise ConfigError(
                f"{method.name} learns from {' or '.join(method.kinds)}, and {self.task.data} "
                f"holds {kind}: choose other data or another method"
            )

    def _check_interpolation(self) -> None:
        """Raise ConfigError if ``interpolate`` is asked for where it cannot be had."""
        if self.interpolate is None:
            return
        name = method_name(self.method)
        own = isinstance(self.method, NaturalConfig) and (
            self.method.mode == "wise-ft" or "wise-ft" in self.search.space.get("mode", ())
        )
        if own or isinstance(self.method, RiftConfig):
            raise ConfigError(
                f"interpolate: {name} goes back to the start by itself; leave interpolate out"
            )
        if isinstance(self.task, TextTaskConfig):
            raise ConfigError("interpolate measures images, and the task holds text: leave it out")
        if self.start.method is None and self.start.checkpoint is None:
            raise ConfigError(
                "interpolate goes back to a trained start: give start.method or start.checkpoint"
            )
        if self.search.metric not in LINE_METRICS:
            raise ConfigError(
                f"search.metric = {self.search.metric!r} is not measured along the interpolation: "
                f"set it to {' or '.join(LINE_METRICS)}"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the numbers (so not of where it runs)."""
        values = {k: v for k, v in experiment_to_dict(self).items() if k != "runtime"}
        numerics = self.runtime.options.numerics
        return config_hash({**values, "numerics": numerics} if numerics else values)


EVALUATIONS: Mapping[str, type[Any]] = {"images": EvaluationConfig, "text": TextEvaluationConfig}
"""What a task holds -> how its models are measured."""


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Return ``config`` with fields replaced by name and checked.

    Args:
        config: a method's config.
        values: field -> value; a dotted name ("optimizer.weight_decay") replaces one field of a
            nested config and leaves its other fields as they are.

    Raises:
        ConfigError, UnknownNameError: naming the field and the remedy.
    """
    fields = to_dict(config)
    for name, value in values.items():
        _require_field(config, name)
        *outer, last = name.split(".")
        place = fields
        for part in outer:
            place = place[part]
        place[last] = value
    return from_dict(type(config), fields)


def _require_field(config: Any, name: str) -> None:
    """Raise UnknownNameError unless ``config`` has the field, which may be a dotted one."""
    place, path = config, method_name(config)
    for part in name.split("."):
        nested = dataclasses.is_dataclass(place)
        fields = [field.name for field in dataclasses.fields(place)] if nested else []
        if part not in fields:
            raise UnknownNameError(f"field of {path}", part, fields)
        place, path = getattr(place, part), f"{path}.{part}"


def _method_from_dict(values: Any, *, path: str) -> Any:
    if not isinstance(values, Mapping) or "name" not in values:
        raise ConfigError(f"{path} must be a mapping with a name, e.g. {{name: rift, lr: 0.001}}")
    fields = dict(values)
    name = fields.pop("name")
    if name not in METHODS:
        raise UnknownNameError("method", str(name), METHODS)
    return from_dict(METHODS[name].config, fields, path=path)


def _method_to_dict(config: Any) -> dict[str, Any]:
    return {"name": method_name(config), **to_dict(config)}


def _task_from_dict(values: Any, *, path: str) -> Any:
    """Build a task's config; the name of its data says of which kind it is."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a mapping of fields, got {values!r}")
    cls = TextTaskConfig if values.get("data") in TEXT_DATASETS else TaskConfig
    return from_dict(cls, values, path=path)


def experiment_from_dict(values: Mapping[str, Any]) -> Experiment:
    """Build an experiment from what YAML holds; methods are mappings with a ``name``.

    Raises:
        ConfigError, UnknownNameError: naming the field and the remedy.
    """
    values = dict(values)
    if "method" not in values:
        raise ConfigError("missing field method: name one, e.g. method: {name: rift}")
    values["method"] = _method_from_dict(values["method"], path="method")
    if isinstance(values.get("start"), Mapping):
        start = dict(values["start"])
        for name in ("method", "before"):
            if start.get(name) is not None:
                start[name] = _method_from_dict(start[name], path=f"start.{name}")
        if start.get("task") is not None:
            start["task"] = _task_from_dict(start["task"], path="start.task")
        values["start"] = start
    if values.get("task") is not None:
        values["task"] = _task_from_dict(values["task"], path="task")
    if values.get("evaluation") is not None:
        kind = "text" if isinstance(values.get("task"), TextTaskConfig) else "images"
        values["evaluation"] = from_dict(EVALUATIONS[kind], values["evaluation"], path="evaluation")
    return from_dict(Experiment, values)


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """Return what ``experiment_from_dict`` reads."""
    values: dict[str, Any] = to_dict(experiment)
    values["method"] = _method_to_dict(experiment.method)
    for name in ("method", "before"):
        if getattr(experiment.start, name) is not None:
            values["start"][name] = _method_to_dict(getattr(experiment.start, name))
    return values


def preset_folders() -> list[Path]:
    """Return where presets are looked for: ./experiments/presets, then beside the package."""
    beside_package = Path(__file__).resolve().parents[3] / "experiments" / "presets"
    return [Path("experiments/presets"), beside_package]


def list_presets() -> dict[str, Path]:
    """Return preset name -> file."""
    found: dict[str, Path] = {}
    for folder in preset_folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load_experiment(preset: str | Path) -> Experiment:
    """Load a preset by name ("rift-embedded") or a YAML file by path.

    Raises:
        ConfigError: no such preset or file, or something in it cannot be used.
    """
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        presets = list_presets()
        if str(preset) not in presets:
            raise UnknownNameError("preset", str(preset), presets)
        path = presets[str(preset)]
    return experiment_from_dict(load_yaml(path))


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return ``values`` as YAML in the given field order."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=False, width=100)
    return text
