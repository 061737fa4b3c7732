"""Which methods go with which options, and what the configuration makes of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from small import small_experiment

from robustft.errors import ConfigError
from robustft.methods import METHODS
from robustft.methods.instance_losses import MitigationConfig
from robustft.methods.multinorm_config import MultiNormConfig
from robustft.methods.vanilla import RftConfig
from robustft.runtime.engines import why_not_options
from robustft.runtime.experiment import RuntimeConfig, SearchConfig
from robustft.runtime.outputs import start_cache
from robustft.runtime.preflight import validate
from robustft.training.engine_options import EngineOptions

BF16, PARTS = EngineOptions(precision="bf16"), EngineOptions(accumulate=2)
RECOMPUTED = EngineOptions(checkpoint_activations=True)


def config(name: str, **fields: Any) -> Any:
    return METHODS[name].config(**fields)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (config("rose"), BF16, "set method.precision"),
        (config("rose"), PARTS, "set method.accumulate"),
        (config("text-instances"), BF16, None),
        (config("text-instances"), PARTS, None),
        (config("multinorm"), PARTS, "batch by batch"),
        (config("twins"), PARTS, "other halves"),
        *(
            (
                config(name, mitigation=MitigationConfig(kind="flooding", scope="batch")),
                PARTS,
                "choose scope 'instance'",
            )
            for name in ("instances", "text-instances")
        ),
        (config("autolora"), RECOMPUTED, "leave runtime.checkpoint_activations off"),
        (config("autolora"), EngineOptions(compile=True), "leave runtime.compile off"),
        (RftConfig(dual_bn=True), RECOMPUTED, "dual_bn calls its network with other weights"),
        (RftConfig(), RECOMPUTED, None),
        (config("rose"), EngineOptions(sync_bn=True), "no BatchNorm"),
        (config("at"), PARTS, None),
        (config("at"), EngineOptions(), None),
    ],
)
def test_what_a_method_cannot_honour_is_refused(
    method: Any, options: EngineOptions, sentence: str | None
) -> None:
    reason = why_not_options(method, options)
    assert (reason is None) if sentence is None else (reason is not None and sentence in reason)


@pytest.mark.parametrize(
    ("options", "stage", "sentence"),
    [
        (EngineOptions(compile=True), 0, "choose engine 'ddp'"),
        (EngineOptions(sync_bn=True), 1, "choose engine 'ddp'"),
        (RECOMPUTED, 3, "choose zero_stage = 2"),
        (RECOMPUTED, 2, None),
        (BF16, 3, None),
    ],
)
def test_what_deepspeed_was_not_tried_with_is_refused(
    options: EngineOptions, stage: int, sentence: str | None
) -> None:
    reason = why_not_options(config("at"), options, deepspeed=True, zero_stage=stage)
    assert (reason is None) if sentence is None else (reason is not None and sentence in reason)
    assert why_not_options(config("at"), options) is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"precision": "fp16"}, "choose 'bf16'"),
        ({"sync_bn": True}, "set runtime.gpus_per_worker"),
        ({"min_workers": 0}, "from 1 to runtime.workers = 1"),
        ({"workers": 2, "min_workers": 3}, "from 1 to runtime.workers = 2"),
        ({"accumulate": 0}, "accumulate = 0"),
    ],
)
def test_the_runtime_refuses(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RuntimeConfig(**fields)


def test_the_runtime_says_how_many_workers() -> None:
    assert RuntimeConfig(workers=3).worker_range == 3
    assert RuntimeConfig(workers=3, min_workers=2).worker_range == (2, 3)


def test_ray_train_takes_a_range_of_workers() -> None:
    from ray.train import ScalingConfig

    scaling = ScalingConfig(num_workers=RuntimeConfig(workers=3, min_workers=2).worker_range)
    assert scaling.elasticity_enabled
    assert (scaling.min_workers, scaling.max_workers) == (2, 3)


def test_identity_knows_what_changes_results_alone(tmp_path: Path) -> None:
    experiment = small_experiment(tmp_path)

    class AnyTask:
        digest = "data"
        threat_models = ()

    def identity(**fields: Any) -> tuple[str, str]:
        runtime = dataclasses.replace(experiment.runtime, **fields)
        other = dataclasses.replace(experiment, runtime=runtime)
        return other.fingerprint, start_cache(other, AnyTask()).name  # type: ignore[arg-type]

    plain = identity()
    for fields in ({"checkpoint_activations": True}, {"compile": True}, {"min_workers": 1}):
        assert identity(**fields) == plain
    changed = [identity(**fields) for fields in ({"precision": "bf16"}, {"accumulate": 2})]
    assert all(not set(one) & set(plain) for one in changed)
    assert len(set(changed)) == 2


def test_validate_names_the_method_that_cannot(tmp_path: Path) -> None:
    experiment = small_experiment(tmp_path)
    experiment = dataclasses.replace(
        experiment,
        method=MultiNormConfig(),
        search=SearchConfig(),
        runtime=dataclasses.replace(experiment.runtime, accumulate=2),
    )
    found = [finding.text for finding in validate(experiment) if finding.level == "error"]
    assert [text for text in found if "multinorm draws norms" in text]
