"""Method "text-instances": statistics of a run on text, training on what they say, the study."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from text_fixtures import tiny_text_start, tiny_text_task
from torch import Tensor, nn

from robustft.config import from_dict, to_dict
from robustft.data.text import TextTask
from robustft.errors import ConfigError
from robustft.evaluation.text_evaluate import TextEvaluationConfig
from robustft.methods import METHODS, Method, instance_training
from robustft.methods.base import Result
from robustft.methods.instance_config import GroupConfig
from robustft.methods.instance_format import Record
from robustft.methods.instance_losses import InstanceMask, MitigationConfig, mitigated_loss
from robustft.methods.instance_perturbations import EmbeddingPerturbation
from robustft.methods.instance_recording import save_checkpoint
from robustft.methods.instance_selection import split_groups
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.instance_text import collect_text
from robustft.methods.rose import linear_rate
from robustft.methods.text_instances import (
    TextCollectConfig,
    TextInstancesConfig,
    collect_checkpoints,
    train,
)
from robustft.models import state_digest
from robustft.models.text import TextStart
from robustft.runtime.experiment import Experiment, StartConfig, load_experiment, with_values
from robustft.runtime.jsonfile import write_json
from robustft.runtime.results import save_result
from robustft.training.context import LocalContext, PlainEngine
from robustft.training.engine_options import EngineOptions
from robustft.training.optimizers import OptimizerConfig
from robustft.training.seeding import derive_seed
from robustft.training.text_loader import TextLoader, text_rows

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PERTURBATION = EmbeddingPerturbation(eps=0.3, num_steps=2)
SMALL = TextInstancesConfig(
    epochs=2,
    batch_size=16,
    lr=0.01,
    val_attack=dataclasses.replace(PERTURBATION, num_steps=1),
    collect=TextCollectConfig(attacks=(PERTURBATION,)),
)
REMOVED = (3, 10, 11, 30)
STEPS = 3  # of an epoch: 44 sentences in batches of 16


@pytest.fixture(scope="module")
def whole() -> TextTask:
    return tiny_text_task(48)


@pytest.fixture(scope="module")
def task(whole: TextTask) -> TextTask:
    """A task some of whose training rows were removed, so that ids are no positions."""
    train_split = whole.splits["train"]
    kept = train_split.take(np.flatnonzero(~np.isin(train_split.ids, REMOVED))[::-1])
    return dataclasses.replace(
        whole, splits={**whole.splits, "train": kept}, removed=REMOVED, digest="removed"
    )


@pytest.fixture(scope="module")
def start(whole: TextTask) -> TextStart:
    return tiny_text_start(whole, layers=1)


def context(task: TextTask, start: TextStart, **fields: Any) -> LocalContext:
    given: Any = {"task": task, "start": start, **fields}
    return LocalContext(**given)


def collecting(folder: Path, **changes: Any) -> TextInstancesConfig:
    collect = dataclasses.replace(SMALL.collect, folder=str(folder))
    return dataclasses.replace(SMALL, collect=collect, **changes)


@pytest.fixture(scope="module")
def folder(task: TextTask, start: TextStart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of a short run."""
    path = tmp_path_factory.mktemp("text-instances") / "statistics"
    train(collecting(path), context(task, start))
    return path


def statistics_of(folder: Path) -> InstanceStatistics:
    return InstanceStatistics(folder)


def contents(path: Path) -> dict[str, Any]:
    """Return every number of an artifact."""
    statistics = statistics_of(path)
    names = ("clean_loss", "pert_loss", "clean_margin", "pert_pred", "delta_norm")
    return {
        f"{record.record} {perturbation} {name}": statistics.column(
            name, perturbation=perturbation, record=record.record
        )
        for record in statistics.records
        for perturbation in statistics.manifest.perturbations
        for name in names
    }


def same_state(first: Any, second: Any) -> bool:
    return all(torch.equal(first[name], value) for name, value in second.items())


