"""The study of robust instances: its decision rule, and a run of toy size from start to report."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from robustft.data.base import Split, Task
from robustft.errors import ConfigError, RunError
from robustft.evaluation import EvaluationConfig, Flag, group_study
from robustft.evaluation.intervals import mean_interval
from robustft.methods.base import Result
from robustft.methods.common import AttackConfig
from robustft.methods.instance_config import CollectConfig, InstancesConfig
from robustft.methods.instance_perturbations import GradientPerturbation
from robustft.methods.instance_selection import split_groups
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.instances import train
from robustft.runtime import instance_study as study_of
from robustft.runtime.experiment import Experiment, load_experiment, with_values
from robustft.runtime.jsonfile import write_json
from robustft.runtime.results import save_result
from robustft.runtime.starts import load_or_fresh
from robustft.threat import ThreatModel
from robustft.training.context import LocalContext

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "robust_instances.py"
SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("robust_instances", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = path


def model(script: ModuleType, which: str, seed: int, **changes: Any) -> Any:
    fields = {
        "remedy": "subset",
        "which": which,
        "share": None if which == "all" else 0.3,
        "strength": None,
        "seed": seed,
        "size": 30,
        "updates": 100,
        "val": {"val/clean": 0.8, "val/robust": 0.5, "val/loss": 0.6},
        "curve": [(1, 0.9), (2, 0.5), (3, 0.7)],
        "folder": Path("nowhere"),
    }
    return study_of.Trained(**{**fields, **changes})


def compared(script: ModuleType, differences: list[float], **options: Any) -> list[Any]:
    """Return the effects of one group whose robust accuracy differs from random's by that much."""
    models, test = [], []
    for seed, difference in enumerate(differences):
        for which, gain in (("robust", difference), ("random", 0.0), ("all", 0.1)):
            models.append(model(script, which, seed))
            test.append({"clean": 0.8, "robust": 0.4 + 0.05 * seed + gain, "overfit": 0.2})
    return group_study.effects(models, test, **{"reliable": True, **options})


# --- what is run ---------------------------------------------------------------------------------


def test_a_seed_fixes_weights_order_and_the_random_group(script: ModuleType) -> None:
    options = script.Options()
    base = script.prepared(options)
    experiment = study_of.training(base, "subset", 3, Path("statistics"), options)
    assert experiment.start.seed == experiment.method.seed == experiment.method.group.seed == 3
    assert experiment.method.group.statistics == str(Path("statistics").resolve())
    assert experiment.method.use == "subset"
    assert experiment.method.collect.folder is None
    assert experiment.search.space == {
        "group.which": ["robust", "swing", "non-robust", "random", "all"],
        "group.share": [0.1, 0.3],
    }
    assert experiment.evaluation.suite == "clean", "test is read for what val has chosen"
    first, second = (
        study_of.folder_of(
            study_of.training(base, "subset", seed, Path("s"), options), "subset", options
        )
        for seed in (0, 1)
    )
    assert first != second


@pytest.mark.parametrize(
    ("remedy", "field", "values"),
    [
        ("flooding", "mitigation.level_quantile", [0.5, 0.75, 0.9]),
        ("soft_label", "mitigation.confidence", [0.9, 0.8]),
    ],
)
def test_remedies_are_searched_over_their_strength(
    script: ModuleType, remedy: str, field: str, values: list[float]
) -> None:
    options = script.Options()
    experiment = study_of.training(script.prepared(options), remedy, 0, Path("s"), options)
    assert experiment.search.space[field] == values
    assert experiment.method.use == "loss"
    for which, strength in itertools.product(experiment.search.space["group.which"], values):
        config = with_values(experiment.method, {"group.which": which, field: strength})
        assert config.mitigation.kind == remedy


def test_statistics_are_of_all_instances_and_go_to_a_folder(script: ModuleType) -> None:
    base = script.prepared(script.Options(epochs=3, limit_train=100, limit=50))
    experiment = study_of.collecting(base, 100, Path("there"))
    assert experiment.start.seed == experiment.method.seed == 100
    assert experiment.method.collect.folder == str(Path("there").resolve())
    assert experiment.method.group.which == "all"
    assert "identity" in experiment.method.collect.transforms
    assert (experiment.method.epochs, experiment.task.limit_train) == (3, 100)
    assert base.evaluation.limit == 50
    assert not experiment.search.space


def test_options_that_spoil_the_study_are_refused(script: ModuleType) -> None:
    with pytest.raises(ConfigError, match="leave swing out"):
        script.Options(shares=(0.1, 0.5))
    script.Options(shares=(0.5,), groups=("robust", "non-robust"))
    with pytest.raises(ConfigError, match="none of seeds"):
        script.Options(seeds=(0, 100))
    with pytest.raises(ConfigError, match="at least two seeds"):
        script.Options(seeds=(0,))


