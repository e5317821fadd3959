"""The keys of a config as options of the command line, and the nearest key to one that is none."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from longspan.errors import ConfigError
from longspan.models import PRESETS
from longspan.train.config.model import PRESET, ModelConfig
from longspan.train.config.whole import Config, known_keys, section_names

_FORMER_KEYS = {
    "parallel.dp": "data-parallel ranks either hold copies of the weights, parallel.dp_replicate, or share one, parallel.dp_shard"
}


def check_arguments(arguments: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise ConfigError for an option that is neither a key nor one of `others`."""
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        name = argument[2:].split("=", 1)[0].replace("-", "_")
        if name not in {*known_keys(), *others}:
            raise unknown_key(name, others, option=True)


def take_preset(arguments: Sequence[str], config: Config) -> tuple[list[str], Config]:
    """Split off ``--model.preset NAME``: (the other arguments, the config with the model of that name, for these to change).

    Raises:
        ConfigError: for a preset that does not exist, or none.
    """
    option, remaining = f"--model.{PRESET}", list(arguments)
    for place, argument in enumerate(remaining):
        name, equals, value = argument.partition("=")
        if name == option:
            if not equals and place + 1 == len(remaining):
                raise ConfigError(f"{option} needs a name: {option} {next(iter(PRESETS))}")
            model = ModelConfig.of_preset(value if equals else remaining[place + 1])
            del remaining[place : place + (1 if equals else 2)]
            return take_preset(remaining, dataclasses.replace(config, model=model))
    return remaining, config


def unknown_key(key: str, others: Sequence[str] = (), option: bool = False) -> ConfigError:
    """The error for a key that does not exist; it names the nearest one that does."""
    keys = [*known_keys(), f"model.{PRESET}"]
    sections = section_names()
    dash = "--" if option else ""
    if key in _FORMER_KEYS:
        return ConfigError(f"{dash}{key} is no {'option' if option else 'key'} any more: {_FORMER_KEYS[key]}")
    near = difflib.get_close_matches(key, [*keys, *others], n=1, cutoff=0.6)
    if not near:
        # A right name in a wrong section, or without one.
        last = key.rsplit(".", 1)[-1]
        last_names = {name.split(".")[1]: name for name in reversed(keys)}
        near = [last_names[name] for name in difflib.get_close_matches(last, list(last_names), n=1, cutoff=0.7)]
    hint = f"did you mean {dash}{near[0]}?" if near else f"the sections are {', '.join(sections)}"
    return ConfigError(f"unknown {'option' if option else 'key'} {dash}{key}: {hint} (longspan train --help lists all)")