def test_roses_optimizer_says_what_its_masks_kept(task: TextTask, start: TextStart) -> None:
    config = dataclasses.replace(SMALL, epochs=1, optimizer=OptimizerConfig(name="rose"))
    (row,) = train(config, context(task, start)).tables["epochs"]
    assert 0 < row["mask/kept"] < 1
    assert {"mask/kept_attention", "mask/kept_ffn", "mask/churn"} <= row.keys()


# --- collection ----------------------------------------------------------------------------------


def test_a_run_measures_start_and_every_epoch(
    folder: Path, task: TextTask, start: TextStart
) -> None:
    statistics = statistics_of(folder)
    assert [(one.record, one.epoch, one.global_step) for one in statistics.records] == [
        (0, 0, 0),
        (1, 1, STEPS),
        (2, 2, 2 * STEPS),
    ]
    split = task.splits["train"]
    assert statistics.ids.tolist() == sorted(set(range(48)) - set(REMOVED))
    assert statistics.labels.tolist() == split.labels[np.argsort(split.ids)].tolist()
    assert statistics.manifest.model == "tiny-bert"
    assert statistics.records[0].weights == state_digest(start.build().state_dict())
    first = collect_text(start.build(), split, perturbations=[PERTURBATION]).columns
    read = statistics.column("pert_loss", perturbation=PERTURBATION.name, record=0)
    np.testing.assert_allclose(read, first["pert_loss"][np.argsort(first["instance_id"])])
    same = statistics.aggregate("identity")
    assert (same.values["loss_diff_mean"] == 0).all()
    assert (same.values["loss_diff_std"] == 0).all()
    assert (same.values["flip_times"] == 0).all()
    assert (folder / "summary.parquet").is_file()


def test_collecting_does_not_change_the_run(folder: Path, task: TextTask, start: TextStart) -> None:
    with_statistics = train(collecting(folder), context(task, start))
    without = train(SMALL, context(task, start))
    assert same_state(with_statistics.state, without.state)
    assert with_statistics.tables["epochs"] == without.tables["epochs"]
    rows = with_statistics.tables["statistics"]
    assert [(row["perturbation"], row["record"]) for row in rows] == [
        (name, record) for name in (PERTURBATION.name, "identity") for record in range(3)
    ]


class Killed(LocalContext):
    """Dies when it should report its second epoch: after the record, before the checkpoint."""

    def report(self, *arguments: Any, **options: Any) -> None:
        if options["step"] == 2:
            raise KeyboardInterrupt
        super().report(*arguments, **options)


def test_a_killed_run_resumes_to_the_same_weights_and_statistics(
    folder: Path, task: TextTask, start: TextStart, tmp_path: Path
) -> None:
    config = collecting(tmp_path / "statistics")
    given: Any = {"task": task, "start": start}
    killed = Killed(**given)
    with pytest.raises(KeyboardInterrupt):
        train(config, killed)
    (tmp_path / "statistics" / "record=00002" / "_SUCCESS").unlink()
    torch.manual_seed(99)  # Whatever the new process has drawn.
    result = train(config, context(task, start, checkpoint=killed.checkpoint))
    undisturbed = train(SMALL, context(task, start))
    assert same_state(result.state, undisturbed.state)
    assert result.tables["epochs"] == undisturbed.tables["epochs"]
    found, expected = contents(tmp_path / "statistics"), contents(folder)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def offline(folder: Path, shards: int, **changes: Any) -> TextInstancesConfig:
    config = collecting(folder, **changes)
    collect = dataclasses.replace(config.collect, when="offline", shards=shards)
    return dataclasses.replace(config, collect=collect)


