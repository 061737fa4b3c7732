"""Configurations: frozen dataclasses, with YAML as a thin skin over them.

A configuration is any ``@dataclass(frozen=True, kw_only=True, slots=True)``. The functions here
turn mappings into configurations and back, refuse what they do not know, and name a configuration
by its content. There is no interpolation, no ``eval`` and no import string.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from robustft.errors import ConfigError, UnknownNameError
from robustft.threat import parse_number

__all__ = ["config_hash", "from_dict", "load_yaml", "replaced", "to_dict"]

ConfigT = TypeVar("ConfigT")


def from_dict(cls: type[ConfigT], values: Mapping[str, Any], *, path: str = "") -> ConfigT:
    """Build the dataclass ``cls`` from a mapping, recursively.

    Numbers may be written as fractions ("8/255"), lists stand for tuples, nested mappings for
    nested dataclasses.

    Args:
        cls: a dataclass.
        values: field name -> value.
        path: where ``values`` stands in the whole, for messages ("method.attack").

    Raises:
        UnknownNameError: a key is no field of ``cls``; the nearest field is proposed.
        ConfigError: a value has the wrong type or is out of range, or a field is missing.
    """
    where = f"{path}." if path else ""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping of fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UnknownNameError("field", f"{where}{key}", [f"{where}{name}" for name in fields])
    converted = {
        key: _convert(hints[key], value, path=f"{where}{key}") for key, value in values.items()
    }
    missing = [
        f"{where}{name}"
        for name, field in fields.items()
        if name not in converted
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing field {', '.join(missing)}: give it a value")
    try:
        return cls(**converted)
    except UnknownNameError:
        raise
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path + ': ' if path else ''}{error}") from error


def to_dict(config: Any) -> Any:
    """Return ``config`` as plain dicts, lists and scalars: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def replaced(config: ConfigT, **changes: Any) -> ConfigT:
    """Return ``config`` with those fields changed that are not None: what options left open stays.

    A field that may be None keeps its value; set it with ``dataclasses.replace``.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)  # type: ignore[type-var]


def config_hash(config: Any, *, length: int = 12) -> str:
    """Name a configuration by its content: the first hex digits of a SHA-256 of canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from a file.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of fields, got {type(values).__name__}")
    return values


def _convert(hint: Any, value: Any, *, path: str) -> Any:
    """Convert one YAML value to the annotated type, or raise ConfigError naming the field."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin is typing.Annotated:
        return _convert(arguments[0], value, path=path)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path=path)
    if origin is Literal:
        if value not in arguments:
            raise UnknownNameError(f"value of {path}", str(value), [str(a) for a in arguments])
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, path=path)
    if origin is tuple:
        return _convert_tuple(arguments, value, path=path)
    if origin in (dict, Mapping) or hint in (dict, Mapping) or _is_mapping(origin):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, got {value!r}")
        item = arguments[1] if arguments else Any
        return {str(k): _convert(item, v, path=f"{path}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, path=path)


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _convert_union(options: Sequence[Any], value: Any, *, path: str) -> Any:
    """Convert to the first member that fits, or say what keeps the value from the nearest one."""
    if value is None and type(None) in options:
        return None
    errors: list[tuple[tuple[bool, int], ConfigError]] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, path=path)
        except ConfigError as error:
            errors.append((_nearness(option, value), error))
    # Of equally near ones the first.
    raise max(errors, key=lambda one: one[0])[1]


def _nearness(option: Any, value: Any) -> tuple[bool, int]:
    """Return whether ``value`` has the form of a union's member, and how much of it is known.

    A mapping has the form of dataclasses, and its keys are fields of them or not; a list that of
    tuples, a text that of fixed words, a number that of numbers.
    """
    origin = typing.get_origin(option) or option
    if dataclasses.is_dataclass(option):
        if not isinstance(value, Mapping):
            return False, 0
        names = {field.name for field in dataclasses.fields(option) if field.init}
        return True, sum(1 if key in names else -1 for key in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)), 0
    if _is_mapping(origin):
        return isinstance(value, Mapping), 0
    if isinstance(value, (Mapping, list, tuple)):
        return False, 0
    return True, int(isinstance(value, str) == (origin in (Literal, str, Path)))


def _convert_tuple(arguments: Sequence[Any], value: Any, *, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{path} must be a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(
            _convert(arguments[0], item, path=f"{path}[{i}]") for i, item in enumerate(value)
        )
    if len(arguments) != len(value):
        raise ConfigError(f"{path} must have {len(arguments)} items, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, path=f"{path}[{i}]") for i, (hint, item) in enumerate(pairs))


def _convert_scalar(hint: Any, value: Any, *, path: str) -> Any:
    if hint is float:
        try:
            return parse_number(value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{path} must be a whole number, got {value!r}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{path} must be true or false, got {value!r}")
        return value
    if hint in (str, Path):
        if not isinstance(value, (str, Path)):
            raise ConfigError(f"{path} must be text, got {value!r}")
        return hint(value)
    raise TypeError(f"{path}: configurations cannot hold fields of type {hint!r}")