def test_a_preset_without_an_attack_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_experiment("instances-embedded")
    clean = dataclasses.replace(base, evaluation=EvaluationConfig(suite="corruptions"))
    monkeypatch.setattr(script, "load_experiment", lambda name: clean)
    with pytest.raises(ConfigError, match="names no attack"):
        script.prepared(script.Options())


def write_trial(folder: Path, number: int, result: Result, values: Any, error: str = "") -> None:
    """Leave what a finished trial of a search leaves."""
    checkpoint = folder / "search" / "tune" / f"{number:05d}" / "checkpoint_000000"
    save_result(result, checkpoint)
    write_json(checkpoint / "trial.json", {"values": values, "error": error})


def small_result(robust: float = 0.5) -> Result:
    return Result(
        state={},
        metrics={"val/clean": 0.8, "val/robust": robust, "val/loss": 0.6, "updates": 8.0},
        choices={"group_size": 15, "epoch": 2},
        tables={"epochs": [{"epoch": 1, "val/loss": None}, {"epoch": 2, "val/loss": 0.6}]},
    )


def test_trials_are_read_and_all_counts_once(script: ModuleType, tmp_path: Path) -> None:
    for number, (which, share) in enumerate(itertools.product(("robust", "all"), (0.1, 0.3))):
        values = {"group.which": which, "group.share": share, "mitigation.level_quantile": 0.5}
        write_trial(tmp_path, number, small_result(), values)
    found = study_of.trained(tmp_path, "flooding", 4)
    assert [one.arm for one in found] == [
        ("flooding", "robust", 0.1),
        ("flooding", "robust", 0.3),
        ("flooding", "all", None),
    ]
    assert {(one.strength, one.seed, one.size, one.updates) for one in found} == {(0.5, 4, 15, 8)}
    assert found[0].curve == [(2, 0.6)]


def test_a_failed_trial_ends_the_study(script: ModuleType, tmp_path: Path) -> None:
    values = {"group.which": "robust", "group.share": 0.1}
    write_trial(tmp_path, 0, small_result(), values, error="the loss is not finite")
    with pytest.raises(RunError, match="the loss is not finite"):
        study_of.trained(tmp_path, "subset", 0)


def test_unequal_updates_or_sizes_are_refused(script: ModuleType) -> None:
    fair = [model(script, "robust", 0), model(script, "random", 0)]
    study_of.require_fair([*fair, model(script, "all", 0, size=100)])
    with pytest.raises(RunError, match="number of updates"):
        study_of.require_fair([*fair, model(script, "all", 0, updates=99)])
    with pytest.raises(RunError, match="differ in size"):
        study_of.require_fair([*fair, model(script, "non-robust", 0, size=31)])


# --- the decision rule ---------------------------------------------------------------------------


def test_val_chooses_the_strength_of_every_group_by_itself(script: ModuleType) -> None:
    best = {"robust": 0.8, "random": 0.9}
    models = [
        model(
            script,
            which,
            seed,
            remedy="soft_label",
            strength=strength,
            val={"val/robust": 0.5 + 0.01 * (strength == best[which]) * (seed > 0)},
        )
        for which, strength, seed in itertools.product(best, (0.8, 0.9), (0, 1))
    ]
    kept = study_of.chosen(models)
    assert [(one.which, one.strength, one.seed) for one in kept] == [
        ("robust", 0.8, 0),
        ("robust", 0.8, 1),
        ("random", 0.9, 0),
        ("random", 0.9, 1),
    ]
    with pytest.raises(RunError, match="lacks a seed"):
        study_of.chosen(models[:-1])


def test_effects_are_paired_by_seed(script: ModuleType) -> None:
    gains = [0.02, 0.03, 0.025, 0.02, 0.03]
    (effect,) = [one for one in compared(script, gains) if one.measure == "robust"]
    # Accuracies differ by 20 points between seeds; the differences hardly.
    assert effect.differences == pytest.approx(gains)
    assert (effect.low, effect.high) == pytest.approx(mean_interval(gains, 0.95))
    assert effect.decision == "higher"


@pytest.mark.parametrize(
    ("gains", "reliable", "expected"),
    [
        ([-0.02, -0.03, -0.02, -0.03, -0.02], True, "lower"),
        ([0.02, -0.03, 0.02, -0.01, 0.02], True, "open"),
        ([0.02, 0.03, 0.02, 0.03, 0.02], False, "void"),
        ([0.02, 0.021, 0.02, 0.021], True, "open"),  # Four seeds.
    ],
)
def test_decisions(script: ModuleType, gains: list[float], reliable: bool, expected: str) -> None:
    found = compared(script, gains, reliable=reliable)
    assert {one.measure: one.decision for one in found} == {
        "clean": "",
        "robust": expected,
        "overfit": "",
    }


