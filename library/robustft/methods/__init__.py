"""The methods: one file each, and the dictionary by which everything else finds them."""

from robustft.methods import adversarial, multinorm, rift
from robustft.methods.base import Method, Result

__all__ = ["METHODS", "Method", "Result", "adversarial", "multinorm", "rift"]

METHODS: dict[str, Method] = {
    "at": Method(
        name="at",
        config=adversarial.ATConfig,
        train=adversarial.train_at,
        paper="Madry, Makelov, Schmidt, Tsipras, Vladu, 2018, arXiv 1706.06083",
    ),
    "trades": Method(
        name="trades",
        config=adversarial.TradesConfig,
        train=adversarial.train_trades,
        paper="Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, 2019, arXiv 1901.08573",
    ),
    "rift": Method(
        name="rift",
        config=rift.RiftConfig,
        train=rift.train,
        paper="Zhu, Hu, Wang, Xie, Yang, 2023, arXiv 2308.02533",
        prepare=rift.prepare,
        prepare_fields=rift.PREPARE_FIELDS,
        metrics=("val/clean", "val/robust", "val/start_clean", "val/start_robust", "movement"),
        needs_start=True,
    ),
    "multinorm": Method(
        name="multinorm",
        config=multinorm.MultiNormConfig,
        train=multinorm.train,
        paper="Croce, Hein, 2022, arXiv 2105.12508",
        metrics=("val/clean", "val/robust", "val/union", "passes/forwards", "passes/backwards"),
    ),
}
"""Every method by its name on the command line and in presets."""