def test_off_line_collection_gives_the_same_artifact(
    folder: Path, task: TextTask, start: TextStart, tmp_path: Path
) -> None:
    expected = contents(folder)
    trained = tmp_path / "4"
    result = train(offline(trained, 4), context(task, start))
    assert len(result.tables["statistics"]) == 6
    for shards in (2, 1):
        # Other numbers of shards measure the same weights.
        shutil.copytree(trained / "checkpoints", tmp_path / str(shards) / "checkpoints")
        collect_checkpoints(offline(tmp_path / str(shards), shards), context(task, start))
    for shards in (1, 2, 4):
        found = contents(tmp_path / str(shards))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-6, rtol=1e-5, err_msg=name)
        parts = sorted((tmp_path / str(shards) / "record=00001").glob("part-*"))
        assert len(parts) == shards
        manifests = [statistics_of(path).manifest for path in (folder, tmp_path / str(shards))]
        assert manifests[0] == manifests[1], "how it is collected is no part of what was measured"


def test_off_line_work_is_small_and_says_what_it_depends_on(
    task: TextTask, start: TextStart, tmp_path: Path
) -> None:
    calls: list[Any] = []

    class Spy(LocalContext):
        def map(self, fn: Any, items: Any, *, shared: Any, key: str, name: str) -> Any:
            items = list(items)
            calls.append((items, key))
            return super().map(fn, items, shared=shared, key=key, name=name)

    def spy(task: TextTask) -> Spy:
        given: Any = {"task": task, "start": start}
        return Spy(**given)

    config = offline(tmp_path / "statistics", 2, epochs=1)
    train(config, spy(task))
    ((items, key),) = calls
    assert Counter((item["record"], item["shard"]) for item in items) == Counter(
        (record, shard) for record in range(2) for shard in range(2)
    )
    json.dumps(items)
    # What is complete is not asked for again.
    collect_checkpoints(config, spy(task))
    assert len(calls) == 1
    # The same ids and labels with other tokens are other work.
    split = task.splits["train"]
    changed = dataclasses.replace(split, tokens=split.tokens[::-1].copy())
    other = dataclasses.replace(task, splits={**task.splits, "train": changed})
    (tmp_path / "statistics" / "record=00001" / "_SUCCESS").unlink()
    collect_checkpoints(config, spy(other))
    assert {item["record"] for item in calls[1][0]} == {1}
    assert calls[1][1] != key


def test_off_line_collection_refuses_what_it_cannot_measure(
    task: TextTask, start: TextStart, tmp_path: Path
) -> None:
    config = offline(tmp_path / "statistics", 2, epochs=1)
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        collect_checkpoints(config, context(task, start))
    with pytest.raises(ConfigError, match=r"collect\.folder = None"):
        collect_checkpoints(SMALL, context(task, start))
    state = start.build().state_dict()
    record = Record(record=0, epoch=0, global_step=0, weights=state_digest(state))
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_checkpoint(tmp_path / "statistics", record, state | {name: state[name] + 1})
    with pytest.raises(ConfigError, match="is no longer what it was"):
        collect_checkpoints(config, context(task, start))


def test_another_run_does_not_write_into_the_folder(
    folder: Path, task: TextTask, start: TextStart
) -> None:
    with pytest.raises(ConfigError, match="another run"):
        train(collecting(folder, lr=0.02), context(task, start))


# --- training ------------------------------------------------------------------------------------


def test_a_run_is_plain_fine_tuning(task: TextTask, start: TextStart) -> None:
    """AdamW without decay of vectors, clipped, a rate that rises and falls linearly."""
    result = train(dataclasses.replace(SMALL, clip_norm=0.1), context(task, start))
    model = start.build().train()
    named = dict(model.named_parameters())
    matrices = [value for value in named.values() if value.ndim > 1]
    vectors = [value for value in named.values() if value.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    )
    loader = TextLoader(
        task.splits["train"], batch_size=16, seed=0, device=CPU, pad_id=model.pad_id
    )
    losses = [0.0, 0.0]
    for epoch in range(2):
        for step, batch in enumerate(loader.epoch(epoch)):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * linear_rate(epoch * STEPS + step, 2 * STEPS, warmup=0.1)
            torch.manual_seed(derive_seed(0, "layers", epoch, step, 0))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch.inputs), batch.labels)
            loss.backward()
            losses[epoch] += float(loss.detach()) * len(batch.labels) / 44
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state[name], value)
    assert [row["train/loss"] for row in result.tables["epochs"]] == pytest.approx(losses, rel=1e-4)


