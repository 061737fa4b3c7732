"""tyro as the command line uses it: numbers as in YAML, and one sentence instead of a box."""

import contextlib
import io
import itertools
import re
from typing import Any

import tyro

from robustft.errors import ConfigError
from robustft.threat import parse_number

__all__ = ["parse"]

RULERS = "+- \u2500\u256d\u256e\u2570\u256f"
"""What the lines and corners of tyro's boxes are made of."""

NUMBERS = tyro.constructors.ConstructorRegistry()


@NUMBERS.primitive_rule
def _fractions(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    """Read floats as YAML presets do: "8/255" is a number."""
    if info.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: parse_number(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [f"{value:g}"],
    )


def parse(described: Any, words: list[str], **options: Any) -> Any:
    """Parse ``words``; ``--help`` ends the process.

    Raises:
        ConfigError: with one sentence, where tyro draws a box on standard error.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                described, args=words, registry=NUMBERS, use_underscores=True, **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _refusal(stop, box.getvalue()) from None


def _refusal(stop: SystemExit, box: str) -> ConfigError:
    """Return tyro's complaint: the error behind it if it is ours, else the text in the box."""
    error: BaseException | None = stop
    where: object = ""
    while error is not None and isinstance(where, str):
        if isinstance(error, ConfigError):
            named = not where or where in str(error)
            return error if named else ConfigError(f"{where}: {error}")
        # tyro's own error knows the dataclass that it was building when ours was raised. Where it
        # names an option instead, the box says that best.
        where = getattr(error, "arg", where)
        if isinstance(where, str):
            where = where.removeprefix("experiment").lstrip(".")
        error = error.__context__
    # A title, then paragraphs between rulers; drawn in ASCII where the terminal has no better.
    lines = [line.strip(" |\u2502") for line in box.splitlines()]
    ruled = [line if line.strip(RULERS) else "" for line in lines[1:]]
    paragraphs = [list(group) for full, group in itertools.groupby(ruled, key=bool) if full]
    first = " ".join(paragraphs[0] if paragraphs else lines).removeprefix("Error parsing ")
    text = re.sub(r"\s+([.,])(?=\s|$)", r"\1", first).rstrip(".")
    options = [line.split()[0].rstrip(",") for line in ruled if line.startswith("--")]
    hint = f"; did you mean {options[0]}?" if options and "Unrecognized" in text else ""
    return ConfigError(f"{text[:1].lower()}{text[1:]}{hint} (--help lists the options)")
