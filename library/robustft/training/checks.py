"""Checks of configuration fields; every message names field, value and allowed range."""

import math
from typing import Any, get_args

from robustft.errors import ConfigError, UnknownNameError

__all__ = ["require_at_least", "require_choice", "require_range"]


def require_at_least(config: Any, lowest: int, *fields: str) -> None:
    """Raise ConfigError unless every named field is a whole number >= ``lowest``."""
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ConfigError(f"{field} = {value!r}: must be a whole number >= {lowest}")


def require_range(
    config: Any,
    low: float,
    high: float,
    *fields: str,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise ConfigError unless every named field is a finite number from ``low`` to ``high``.

    Args:
        config: the dataclass.
        low, high: the range; an infinite ``high`` means no upper limit.
        fields: names of the fields.
        open_low, open_high: whether the limit itself is excluded.
    """
    for field in fields:
        value = getattr(config, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = (
            number
            and math.isfinite(value)
            and (low < value if open_low else low <= value)
            and (value < high if open_high else value <= high)
        )
        if not inside:
            left = f"> {low:g}" if open_low else f">= {low:g}"
            right = f"< {high:g}" if open_high else f"<= {high:g}"
            limits = left if math.isinf(high) else f"{left} and {right}"
            raise ConfigError(f"{field} = {value!r}: must be a number {limits}")


def require_choice(config: Any, field: str, literal: Any) -> None:
    """Raise UnknownNameError unless the field holds one of the values of the Literal type."""
    value = getattr(config, field)
    if value not in get_args(literal):
        raise UnknownNameError(f"value of {field}", str(value), map(str, get_args(literal)))
