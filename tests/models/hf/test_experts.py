"""The Hugging Face classes with experts: auxiliary losses where they are trained, on ranks those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from longspan import parallelize, sum_gradients
from longspan.errors import InputError
from longspan.models.hf import LinearLlamaForCausalLM
from tests.compare import relative_error, worst
from tests.models.hf.test_over_ranks import cases
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks

EXPERTS: dict[str, Any] = {"num_layers": 2, "pattern": "LN", "num_experts": 4, "balance_loss_weight": 0.3}


def model_of() -> LinearLlamaForCausalLM:
    return LinearLlamaForCausalLM.of(tiny_model(**EXPERTS))


def test_auxiliary_losses_are_trained_and_not_evaluated(tmp_path: Path) -> None:
    model, tokens = model_of(), random_tokens(2, 20)
    trained = model.train()(tokens, labels=tokens)
    evaluated = model.eval()(tokens, labels=tokens)
    cross_entropy = F.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert relative_error(evaluated.loss, cross_entropy) < 1e-12
    # Two layers of a balance of about 1.
    assert 0.5 < float((trained.loss - evaluated.loss).detach()) < 1.5
    model.save_pretrained(tmp_path)
    loaded = LinearLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    # Weights lie in the file's memory, at any address, and a product's bits are those of another only where both are aligned alike.
    loaded.load_state_dict({name: weight.clone() for name, weight in loaded.state_dict().items()}, assign=True)
    assert torch.equal(loaded(tokens).logits, evaluated.logits)


def test_a_head_that_would_leave_the_losses_of_routers_out_is_refused() -> None:
    model, tokens = model_of().train(), random_tokens(1, 9)
    model.model.head = nn.Sequential(model.model.head)
    with pytest.raises(InputError, match="the head is a Sequential, and the model has experts"):
        model(tokens, labels=tokens)
    assert torch.isfinite(model.eval()(tokens, labels=tokens).loss)


def differences(checkpointing: bool) -> list[float]:
    errors = []
    for given in cases().values():
        alone, model = model_of().train(), parallelize(model_of().train(), None)
        if checkpointing:
            model.activation_checkpointing_enable()
        want = alone(**given).loss
        want.backward()
        loss = model(**given).loss
        loss.backward()
        sum_gradients(model)
        total = loss.detach().clone()
        dist.all_reduce(total)
        errors.append(relative_error(total, want))
        for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
            assert parameter.grad is not None and expected.grad is not None
            errors.append(relative_error(parameter.grad, expected.grad))
    return errors


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_one_process(checkpointing: bool) -> None:
    assert worst(error for errors in run_on_ranks(2, differences, checkpointing) for error in errors) < 1e-11
