"""Outcomes of an evaluation: calibration, files, pairs of models, the record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustft.errors import DataError, UnknownNameError
from robustft.evaluation import Evaluation, Flag
from robustft.evaluation.calibration import calibration_error, calibration_interval
from robustft.evaluation.intervals import mcnemar, wilson
from robustft.evaluation.outcome import load_evaluation, paired_outcomes


def example(n: int = 8, **changes: Any) -> Evaluation:
    clean = np.arange(n) != 1
    linf = clean & (np.arange(n) > 2)
    values: dict[str, Any] = {
        "split": "test",
        "masks": {
            "clean": clean,
            "Linf/apgd-ce": linf,
            "L1/apgd-ce": clean & (np.arange(n) < 6),
            "corruption/fog/2": np.array([True, False, True]),
        },
        "ids": np.arange(100, 100 + n),
        "settings": {
            "suite": "standard",
            "task": "toy",
            "eps": {"Linf": 8 / 255, "L1": 12.0},
            "ece_bins": 4,
            "seed": 3,
        },
        "num_forwards": 17,
        "num_backwards": 5,
        "leaky": True,
        "confidence": np.linspace(0.5, 1, n).astype(np.float32),
        "steps": [{"norm": "Linf", "attack": "apgd-ce", "standing": 5, "seconds": 0.25}],
        "flags": [
            Flag(name="dynamic", raised=True, value=1.0, text="autograd inside"),
            Flag(name="square_better", raised=False, value=float("nan"), text="not run"),
        ],
        "curve": [{"norm": "Linf", "factor": 1.0, "eps": 8 / 255, "accuracy": 0.5}],
    }
    return Evaluation(**{**values, **changes})


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.55, 0.6, 0.75, 0.9, 1.0])
    correct = np.array([True, False, True, True, False])
    # Bins of a quarter: (0.5, 0.75] has 3 of mean 0.6333, 2 right; (0.75, 1] 2 of 0.95, 1 right.
    expected = 3 / 5 * abs(2 / 3 - 1.9 / 3) + 2 / 5 * abs(1 / 2 - 0.95)
    assert calibration_error(confidence, correct, num_bins=4) == pytest.approx(expected)
    assert calibration_error(confidence, correct, num_bins=1) == pytest.approx(abs(3 / 5 - 0.76))
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0
    assert calibration_error(np.zeros(3), np.ones(3, bool)) == 1
    with pytest.raises(ValueError, match="equally long"):
        calibration_error(np.ones(3), np.ones(2, bool))


def test_calibration_interval_covers_the_truth() -> None:
    """A model that is always 90 % sure and 70 % right: the error is 0.2, and resampled as such."""
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(40):
        correct = draw.random(300) < 0.7
        confidence = np.full(300, 0.9)
        low, high = calibration_interval(confidence, correct, num_resamples=300, seed=trial)
        assert low < calibration_error(confidence, correct) < high
        hits += low <= 0.2 <= high
    assert hits >= 34
    calibrated = draw.random(2000) * 0.5 + 0.5
    correct = draw.random(2000) < calibrated
    low, high = calibration_interval(calibrated, correct)
    assert low < calibration_error(calibrated, correct) / 2, "noise is no miscalibration"


def test_the_calibration_error_is_no_accuracy() -> None:
    found = example()
    rows = {row["metric"]: row for row in found.rows()}
    assert "ece" not in found.metrics
    assert found.calibration == rows["ece"]["accuracy"]
    assert found.calibration == calibration_error(
        found.confidence,  # type: ignore[arg-type]
        found.masks["clean"],
        num_bins=4,
    )
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds.pop("ece") == "error"
    assert set(kinds.values()) == {"accuracy"}
    assert rows["clean"]["accuracy"] == 7 / 8
    assert (rows["clean"]["low"], rows["clean"]["high"]) == wilson(7, 8)
    assert rows["ece"]["low"] <= rows["ece"]["accuracy"] <= rows["ece"]["high"]
    assert example(confidence=None).calibration is None
    assert "ece" not in {row["metric"] for row in example(confidence=None).rows()}


# --- union ---------------------------------------------------------------------------------------


def test_the_union_needs_two_norms() -> None:
    found = example()
    assert found.outcomes("union").tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert np.array_equal(found.outcomes("union"), found.outcomes("robust"))
    masks = {name: found.masks[name] for name in ("clean", "Linf/apgd-ce")}
    assert "union" not in example(masks=masks).metrics
    only = {"clean": found.masks["clean"], "union/L1/square": found.masks["L1/apgd-ce"]}
    alone = example(masks=only)
    assert alone.metrics["union"] == alone.metrics["robust"] == found.metrics["L1/robust"]
    assert "union/robust" not in alone.metrics


# --- files ---------------------------------------------------------------------------------------


def test_a_saved_evaluation_is_read_back(tmp_path: Path) -> None:
    found = example()
    found.save(tmp_path / "masks.parquet")
    table = pq.read_table(tmp_path / "masks.parquet")
    assert table["id"].to_pylist() == found.ids.tolist()
    assert table["clean"].to_pylist() == found.masks["clean"].tolist()
    assert table["corruption/fog/2"].to_pylist() == [True, False, True, *[None] * 5]
    back = load_evaluation(tmp_path / "masks.parquet")
    assert back.metrics == found.metrics
    assert {name: mask.tolist() for name, mask in back.masks.items()} == {
        name: mask.tolist() for name, mask in found.masks.items()
    }
    assert back.ids.tolist() == found.ids.tolist()
    assert back.calibration == found.calibration
    for field in ("split", "settings", "num_forwards", "num_backwards", "leaky", "steps", "curve"):
        assert getattr(back, field) == getattr(found, field)
    assert repr(back.flags) == repr(found.flags)
    assert back.rows() == found.rows()


def test_files_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.parquet"
    with pytest.raises(DataError, match="holds no saved evaluation"):
        load_evaluation(path)
    path.write_bytes(b"PAR1 it is not")
    with pytest.raises(DataError, match="holds no saved evaluation"):
        load_evaluation(path)
    pq.write_table(pa.table({"id": [1, 2]}), path)
    with pytest.raises(DataError, match="holds no saved evaluation"):
        load_evaluation(path)
    example(ids=np.array([1, 2, 3, 4, 5, 6, 7, 1])).save(path)
    with pytest.raises(DataError, match="lists an example more than once"):
        load_evaluation(path)
    example().save(path)
    table = pq.read_table(path)
    pq.write_table(table.append_column("clean", table["clean"]), path)
    with pytest.raises(DataError, match="each mask once"):
        load_evaluation(path)


# --- two models ----------------------------------------------------------------------------------


def test_two_models_are_compared_on_the_same_examples() -> None:
    one = example()
    order = np.array([5, 3, 0, 7, 1])
    other = example(
        ids=np.append(one.ids[order], 999),
        masks={"clean": np.array([True, False, True, True, True, True])},
    )
    before, after = paired_outcomes(one, other, "clean")
    # By id: 100, 101, 103, 105, 107.
    assert before.tolist() == [True, False, True, True, True]
    assert after.tolist() == [True, True, False, True, True]
    assert mcnemar(before, after)[:2] == (1, 1)
    assert paired_outcomes(one, one, "corruptions")[0].tolist() == [1, 0, 1]
    with pytest.raises(UnknownNameError, match="L1/robust"):
        paired_outcomes(one, other, "L1/robust")
    with pytest.raises(DataError, match="no example of 'clean' in common"):
        paired_outcomes(one, example(ids=one.ids + 100), "clean")


# --- record --------------------------------------------------------------------------------------


def test_the_record_is_json_in_the_manner_of_robustbench() -> None:
    found = example()
    record = json.loads(json.dumps(found.record("my-model", versions={"torch": "2"})))
    assert record["name"] == "my-model"
    assert record["dataset"] == "toy"
    assert record["eps"] == {"Linf": "8/255", "L1": "12"}
    assert record["clean_acc"] == 87.5
    assert record["robust_acc"] == record["autoattack_acc"] == {"Linf": 62.5, "L1": 62.5}
    assert record["union_acc"] == 37.5
    assert record["corruptions_acc"] == 66.67
    assert record["passes"]["forwards"] == 17
    assert record["flags"] == ["dynamic"]
    assert record["versions"] == {"torch": "2"}
    assert (record["num_examples"], record["seed"], record["leaky"]) == (8, 3, True)
    quick = example(settings={**found.settings, "suite": "multinorm"}).record("m")
    assert "autoattack_acc" not in quick
