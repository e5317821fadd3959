"""Several models in one process, some parallel and some not, do not disturb each other; what was replaced is put back."""

from __future__ import annotations

import copy
import gc
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longspan
from longspan.errors import InputError
from longspan.integrations.transformers import layout_of
from tests.compare import relative_error
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PLAIN, Wide
from tests.ranks import run_on_ranks

FILE = "transformers.models.qwen3_next.modeling_qwen3_next"
NAMES = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule", "load_balancing_loss_func")


def functions_of_file() -> list[Any]:
    return [getattr(sys.modules[FILE], name) for name in NAMES]


def logits_of(model: nn.Module, **given: Any) -> Tensor:
    with Wide(), torch.no_grad():
        logits: Tensor = model(input_ids=PLAIN.ids, use_cache=False, **given).logits
    return logits


def whole(model: nn.Module) -> Tensor:
    """Logits of all ranks of a parallelized model."""
    logits = logits_of(model)
    return layout_of(model).gather(logits)


def forget_models_of_earlier_tests() -> None:
    """What they replaced is put back once they are gone."""
    gc.collect()


def two_models_of_one_class(first: bool) -> None:
    """Both parallel; one is undone, in either order; a third never was."""
    forget_models_of_earlier_tests()
    models = [build("qwen3_next") for _ in range(2)]
    plain = build("qwen3_next")
    want = logits_of(plain)
    before = functions_of_file()
    for model in models:
        longspan.parallelize(model, None)
    assert torch.equal(logits_of(plain), want)
    undone, left = models if first else reversed(models)
    longspan.unparallelize(undone)
    assert torch.equal(logits_of(undone), want)
    assert relative_error(whole(left), want) < 1e-12
    assert functions_of_file() != before
    longspan.unparallelize(left)
    assert functions_of_file() == before
    assert torch.equal(logits_of(left), want)


@pytest.mark.parametrize("first", [True, False])
def test_two_models_of_one_class_are_undone_in_either_order(first: bool) -> None:
    run_on_ranks(2, two_models_of_one_class, first)


def test_what_is_replaced_is_put_back_once_no_model_needs_it() -> None:
    forget_models_of_earlier_tests()
    model = build("qwen3_next")
    before = functions_of_file()
    longspan.parallelize(model, None)
    assert all(old is not new for old, new in zip(before, functions_of_file(), strict=True))
    del model
    gc.collect()
    assert functions_of_file() == before


def test_nothing_of_a_model_is_left_over() -> None:
    model = build("recurrent_gemma")
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    keys, config = list(model.state_dict()), model.config.to_dict()  # type: ignore[union-attr, operator]
    longspan.parallelize(model, None)
    assert list(model.state_dict()) == keys
    longspan.unparallelize(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()) == hooks
    assert model.config.to_dict() == config  # type: ignore[union-attr, operator]


def test_what_was_set_on_instances_before_is_there_again() -> None:
    """A method that another library has put on a mixer, and an attention implementation of one layer."""
    model: Any = build("minimax")
    mixer = next(module for module in model.modules() if type(module).__name__ == "MiniMaxLightningAttention")
    layer = next(module for module in model.modules() if type(module).__name__ == "MiniMaxAttention")
    model.set_attn_implementation("eager")
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = "sdpa"
    forward = mixer.forward
    mixer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    set_by_others = mixer.forward
    want = logits_of(model)
    longspan.parallelize(model, None)
    assert relative_error(logits_of(model), want) < 1e-12
    longspan.unparallelize(copy.deepcopy(model))
    assert mixer.forward is not set_by_others
    longspan.unparallelize(model)
    assert mixer.forward is set_by_others
    assert (layer.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "eager")
    assert torch.equal(logits_of(model), want)


def made_from_one_config() -> None:
    import transformers

    first = build("llama")
    second = transformers.LlamaForCausalLM(first.config).double()
    second.load_state_dict(first.state_dict())
    want = logits_of(second)
    longspan.parallelize(first, None)
    assert torch.equal(logits_of(second), want)
    third = transformers.LlamaForCausalLM(second.config)
    assert third.config._attn_implementation != "longspan"


def test_another_model_of_the_same_config_is_left_alone() -> None:
    run_on_ranks(2, made_from_one_config)


def copied(name: str) -> None:
    model = longspan.parallelize(build(name), None)
    want = whole(model)
    copy_of = copy.deepcopy(model)
    assert torch.equal(whole(copy_of), want)
    with torch.no_grad():
        for parameter in copy_of.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(whole(copy_of), want)
    assert torch.equal(whole(model), want)
    plain = logits_of(longspan.unparallelize(copy.deepcopy(model)))
    assert relative_error(plain, want) < 1e-12
    assert torch.equal(whole(model), want)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(jamba|minimax)$")
@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "minimax", "recurrent_gemma"])
def test_a_copy_is_parallel_too_and_a_model_of_its_own(name: str) -> None:
    run_on_ranks(2, copied, name)


def test_a_parallelized_model_is_saved_as_it_was(tmp_path: Any) -> None:
    import transformers

    model = build("llama")
    longspan.parallelize(model, None)
    with pytest.raises(InputError, match=r"state_dict\(\)"):
        torch.save(model, io.BytesIO())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config._attn_implementation != "longspan"
    longspan.unparallelize(model)
    # Frequencies of rotary embeddings are float32 in what was loaded.
    assert relative_error(logits_of(again), logits_of(model)) < 1e-6


def test_twice_is_refused_and_so_is_undoing_nothing() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="not parallelized"):
        longspan.unparallelize(model)
    longspan.parallelize(model, None)
    with pytest.raises(InputError, match="already"):
        longspan.parallelize(model, None)
    longspan.unparallelize(model)
    longspan.parallelize(model, None)


def test_a_model_without_a_head_is_its_own_backbone() -> None:
    model = build("llama").model
    assert isinstance(model, nn.Module)
    with Wide(), torch.no_grad():
        want = model(input_ids=PLAIN.ids, use_cache=False).last_hidden_state
        longspan.parallelize(model, None)
        assert relative_error(model(input_ids=PLAIN.ids).last_hidden_state, want) < 1e-12


def wrapped_and_undone() -> None:
    """Parallelized inside of what wraps it, and undone from outside, and the other way round."""
    inner = build("llama")
    want = logits_of(inner)
    wrapper = torch.compile(inner, backend="eager")
    assert isinstance(wrapper, nn.Module)
    longspan.parallelize(wrapper, None)
    assert relative_error(whole(inner), want) < 1e-12
    longspan.unparallelize(inner)
    assert torch.equal(logits_of(inner), want)
    longspan.parallelize(inner, None)
    longspan.unparallelize(wrapper)
    assert torch.equal(logits_of(inner), want)


def test_a_model_is_found_inside_of_what_wraps_it() -> None:
    run_on_ranks(2, wrapped_and_undone)
