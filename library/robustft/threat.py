"""Threat models: a norm and a radius in [0, 1] pixel units."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal, get_args

from robustft.errors import ConfigError, UnknownNameError

__all__ = ["NORMS", "Norm", "ThreatModel", "parse_number"]

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def parse_number(value: float | int | str) -> float:
    """Return ``value`` as a float; strings may be fractions such as ``"8/255"``.

    Raises:
        ConfigError: if the text is neither a number nor a fraction.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"expected a number or a fraction such as '8/255', got {value!r}")
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            if slash:
                return float(Fraction(numerator.strip()) / Fraction(denominator.strip()))
            return float(value)
        except (ValueError, ZeroDivisionError):
            message = f"expected a number or a fraction such as '8/255', got {value!r}"
            raise ConfigError(message) from None
    return float(value)


@dataclasses.dataclass(frozen=True, slots=True)
class ThreatModel:
    """All inputs x' with ``||x' - x||_norm <= eps`` that stay in the box [0, 1].

    A union of several norms is a tuple of threat models.

    Args:
        norm: "Linf", "L2" or "L1".
        eps: radius in [0, 1] pixel units, >= 0; at most 1 for Linf. A string such as "8/255" is
            accepted and converted.

    Example:
        >>> ThreatModel("Linf", "8/255")
        ThreatModel(norm='Linf', eps=0.03137254901960784)
        >>> str(ThreatModel("Linf", "8/255"))
        'Linf 8/255'
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UnknownNameError("norm", str(self.norm), NORMS)
        eps = parse_number(self.eps)
        largest = 1.0 if self.norm == "Linf" else math.inf
        if not (math.isfinite(eps) and 0 <= eps <= largest):
            limit = "0 to 1 for Linf" if self.norm == "Linf" else "a finite number >= 0"
            raise ConfigError(
                f"eps = {self.eps!r} is out of range: it is a radius in [0, 1] pixel units "
                f"({limit}); write 8/255, not 8"
            )
        object.__setattr__(self, "eps", eps)

    def __str__(self) -> str:
        in_grey_levels = self.eps * 255
        if self.norm == "Linf" and abs(in_grey_levels - round(in_grey_levels)) < 1e-9:
            return f"{self.norm} {round(in_grey_levels)}/255"
        return f"{self.norm} {self.eps:g}"
