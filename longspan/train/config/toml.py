"""A config as mappings of sections, and as a TOML file."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from longspan.errors import ConfigError
from longspan.train.config.keys import unknown_key
from longspan.train.config.model import PRESET, ModelConfig
from longspan.train.config.whole import Config, flatten, section_names


def read_toml(path: Path) -> Config:
    """The defaults, overridden by a TOML file.

    Raises:
        ConfigError: if the file cannot be read, or has an unknown key or a value of a wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}. Give a TOML file") from error
    try:
        return from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_mapping(values: dict[str, Any]) -> Config:
    """The defaults, overridden by ``{section: {key: value}}``, as TOML and JSON give it.

    Raises:
        ConfigError: for an unknown key or a value of a wrong type.
    """
    config = Config()
    for section, entries in values.items():
        if section not in section_names():
            raise unknown_key(section)
        if not isinstance(entries, dict):
            raise ConfigError(f"{section} is {entries!r}; it is a section of keys: [{section}]")
        current = getattr(config, section)
        if section == "model" and PRESET in entries:
            current = ModelConfig.of_preset(_check_type(f"model.{PRESET}", entries[PRESET], str))
            entries = {key: value for key, value in entries.items() if key != PRESET}
        kinds = typing.get_type_hints(type(current))
        for key in entries:
            if key not in kinds:
                raise unknown_key(f"{section}.{key}")
        checked = {key: _check_type(f"{section}.{key}", value, kinds[key]) for key, value in entries.items()}
        config = dataclasses.replace(config, **{section: dataclasses.replace(current, **checked)})
    return config


def to_mapping(config: Config) -> dict[str, Any]:
    """``{section: {key: value}}`` with lists for tuples: what `from_mapping` takes; a value of None is left out."""
    mapping: dict[str, Any] = {name: {} for name in section_names()}
    for key, value in flatten(config).items():
        section, name = key.split(".")
        if value is not None:
            mapping[section][name] = list(value) if isinstance(value, tuple) else value
    return mapping


def to_toml(config: Config) -> str:
    """The config as TOML that `read_toml` gives back."""
    lines = []
    for section, entries in to_mapping(config).items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in entries.items()), ""]
    return "\n".join(lines)


def _check_type(key: str, value: Any, kind: Any) -> Any:
    """`value` as TOML gives it, as the type that the dataclass declares."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(kind)))}")
    if typing.get_origin(kind) is tuple:
        value = [value] if isinstance(value, str) else value
        (entry_kind, _) = typing.get_args(kind)
        if entry_kind is float:
            if isinstance(value, list) and all(type(entry) in (int, float) for entry in value):
                return tuple(_as_float(key, entry) if type(entry) is int else entry for entry in value)
            raise ConfigError(f"{key} is {value!r}; it must be a list of numbers")
        if typing.get_origin(entry_kind) in (types.UnionType, typing.Union):
            return tuple(_word_or_number(key, entry, entry_kind) for entry in _as_list(value))
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise ConfigError(f"{key} is {value!r}; it must be a string or a list of strings")
    if kind is float and type(value) is int:
        value = _as_float(key, value)
    if type(value) is not kind:
        raise ConfigError(f"{key} is {value!r}, {_article(type(value).__name__)}; it must be {_article(kind.__name__)}")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _word_or_number(key: str, entry: Any, kind: Any) -> str | float:
    """An entry of a list of words, which the type names, or numbers, whole ones where it says so."""
    words = next(typing.get_args(part) for part in typing.get_args(kind) if typing.get_origin(part) is Literal)
    number = next(part for part in typing.get_args(kind) if typing.get_origin(part) is not Literal)
    if type(entry) is int and number is float:
        return _as_float(key, entry)
    if type(entry) is not number and entry not in words:
        numbers = "numbers" if number is float else "whole numbers"
        raise ConfigError(
            f"{key} has {entry!r}; it must be one of {', '.join(map(repr, words))}, or a list of {numbers}"
        )
    return typing.cast(str | float, entry)


def _as_float(key: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{key} has {len(str(value))} digits; it must be a finite number") from error


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
