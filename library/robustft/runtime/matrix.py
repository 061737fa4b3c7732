"""The support matrix: which method runs where, as the registry and the engines' refusals say.

Run as a module, it writes the tables into README.md and docs/engines.md of the working directory::

    python -m robustft.runtime.matrix

tests/runtime/test_matrix.py runs every cell that says yes and reads the sentence of every other.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from robustft.errors import ConfigError
from robustft.methods import METHODS
from robustft.runtime.deepspeed_engine import why_not
from robustft.runtime.engines import why_not_options
from robustft.training.engine_options import EngineOptions

__all__ = ["OPTIONS", "PLACES", "UNTESTED", "Cell", "matrix", "rewrite", "table"]

UNTESTED = "untested"
STAGES = (0, 1, 2, 3)
ZERO = {stage: f"ZeRO {stage}" for stage in STAGES}
PLACES = ("one process", "DDP", *ZERO.values(), "several nodes", "resume", "search")
"""Where a method may run: the columns of the first table."""
OPTIONS: Mapping[str, EngineOptions] = {
    "bf16": EngineOptions(precision="bf16"),
    "accumulate": EngineOptions(accumulate=2),
    "checkpoint_activations": EngineOptions(checkpoint_activations=True),
    "compile": EngineOptions(compile=True),
    "sync_bn": EngineOptions(sync_bn=True),
}
"""An engine's options: the columns of the second table."""
ON_NODES = ("rft",)
"""Methods of which two workers were seen to train the same on two nodes as on one."""
COMPILED = ("at",)
"""Methods that were seen to train the same compiled."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {"rose": {"variant": "second"}}
"""Methods with a second row -> the fields by which it differs from the defaults."""
BEGIN, END = "<!-- support matrix: {} -->", "<!-- end of support matrix -->"
FILES = {"README.md": "short", "docs/engines.md": "full"}


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """Whether a method runs somewhere.

    Args:
        answer: "yes", "no" or UNTESTED.
        reason: the sentence with which it is refused; empty unless the answer is no.
    """

    answer: str
    reason: str = ""


def configs() -> Iterator[tuple[str, str, Any]]:
    """Yield (label of the row, name of the method, config) for every row."""
    for name, method in METHODS.items():
        yield name, name, method.config()
        if name in VARIANTS:
            fields = VARIANTS[name]
            label = ", ".join([name, *(f"{key} {value}" for key, value in fields.items())])
            yield label, name, method.config(**fields)


def matrix() -> dict[str, dict[str, Cell]]:
    """Return row -> column (of PLACES and OPTIONS) -> cell, for the methods' default configs."""
    return {label: _cells(name, config) for label, name, config in configs()}


def _cells(name: str, config: Any) -> dict[str, Cell]:
    cells = dict.fromkeys(PLACES, Cell("yes"))
    for stage, column in ZERO.items():
        cells[column] = _answer(why_not(config, stage))
    if name not in ON_NODES:
        cells["several nodes"] = Cell(UNTESTED)
    for column, options in OPTIONS.items():
        cells[column] = _answer(why_not_options(config, options))
    for column in ("sync_bn", *(() if name in COMPILED else ("compile",))):
        if cells[column].answer == "yes":
            cells[column] = Cell(UNTESTED)
    return cells


def _answer(reason: str | None) -> Cell:
    return Cell("yes") if reason is None else Cell("no", reason)


def table(kind: str) -> str:
    """Return the matrix as Markdown: "short" is the first table, "full" both with the reasons."""
    if kind == "short":
        return _markdown(PLACES, None)
    notes: dict[str, int] = {}
    tables = [_markdown(PLACES, notes), _markdown(tuple(OPTIONS), notes)]
    sentences = [f"{number}. {reason}." for reason, number in notes.items()]
    return "\n\n".join([*tables, "\n".join(sentences)])


def _markdown(columns: tuple[str, ...], notes: dict[str, int] | None) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, cells in matrix().items():
        words = []
        for column in columns:
            cell = cells[column]
            number = ""
            if cell.reason and notes is not None:
                number = f" ({notes.setdefault(cell.reason, len(notes) + 1)})"
            words.append(cell.answer + number)
        name, *rest = label.split(", ")
        words.insert(0, ", ".join([f"`{name}`", *rest]))
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def rewrite(text: str, kind: str) -> str:
    """Return a file's text with the table between its two marks made anew.

    Raises:
        ConfigError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN.format(kind))
    _, end, after = rest.partition(END)
    if not end:
        raise ConfigError(
            f"the text has no place for the support matrix: add the lines {BEGIN.format(kind)} "
            f"and {END}"
        )
    return f"{before}{begin}\n{table(kind)}\n{end}{after}"


def main() -> None:
    """Write the tables into the files of the working directory."""
    for name, kind in FILES.items():
        path = Path(name)
        path.write_text(rewrite(path.read_text(encoding="utf-8"), kind), encoding="utf-8")


if __name__ == "__main__":
    main()