def test_more_comparisons_need_stronger_evidence(script: ModuleType) -> None:
    # Five differences that exclude 0 at 95 % and not at 1 - .05 / 6.
    gains = [0.01, 0.02, 0.03, 0.04, 0.01]
    low, high = mean_interval(gains, 1 - 0.05 / 6)
    assert low < 0 < mean_interval(gains)[0]
    models, test = [], []
    for seed, gain in enumerate(gains):
        for share, which in itertools.product(
            (0.1, 0.3), ("robust", "swing", "non-robust", "random")
        ):
            models.append(model(script, which, seed, share=share))
            test.append({"robust": 0.4 + (gain if which != "random" else 0)})
    found = group_study.effects(models, test, reliable=True)
    assert len(found) == 6
    assert {one.decision for one in found} == {"open"}
    assert (found[0].low, found[0].high) == pytest.approx((low, high))


def test_the_verdict_says_no_more_than_the_rule_allows(script: ModuleType) -> None:
    fine = [Flag(name=name, raised=False, value=0.9, text="") for name in "abc"]
    higher, lower, nothing = (
        compared(script, gains)
        for gains in (
            [0.02, 0.03, 0.02, 0.03, 0.02],
            [-0.02, -0.03, -0.02, -0.02, -0.03],
            [0.0, 0.1, -0.1],
        )
    )
    (sentence, rest) = group_study.verdict(higher, fine)
    assert sentence.startswith("robust, share 0.3, subset: robust accuracy is higher than")
    assert "+2.40 [" in sentence
    assert rest == "0 of 1 comparisons are open."
    assert "is lower than" in group_study.verdict(lower, fine)[0]
    assert group_study.verdict(nothing, fine) == [
        "Open: in none of 1 comparisons does the interval exclude 0."
    ]
    bad = [fine[0], Flag(name="split_half", raised=True, value=0.1, text=""), fine[2]]
    assert group_study.verdict(higher, bad) == [
        "Void: the score is not trustworthy (split half), so nothing follows from groups."
    ]


def test_the_loss_on_val_shows_overfitting(script: ModuleType) -> None:
    assert model(script, "robust", 0).overfit == pytest.approx(0.2)
    assert model(script, "robust", 0, curve=[(1, 0.9), (2, 0.5)]).overfit == 0


def test_the_table_shows_accuracies_differences_and_decisions(script: ModuleType) -> None:
    models = [model(script, which, seed) for which in ("robust", "random", "all") for seed in SEEDS]
    test = [{"robust": 0.5 if one.which == "robust" else 0.4, "overfit": 0.25} for one in models]
    found = group_study.effects(models, test, reliable=True)
    robust, random, everything = group_study.rows(models, test, found)
    assert robust == {
        "group": "robust",
        "treatment": "subset",
        "share": "0.3",
        "robust (%)": "50.0",
        "loss rise on val (nats)": "0.250",
        "robust minus random": "+10.00 [+10.00, +10.00]",
        "loss rise on val minus random": "+0.00 [+0.00, +0.00]",
        "decision": "higher",
    }
    assert (random["robust (%)"], random["robust minus random"], random["decision"]) == (
        "40.0", "", "",
    )  # fmt: skip
    assert everything["share"] == "1"
    text = group_study.markdown([robust, random], ["A note."])
    assert text.splitlines()[2].endswith("| higher |")
    assert len({line.count("|") for line in text.splitlines()[:4]}) == 1
    assert text.endswith("\n\nA note.\n")


# --- a study of toy size -------------------------------------------------------------------------


def stripes(count: int, first_id: int) -> Split:
    draw = np.random.default_rng(first_id)
    labels = np.arange(count) % 2
    images = draw.integers(0, 150, (count, 1, 12, 12))
    images[labels == 1, :, ::3, :] += 100
    # Ids do not ascend: whatever joins by position instead of id goes wrong.
    ids = np.arange(first_id, first_id + count, dtype=np.int64)[::-1].copy()
    return Split(images.astype(np.uint8), labels.astype(np.int64), ids)


@dataclasses.dataclass(frozen=True)
class Study:
    options: Any
    base: Experiment
    task: Task
    folders: list[Path]
    models: list[Any]
    text: str


