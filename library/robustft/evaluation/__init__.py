"""Measuring models: clean, robust and corrupted accuracy, intervals, plots and the report."""

from robustft.evaluation.evaluate import SUITES, EvaluationConfig, evaluate
from robustft.evaluation.outcome import (
    Evaluation,
    Flag,
    Strip,
    load_evaluation,
    paired_outcomes,
)

__all__ = [
    "SUITES",
    "Evaluation",
    "EvaluationConfig",
    "Flag",
    "Strip",
    "evaluate",
    "load_evaluation",
    "paired_outcomes",
]
