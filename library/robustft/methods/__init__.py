"""The methods: one file each, and the dictionary by which everything else finds them."""

from typing import Any

from robustft.errors import ConfigError
from robustft.methods import (
    adversarial,
    autolora,
    instances,
    multinorm,
    natural,
    rift,
    rose,
    text_instances,
    twins,
    vanilla,
)
from robustft.methods.base import Method, Result

__all__ = [
    "METHODS",
    "Method",
    "Result",
    "adversarial",
    "autolora",
    "instances",
    "method_name",
    "multinorm",
    "natural",
    "rift",
    "rose",
    "text_instances",
    "twins",
    "vanilla",
]

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
    "rose": Method(
        name="rose",
        config=rose.RoseConfig,
        train=rose.train,
        paper="Jiang, Zhou, Lin, Li, Zhou, Jiang, EMNLP 2022, arXiv 2210.09658",
        metrics=("val/clean", "passes/forwards", "passes/backwards"),
        kinds=("text",),
    ),
    "instances": Method(
        name="instances",
        config=instances.InstancesConfig,
        train=instances.train,
        paper="Characterizing the Impacts of Instances on Robustness, Findings of ACL 2023",
        metrics=("val/clean", "val/robust", "val/loss", "updates"),
    ),
    "text-instances": Method(
        name="text-instances",
        config=text_instances.TextInstancesConfig,
        train=text_instances.train,
        paper="Characterizing the Impacts of Instances on Robustness, Findings of ACL 2023",
        metrics=("val/clean", "val/robust", "val/loss", "updates"),
        kinds=("text",),
    ),
    "autolora": Method(
        name="autolora",
        config=autolora.AutoLoraConfig,
        train=autolora.train,
        paper="Xu, Zhang, Kankanhalli, 2024, arXiv 2310.01818",
        metrics=("val/clean", "val/robust", "passes/forwards", "passes/backwards"),
        needs_start=True,
    ),
    "fine-tune": Method(
        name="fine-tune",
        config=natural.NaturalConfig,
        train=natural.train,
        paper="LP-FT: Kumar et al., 2022, arXiv 2202.10054; WiSE-FT: Wortsman et al., 2022, "
        "arXiv 2109.01903",
        metrics=("val/clean", "val/robust", "passes/forwards", "passes/backwards"),
        needs_start=True,
    ),
    "rft": Method(
        name="rft",
        config=vanilla.RftConfig,
        train=vanilla.train,
        paper="Shafahi et al., 2020, arXiv 1905.08232",
        metrics=("val/clean", "val/robust", "passes/forwards", "passes/backwards"),
        needs_start=True,
    ),
    "twins": Method(
        name="twins",
        config=twins.TwinsConfig,
        train=twins.train,
        paper="Liu, Xu, Ji, Chan, 2023, arXiv 2303.11135",
        metrics=("val/clean", "val/robust", "passes/forwards", "passes/backwards"),
        needs_start=True,
    ),
}
"""Every method by its name on the command line and in presets."""


def method_name(config: Any) -> str:
    """Return the key in METHODS whose config class is that of ``config``."""
    for name, method in METHODS.items():
        if type(config) is method.config:
            return name
    raise ConfigError(f"{type(config).__name__} is no method's config; methods: {sorted(METHODS)}")