def test_a_step_is_the_engines(whole: TextTask, task: TextTask) -> None:
    """Parts, precision and clipping are its own: ZeRO clips elsewhere, DDP averages once a step."""
    calls: list[Any] = []

    class Recording(PlainEngine):
        @contextlib.contextmanager
        def computing(self, *, synchronise: bool = True) -> Iterator[None]:
            calls.append(("computing", synchronise))
            with super().computing(synchronise=synchronise):
                yield

        def backward(self, loss: Tensor) -> None:
            calls.append("backward")
            super().backward(loss)

        def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
            calls.append(("clip", max_norm))
            super().clip(parameters, max_norm)

        def step(self) -> None:
            calls.append("step")
            super().step()

    steady = tiny_text_start(whole, layers=1, dropout=0.0)
    config = dataclasses.replace(SMALL, epochs=1, clip_norm=0.1)
    engine = Recording(EngineOptions(accumulate=2))
    parts = train(config, context(task, steady, engine=engine))
    part = [("computing", False), "backward", ("computing", True), "backward"]
    assert calls == [*part, ("clip", 0.1), "step"] * STEPS
    undivided = train(config, context(task, steady))
    for name in ("train/loss", "train/clean"):
        first, second = (one.tables["epochs"][0][name] for one in (parts, undivided))
        assert first == pytest.approx(second, rel=1e-4)


def test_what_val_says_is_what_it_is(task: TextTask, start: TextStart) -> None:
    result = train(SMALL, context(task, start))
    model = dataclasses.replace(start, state=result.state).build()
    split = task.splits["val"]
    inputs, labels, _ = text_rows(split, np.arange(len(split)), device=CPU, pad_id=model.pad_id)
    with torch.no_grad():
        logits = model(inputs)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert result.metrics["val/loss"] == pytest.approx(float(loss), rel=1e-5)
    right = logits.argmax(1) == labels
    assert result.metrics["val/clean"] == pytest.approx(float(right.float().mean()))
    columns = collect_text(model, split, perturbations=[SMALL.val_attack]).columns
    after = (columns["pert_pred"] == columns["label"]) & (columns["clean_pred"] == columns["label"])
    assert result.metrics["val/robust"] == pytest.approx(after.mean())
    assert result.metrics["updates"] == 2 * STEPS
    assert result.choices["leaky"] is False


def of_group(folder: Path, which: Any, **changes: Any) -> TextInstancesConfig:
    group = GroupConfig(statistics=str(folder), which=which, share=0.3)
    return dataclasses.replace(SMALL, epochs=1, group=group, **changes)


