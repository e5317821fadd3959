"""The signatures of operators: complete, the same as those of their overloads, and held to as where parameters are written out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_overloads, get_type_hints

import pytest
import torch

import longspan
from longspan import functional

NAMES = [*functional.__all__, "causal_conv1d", "halo", "long_conv1d", "softmax_attention", "token_shift"]
# They take the gates of any operator by name.
WITH_GATES = ("write", "write_normalized", "normalized_linear_attention")
OPERATORS = {name: getattr(longspan, name) for name in NAMES if name not in WITH_GATES}


def names_of(overload: Callable[..., Any]) -> list[str]:
    """The parameters of an overload, the keys of its ``**options`` one by one."""
    names: list[str] = []
    for parameter in inspect.signature(overload, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            names += get_type_hints(*get_args(parameter.annotation))
        else:
            names.append(parameter.name)
    return names


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_signature_has_the_parameters_of_every_overload(operator: str) -> None:
    shown = inspect.signature(OPERATORS[operator]).parameters
    assert inspect.Parameter.VAR_KEYWORD not in {parameter.kind for parameter in shown.values()}
    overloads = get_overloads(OPERATORS[operator])
    assert len(overloads) == 3
    for overload in overloads:
        assert sorted(names_of(overload)) == sorted(shown)


def test_a_signature_shows_each_option_with_its_default() -> None:
    assert str(inspect.signature(longspan.retention)).endswith(
        "*, output_final_state: bool = False, scale: float | None = None, causal: bool = True, "
        "initial_state: torch.Tensor | None = None, layout: longspan.layout.sequence_layout.SequenceLayout | None = None, "
        "exchange: str | longspan.exchange.topology.Exchanger = 'auto', "
        "schedule: Literal['auto', 'fused', 'overlapped'] = 'auto', backend: str | None = None, "
        "chunk_size: int | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
    )
    shown = inspect.signature(longspan.rwkv7).parameters
    assert (shown["scale"].default, shown["exchange"].default) == (1.0, "auto")
    assert list(inspect.signature(longspan.gla).parameters)[:6] == ["q", "k", "v", "g", "u", "output_final_state"]
    assert "causal" not in inspect.signature(longspan.gla).parameters


@pytest.mark.parametrize(("operator", "name"), [("simple_gla", "causal"), ("gla", "cu_seqlens"), ("hgrn2", "scale")])
def test_an_option_of_others_is_refused_as_a_parameter_that_is_not_there(operator: str, name: str) -> None:
    x = torch.full((1, 3, 2, 4), -0.1)
    tensors = {"simple_gla": (x, x, x, x[..., 0]), "gla": (x, x, x, x), "hgrn2": (x, x, x)}[operator]
    with pytest.raises(TypeError, match=rf"^{operator}\(\) got an unexpected keyword argument '{name}'$"):
        OPERATORS[operator](*tensors, **{name: None})
    with pytest.raises(TypeError, match=rf"^{operator}\(\) missing 1 required positional argument"):
        OPERATORS[operator](*tensors[:-1])
