"""The table of mixers against the installed Transformers: what was renamed there is seen here, and not in training."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest
import transformers.models
from torch import nn

from longspan.errors import InputError
from longspan.integrations.transformers import functions, mixers
from longspan.integrations.transformers.mixers import MIXERS, MixerClass

STAND_INS = functions.FUNCTIONS


def modeling_files() -> list[str]:
    names = []
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.modeling_{package.name}"
        if importlib.util.find_spec(name) is not None:
            names.append(name)
    return names


def file_of(class_name: str) -> str:
    """The modeling file that defines a class, by its text: importing all of them takes minutes."""
    for name in modeling_files():
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        with open(spec.origin, encoding="utf-8") as file:
            if f"class {class_name}(" in file.read():
                return name
    raise AssertionError(f"no modeling file of Transformers {transformers.__version__} defines {class_name}")


FILES = {name: file_of(name) for name in MIXERS}


@pytest.mark.parametrize("name", MIXERS)
def test_each_class_calls_what_the_table_says(name: str) -> None:
    module = importlib.import_module(FILES[name])
    source = inspect.getsource(getattr(module, name))
    kind: MixerClass = MIXERS[name]
    for function in kind.calls:
        if function in STAND_INS and not kind.methods:
            assert hasattr(module, function), f"{FILES[name]} has no {function}"
            assert f"{function}(" in source, f"{name} does not call {function}"
    for path in kind.methods:
        assert path.split(".")[0] in source


@pytest.mark.parametrize("name", MIXERS)
def test_each_stand_in_takes_what_it_is_called_with(name: str) -> None:
    module = importlib.import_module(FILES[name])
    for function, stand_in in STAND_INS.items():
        original = getattr(module, function, None)
        if original is None or stand_in is functions.not_fused:
            continue
        theirs = list(inspect.signature(inspect.unwrap(original)).parameters.values())
        ours = list(inspect.signature(stand_in).parameters)[1:]
        if ours == ["args", "kwargs"]:
            ours = list(inspect.signature(functions._delta_rule).parameters)[2:]
        positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
        shared = [n for n in positional if n in ours]
        # A prefix of the positional arguments, in their order: those behind are options of one kernel.
        assert shared == [n for n in ours if n in positional], (
            f"{function} of {name} has its arguments in another order"
        )
        required = [p.name for p in theirs if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        assert set(required) <= set(ours), f"{function} of {name} needs {set(required) - set(ours)}"


NOT_OVER_RANKS = {"BltSelfAttention", "BltCrossAttention", "DogeAttention"}
"""Attention of models that are refused: by what is inside of it, or by the mask that it makes."""


def test_windows_of_masks_are_told_to_the_attention_function() -> None:
    """A mask is never built: a window that is in the mask alone would be lost, and a full layer would be taken for it."""
    silent = set()
    for name in modeling_files():
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        with open(spec.origin, encoding="utf-8") as file:
            text = file.read()
        if "create_sliding_window_causal_mask" not in text or "ForCausalLM(" not in text:
            continue
        for source in re.split(r"^class ", text, flags=re.MULTILINE):
            calls = source.partition("= attention_interface(")[2]
            class_name = source.partition("(")[0]
            if calls and "sliding_window=" not in calls and not re.search("Vision|Audio", class_name):
                silent.add(class_name)
    assert silent - NOT_OVER_RANKS == mixers.WINDOWS_OF_MASKS


def fake(class_name: str) -> nn.Module:
    module = type(class_name, (nn.Module,), {})()
    assert isinstance(module, nn.Module)
    return module


@pytest.mark.parametrize(
    "class_name",
    ["Rwkv7TimeMix", "ZayaDynamicConv1d", "NewLinearAttentionCore", "FooMamba3Mixer", "BarDeltaNet", "Indexer"],
)
def test_what_is_not_known_and_may_mix_tokens_is_refused(class_name: str) -> None:
    backbone = nn.Module()
    backbone.layer = fake(class_name)
    if class_name.endswith("Conv1d"):
        backbone.layer = nn.Conv1d(4, 4, 3)
    with pytest.raises(InputError, match=r"does not know how the layer 'layer'.*register_adapter"):
        mixers.mixers_of(backbone)


def test_a_model_without_mixers_is_refused() -> None:
    with pytest.raises(InputError, match="no layer that mixes tokens"):
        mixers.mixers_of(nn.Sequential(nn.Linear(3, 3)))


def test_an_unknown_layer_type_is_refused() -> None:
    backbone = nn.Module()
    backbone.config = type("Config", (), {"layer_types": ["full_attention", "indexed_attention"]})()
    with pytest.raises(InputError, match="indexed_attention"):
        mixers.mixers_of(backbone)
