"""Measuring models: clean, robust and corrupted accuracy, intervals, plots and the report."""

from robustft.evaluation.evaluate import SUITES, Evaluation, EvaluationConfig, evaluate

__all__ = ["SUITES", "Evaluation", "EvaluationConfig", "evaluate"]