@pytest.fixture(scope="module")
def study(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The whole study but Ray: the same configurations, trained in this process."""
    output = tmp_path_factory.mktemp("study")
    task = Task(
        name="stripes",
        splits={"train": stripes(40, 0), "val": stripes(20, 100), "test": stripes(20, 200)},
        class_names=("none", "rows"),
        threat_models=(ThreatModel("Linf", 0.05),),
        mean=(0.4,),
        std=(0.2,),
        digest="stripes",
    )
    attack = AttackConfig(num_steps=1)
    base = Experiment(
        name="toy",
        method=InstancesConfig(
            epochs=1,
            batch_size=16,
            lr=0.02,
            val_attack=attack,
            collect=CollectConfig(
                attacks=(GradientPerturbation(eps=0.05, num_steps=1),),
                transforms=("identity", "blur-weak"),
            ),
        ),
        evaluation=EvaluationConfig(suite="clean,pgd", pgd_steps=2, sanity=False, num_strips=0),
    )
    options = script.Options(
        groups=("robust", "non-robust"), shares=(0.3,), seeds=(0, 1), output=output
    )

    def result_of(experiment: Experiment, config: Any) -> Result:
        return train(config, LocalContext(task=task, start=load_or_fresh(experiment, task)))

    folders = [output / f"statistics-{seed}" for seed in options.statistics_seeds]
    for seed, folder in zip(options.statistics_seeds, folders, strict=True):
        experiment = study_of.collecting(base, seed, folder)
        result_of(experiment, experiment.method)
    models = []
    for seed in options.seeds:
        experiment = study_of.training(base, "subset", seed, folders[0], options)
        directory = study_of.folder_of(experiment, f"subset-{seed}", options)
        space = experiment.search.space
        for number, chosen in enumerate(itertools.product(*space.values())):
            values = dict(zip(space, chosen, strict=True))
            result = result_of(experiment, with_values(experiment.method, values))
            write_trial(directory, number, result, values)
        models += study_of.trained(directory, "subset", seed)
    text = script.conclude(base, options, task, folders, models, None)
    return Study(options, base, task, folders, models, text)


def test_the_study_compares_equal_groups_of_other_draws(study: Study) -> None:
    assert {one.size for one in study.models if one.which != "all"} == {12}
    assert {one.updates for one in study.models} == {3}
    summary = InstanceStatistics(study.folders[0]).aggregate("px-linf-k1-0.05")
    draws = [
        split_groups(summary, share=0.3, groups=("random",), seed=seed)["random"]
        for seed in study.options.seeds
    ]
    assert (draws[0] != draws[1]).any()


def test_results_are_those_of_the_models(script: ModuleType, study: Study) -> None:
    results = json.loads((study.options.output / "results.json").read_text(encoding="utf-8"))
    assert len(results["models"]) == len(study.models) == 2 * 4
    robust = {(one["which"], one["seed"]): one["test"]["robust"] for one in results["models"]}
    effects = [one for one in results["effects"] if one["measure"] == "robust"]
    assert {one["which"] for one in effects} == {"robust", "non-robust"}
    for effect in effects:
        expected = [robust[effect["which"], seed] - robust["random", seed] for seed in (0, 1)]
        assert effect["differences"] == pytest.approx(expected)
    identity, *_ = results["checks"]
    assert (identity["name"], identity["value"], identity["raised"]) == ("identity", 0.0, False)
    names = [check["name"] for check in results["checks"]]
    assert names[1:5] == [
        "split_half_reliability",
        "reliability_across_seeds",
        "score_and_clean_loss",
        "score_and_label",
    ]
    assert "blur-weak" in results["checks"][5]["text"]
    assert results["not_chosen"] == []
    assert (study.options.output / "table.md").read_text(encoding="utf-8") == study.text


def test_the_study_ends_in_a_table_a_figure_and_a_page(study: Study) -> None:
    assert study.text.count("\n| ") == 4
    assert "97.50 % intervals" in study.text, "two comparisons"
    assert (study.options.output / "effects.png").stat().st_size > 10_000
    page = (study.options.output / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 2 * 12
    assert "non-robust, share 0.3" in page


def test_pictures_are_joined_by_id(study: Study) -> None:
    from robustft.evaluation.instance_report import thumbnail

    page = (study.options.output / "report" / "report.html").read_text(encoding="utf-8")
    split = study.task.splits["train"]
    points = json.loads(page.partition('id="points">')[2].partition("</script>")[0])
    assert len(points) == 40
    for point in points[:5]:
        place = int(np.flatnonzero(split.ids == int(point["id"]))[0])
        assert point["picture"] == thumbnail(split.images[place])
        assert point["label"] == study.task.class_names[split.labels[place]]


def test_a_score_without_a_control_is_not_trusted(script: ModuleType, study: Study) -> None:
    statistics = InstanceStatistics(study.folders[0])
    flags = study_of.checks([statistics], study.base.method.group)
    across = flags[2]
    assert (across.name, across.raised) == ("reliability_across_seeds", True)
    assert math.isnan(across.value)
    assert not group_study.trusted(flags)