Calls = list[tuple[list[int], list[bool], Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The ids of every step, which of them were treated, and what else the loss was given."""
    found: Calls = []
    shown: list[list[int]] = []
    real = InstanceMask.of

    def see(self: Any, ids: Any) -> Any:
        shown.append(ids.tolist())
        return real(self, ids)

    def spy(config: Any, logits: Any, labels: Any, chosen: Any, **options: Any) -> Any:
        found.append((shown[-1], chosen.tolist(), options))
        return mitigated_loss(config, logits, labels, chosen, **options)

    monkeypatch.setattr(InstanceMask, "of", see)
    monkeypatch.setattr(instance_training, "mitigated_loss", spy)
    return found


@pytest.mark.parametrize("which", ["robust", "swing", "non-robust", "random", "all"])
def test_every_group_makes_the_same_number_of_updates(
    which: str, folder: Path, task: TextTask, start: TextStart, calls: Calls
) -> None:
    result = train(of_group(folder, which, use="subset"), context(task, start))
    assert len(calls) == STEPS
    assert result.metrics["updates"] == STEPS
    seen = Counter(itertools.chain.from_iterable(ids for ids, _, _ in calls))
    statistics = statistics_of(folder)
    if which == "all":
        assert set(seen) == set(statistics.ids.tolist())
        return
    groups = split_groups(statistics.aggregate(PERTURBATION.name), share=0.3)
    expected = set(statistics.ids[groups[which]].tolist())  # type: ignore[index]
    assert len(expected) == result.choices["group_size"] == 12
    # Three batches of at most 16 are one pass of 12 each.
    assert seen == dict.fromkeys(expected, 3)
    assert {"score/clean_loss", "score/label", "score/split_half"} <= set(result.metrics)
    assert result.choices["score"] == "perturbed_loss_mean_r"
    assert result.choices["perturbation"] == PERTURBATION.name


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("flooding", "instance"), ("flooding", "batch"), ("soft_label", "instance")],
)
def test_the_remedy_reaches_the_group_by_id(
    kind: Any, scope: Any, folder: Path, task: TextTask, start: TextStart, calls: Calls
) -> None:
    remedy = MitigationConfig(kind=kind, scope=scope, level=1.0)
    train(of_group(folder, "robust", mitigation=remedy), context(task, start))
    statistics = statistics_of(folder)
    groups = split_groups(statistics.aggregate(PERTURBATION.name), share=0.3, groups=("robust",))
    robust = set(statistics.ids[groups["robust"]].tolist())
    assert len(calls) == STEPS
    assert sum(sum(chosen) for _, chosen, _ in calls) == len(robust)
    for ids, chosen, options in calls:
        assert chosen == [number in robust for number in ids]
        assert (options["mean"] is not None) == (scope == "batch")


def test_the_level_may_follow_the_groups_losses(
    folder: Path, task: TextTask, start: TextStart
) -> None:
    remedy = MitigationConfig(kind="flooding", level_quantile=0.9)
    result = train(of_group(folder, "robust", mitigation=remedy), context(task, start))
    statistics = statistics_of(folder)
    groups = split_groups(statistics.aggregate(PERTURBATION.name), share=0.3, groups=("robust",))
    losses = statistics.column("clean_loss", perturbation=PERTURBATION.name, record=2)
    expected = np.quantile(losses[groups["robust"]], 0.9)
    assert result.choices["level"] == pytest.approx(float(expected))


def test_flooding_keeps_the_model_from_being_sure(task: TextTask, start: TextStart) -> None:
    flooding = MitigationConfig(kind="flooding", level=0.5)
    losses = []
    for mitigation in (MitigationConfig(), flooding):
        config = dataclasses.replace(SMALL, epochs=10, lr=0.05, mitigation=mitigation)
        result = train(config, context(task, start))
        model = dataclasses.replace(start, state=result.state).build()
        columns = collect_text(model, task.splits["train"], perturbations=["identity"]).columns
        losses.append(columns["clean_loss"].mean())
    assert losses[0] < 0.1
    assert losses[1] > 0.25


# --- what is refused -----------------------------------------------------------------------------


def test_statistics_of_other_data_are_refused(
    folder: Path, whole: TextTask, task: TextTask, start: TextStart
) -> None:
    # With the rows that were removed.
    with pytest.raises(ConfigError, match="which are not the 48 given"):
        train(of_group(folder, "robust", use="subset"), context(whole, start))
    # As many sentences with the same ids and other labels.
    split = task.splits["train"]
    other = dataclasses.replace(split, labels=1 - split.labels)
    changed = dataclasses.replace(task, splits={**task.splits, "train": other})
    with pytest.raises(ConfigError, match="which are not the 44 given"):
        train(of_group(folder, "robust", use="subset"), context(changed, start))
    config = of_group(folder, "robust", use="subset")
    group = dataclasses.replace(config.group, perturbation="emb-l2-k9-1")
    with pytest.raises(ConfigError, match="'emb-l2-k9-1' was not measured"):
        train(dataclasses.replace(config, group=group), context(task, start))


def test_groups_that_cannot_be_made_are_refused(
    folder: Path, task: TextTask, start: TextStart
) -> None:
    wider = dataclasses.replace(task, class_names=(*task.class_names, "never"))
    with pytest.raises(ConfigError, match="class 2 has no instance"):
        train(of_group(folder, "robust", use="subset"), context(wider, start))
    config = of_group(folder, "swing", use="subset")
    config = dataclasses.replace(config, group=dataclasses.replace(config.group, share=0.4))
    with pytest.raises(ConfigError, match="makes 3 groups of 8 instances of each class"):
        train(config, context(task, start))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use": "subset", "mitigation": {"kind": "flooding"}}, "trains on the group alone"),
        ({"group": {"which": "robust"}}, "name the folder of an earlier run's statistics"),
        ({"group": {"which": "robust", "statistics": "x"}}, "'robust' has no effect"),
        ({"mitigation": {"kind": "flooding", "level_quantile": 0.5}}, "needs group.statistics"),
        ({"collect": {"every": 0}}, "every = 0"),
        ({"collect": {"shards": 0}}, "shards = 0"),
        ({"collect": {"when": "later"}}, "'later'"),
        ({"collect": {"folder": "x", "attacks": [], "control": False}}, "nothing to measure"),
        ({"collect": {"attacks": [{"per": "word"}]}}, "'word'"),
        ({"collect": {"folder": "s3://bucket/x"}}, "collect.folder = 's3://bucket/x'.*NFS"),
        ({"group": {"statistics": "gs://bucket/x"}}, "group.statistics = 'gs://bucket/x'.*NFS"),
        ({"lr_warmup": 1.0}, "lr_warmup = 1.0"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0"),
        ({"keep": "first"}, "'first'"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TextInstancesConfig, fields)


def test_the_config_survives_yaml() -> None:
    config = collecting(Path("here"))
    assert from_dict(TextInstancesConfig, to_dict(config)) == config


# --- the study -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Method(
        name="text-instances",
        config=TextInstancesConfig,
        train=train,
        paper="Characterizing the Impacts of Instances on Robustness, Findings of ACL 2023",
        metrics=("val/clean", "val/robust", "val/loss", "updates"),
        kinds=("text",),
    )
    monkeypatch.setitem(METHODS, "text-instances", METHODS.get("text-instances", entry))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path, name = list(sys.path), "text_instances_study"
    file = ROOT / "experiments" / "text_instances.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
    sys.path[:] = path


def test_the_preset_is_the_studys(script: ModuleType) -> None:
    options = script.Options(epochs=3, limit=50, model="somewhere", data="sst2", root="there")
    base = script.prepared(options)
    assert (base.method.epochs, base.evaluation.limit, base.task.data) == (3, 50, "sst2")
    assert base.task.tokenizer == base.start.model == "somewhere"
    experiment = script.study.training(base, "soft_label", 3, Path("statistics"), options)
    assert experiment.start.seed == experiment.method.seed == experiment.method.group.seed == 3
    assert isinstance(experiment.method.collect, TextCollectConfig)
    assert experiment.method.collect.folder is None
    assert experiment.search.space["group.share"] == [0.3]
    config = with_values(experiment.method, {"group.which": "swing"})
    assert config.mitigation.kind == "soft_label"
    assert experiment.evaluation.suite == "clean", "test is read for what val has chosen"


def test_a_preset_without_an_attack_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_experiment("text-instances-embedded")
    clean = dataclasses.replace(base, evaluation=TextEvaluationConfig(suite="quick"))
    monkeypatch.setattr(script, "load_experiment", lambda name: clean)
    with pytest.raises(ConfigError, match="names no attack"):
        script.prepared(script.Options())


def test_a_study_of_toy_size_ends_in_a_table_and_a_page(
    script: ModuleType,
    task: TextTask,
    start: TextStart,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole study but Ray: the same configurations, trained in this process."""
    monkeypatch.setattr(script, "load_or_fresh", lambda experiment, task: start)
    base = Experiment(
        name="toy",
        task=load_experiment("text-instances-embedded").task,
        start=StartConfig(model="tiny"),
        method=dataclasses.replace(SMALL, epochs=1),
        evaluation=TextEvaluationConfig(
            suite="clean,fixed,char_noise,deepwordbug",
            noise_levels=(0.2, 0.4),
            noise_seeds=(0,),
            limit=6,
            sanity=False,
            num_strips=0,
        ),
    )
    options = script.Options(groups=("robust",), shares=(0.3,), seeds=(0, 1), output=tmp_path)

    def result_of(config: Any) -> Result:
        return train(config, context(task, start))

    folders = [tmp_path / f"statistics-{seed}" for seed in options.statistics_seeds]
    for seed, folder in zip(options.statistics_seeds, folders, strict=True):
        result_of(script.study.collecting(base, seed, folder).method)
    models = []
    for seed in options.seeds:
        experiment = script.study.training(base, "subset", seed, folders[0], options)
        directory = script.study.folder_of(experiment, f"subset-{seed}", options)
        space = experiment.search.space
        for number, chosen in enumerate(itertools.product(*space.values())):
            values = dict(zip(space, chosen, strict=True))
            place = directory / "search" / "tune" / f"{number:05d}" / "checkpoint_000000"
            save_result(result_of(with_values(experiment.method, values)), place)
            write_json(place / "trial.json", {"values": values, "error": ""})
        models += script.study.trained(directory, "subset", seed)
    text = script.conclude(base, options, task, folders, models, None)

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    # Val was looked at once, so that nothing is known of how its loss has risen.
    measured = {"clean", "robust", "advglue", "char_noise"}
    assert set(results["models"][0]["test"]) == measured
    robust = {(one["which"], one["seed"]): one["test"]["robust"] for one in results["models"]}
    (effect,) = [one for one in results["effects"] if one["measure"] == "robust"]
    expected = [robust["robust", seed] - robust["random", seed] for seed in (0, 1)]
    assert effect["differences"] == pytest.approx(expected)
    assert effect["decision"] in ("open", "void")
    identity, *rest = results["checks"]
    assert (identity["name"], identity["value"], identity["raised"]) == ("identity", 0.0, False)
    assert rest[-1]["name"] == "score_and_length"
    assert text.count("\n| ") == 3
    assert (tmp_path / "effects.png").stat().st_size > 10_000
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    points = json.loads(page.partition('id="points">')[2].partition("</script>")[0])
    split = task.splits["train"]
    assert len(points) == len(split)
    for point in points[:5]:
        row = int(np.flatnonzero(split.ids == int(point["id"]))[0])
        assert point["sentence"] == split.text_a[row].as_py()
        assert point["label"] == task.class_names[split.labels[row]]


def test_the_length_of_a_sentence_is_found_in_the_score(
    script: ModuleType, folder: Path, task: TextTask
) -> None:
    statistics, split = statistics_of(folder), task.splits["train"]
    summary = statistics.aggregate(PERTURBATION.name)
    lengths = split.lengths[np.argsort(split.ids)].astype(np.float64)
    values = {**summary.values, "perturbed_loss_mean": -lengths}
    faked = dataclasses.replace(summary, values=values)
    flag = script.checks([statistics], split, faked, GroupConfig())[-1]
    assert flag.raised
    assert flag.value == pytest.approx(-1)
