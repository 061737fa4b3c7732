"""Configurations from mappings: what an error names where a field may be of several types."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from robustft.config import from_dict
from robustft.errors import ConfigError, UnknownNameError
from robustft.methods.instance_config import CollectConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float = 1.0
    colour: str = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    width: int = 1
    height: int = 1
    colour: str = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Circle | Box | None = None
    size: Literal["small", "large"] | int | None = None
    points: int | tuple[int, ...] | Mapping[str, int] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # The member whose fields the keys are, wherever it stands.
        ({"shape": {"width": "wide"}}, "shape.width must be a whole number, got 'wide'"),
        ({"shape": {"radius": "wide"}}, "shape.radius: "),
        (
            {"shape": {"width": 1, "hieght": 2}},
            "unknown field 'shape.hieght': did you mean 'shape.height'",
        ),
        ({"shape": {"radios": 2}}, "unknown field 'shape.radios': did you mean 'shape.radius'"),
        # The member of the value's form.
        ({"size": "smal"}, "unknown value of size 'smal': did you mean 'small'"),
        ({"size": 1.5}, "size must be a whole number, got 1.5"),
        ({"points": [1, 2.5]}, "points[1] must be a whole number, got 2.5"),
        ({"points": {"first": 2.5}}, "points.first must be a whole number, got 2.5"),
        ({"points": 2.5}, "points must be a whole number, got 2.5"),
        # Of equally near ones the first.
        ({"shape": 3}, "shape must be a mapping of fields, got 3"),
    ],
)
def test_what_fits_no_type_of_a_field_is_told_by_the_nearest(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(Drawing, values)
    assert message in str(refusal.value)


def test_what_fits_is_taken_in_the_order_of_the_types() -> None:
    assert from_dict(Drawing, {"shape": {"colour": "blue"}}).shape == Circle(colour="blue")
    assert from_dict(Drawing, {"shape": {"height": 2}}).shape == Box(height=2)
    assert from_dict(Drawing, {"shape": None, "size": 3, "points": [1]}).points == (1,)


def test_an_attack_on_patches_is_told_of_its_own_fields() -> None:
    """A union of the project, of attacks on pixels and on patches; "per" tells them apart."""
    with pytest.raises(UnknownNameError, match=r"unknown value of attacks\[0\]\.per 'patches'"):
        from_dict(CollectConfig, {"attacks": [{"per": "patches", "eps": 0.5}]})
    with pytest.raises(UnknownNameError, match=r"unknown field 'attacks\[0\]\.num_step'"):
        from_dict(CollectConfig, {"attacks": [{"num_step": 3}]})
