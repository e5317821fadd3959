"""`longspan.parallelize` on the Hugging Face classes: whole sequences in, a rank's share out, and one prompt read by all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan import parallelize, prefill, sum_gradients, unparallelize
from longspan.errors import InputError
from longspan.integrations.transformers.structure import check_model
from tests.compare import relative_error, worst
from tests.models.hf.tiny import KINDS, padded, tiny_hf
from tests.models.tiny import random_tokens
from tests.ranks import raised, run_on_ranks


def cases() -> dict[str, dict[str, Any]]:
    tokens = random_tokens(2, 41)
    sides = {side: padded([41, 13, 5], side, width=43) for side in ("left", "right")}
    documents = torch.cat([torch.arange(20), torch.arange(1), torch.arange(20)])[None]
    return {
        "rows": {"input_ids": tokens, "labels": tokens},
        **{
            f"padded on the {side}": {
                "input_ids": rows,
                "attention_mask": mask,
                "labels": rows.masked_fill(mask == 0, -100),
            }
            for side, (rows, mask, _) in sides.items()
        },
        "packed": {"input_ids": tokens, "labels": tokens, "position_ids": documents},
        "counted by another": {"input_ids": tokens, "labels": tokens, "num_items_in_batch": torch.tensor(160)},
    }


def differences(kind: str, checkpointing: bool) -> dict[str, float]:
    found = {}
    for name, given in cases().items():
        alone, model = tiny_hf(kind).train(), parallelize(tiny_hf(kind).train(), None)
        if checkpointing:
            model.activation_checkpointing_enable()
        want = alone(**given).loss
        want.backward()
        loss = model(**given).loss
        loss.backward()
        sum_gradients(model)
        total = loss.detach().clone()
        dist.all_reduce(total)
        errors = {"loss": relative_error(total, want)}
        for (key, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert parameter.grad is not None and expected.grad is not None and expected.grad.any(), key
            errors[key] = relative_error(parameter.grad, expected.grad)
        model.eval()
        alone.eval()
        with torch.no_grad():
            out, expected = model(**given), alone(**given)
            errors["loss without gradients"] = relative_error(out.loss, expected.loss)
            assert model.last_layout is not None
            whole = model.last_layout.gather(out.logits)
            mask = given.get("attention_mask", torch.ones_like(given["input_ids"])) == 1
            errors["logits"] = relative_error(whole.flatten(0, 1), expected.logits[mask])
        found[name] = worst(errors)
    return found


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^hybrid-False$")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["hybrid", pytest.param("pure", marks=pytest.mark.slow)])
def test_losses_logits_and_gradients_are_those_of_one_process(kind: str, checkpointing: bool) -> None:
    for errors in run_on_ranks(2, differences, kind, checkpointing):
        assert worst(errors) < 1e-11, errors


def of_no_label(kind: str) -> list[float]:
    """The loss with gradients and without, and the largest gradient, where no label counts."""
    model, tokens = parallelize(tiny_hf(kind).train(), None), random_tokens(2, 41)
    given = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    loss = model(**given).loss
    loss.backward()
    sum_gradients(model)
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients) == model.num_parameters()
    with torch.no_grad():
        evaluated = model.eval()(**given).loss
    return [float(loss.detach()), float(evaluated), float(gradients.abs().max())]


@pytest.mark.parametrize("kind", ["hybrid", "experts"])
def test_where_no_label_counts_loss_and_gradients_are_zero_on_all_ranks(kind: str) -> None:
    assert run_on_ranks(2, of_no_label, kind) == [[0.0, 0.0, 0.0]] * 2


def written(kind: str) -> list[list[list[int]]]:
    model = parallelize(tiny_hf(kind), None)
    texts = []
    for length in (1, 2, 3, 40):
        tokens = random_tokens(2, length, seed=length)
        texts.append(model.generate(tokens, max_new_tokens=5, do_sample=False).tolist())
    return texts


def test_a_prompt_that_ranks_share_is_gone_on_with_on_each_of_them() -> None:
    for kind in KINDS:
        model = tiny_hf(kind)
        want = [
            model.generate(random_tokens(2, length, seed=length), max_new_tokens=5, do_sample=False)
            for length in (1, 2, 3, 40)
        ]
        assert run_on_ranks(2, written, kind) == 2 * [[texts.tolist() for texts in want]]


def refusals() -> list[tuple[str, str]]:
    model = parallelize(tiny_hf("hybrid"), None)
    tokens, mask, _ = padded([9, 4], "left")
    return [
        raised(lambda: model.base_model(tokens, attention_mask=mask)),
        raised(lambda: model(tokens, logits_to_keep=1)),
        raised(lambda: model(tokens, use_cache=True)),
        raised(lambda: model.generate(tokens, attention_mask=mask, max_new_tokens=1, pad_token_id=0)),
    ]


def test_what_ranks_cannot_share_is_refused_on_all_of_them() -> None:
    messages = [
        "the backbone gives the states of whole sequences, and a rank has some of their tokens",
        "the last tokens of a sequence are on one rank",
        "a prompt over ranks has rows of one length",
        "a prompt over ranks has rows of one length",
    ]
    for found in run_on_ranks(2, refusals):
        assert [kind for kind, _ in found] == ["InputError"] * 4
        assert all(want in got for want, (_, got) in zip(messages, found, strict=True)), found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_is_undone_and_peft_around_it_is_looked_into() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_hf("hybrid")
    tokens = random_tokens(1, 9)
    want = model(tokens).logits
    parallelize(model, None)
    assert model.sequence_parallel is not None and model.model.sequence_parallel is model.sequence_parallel
    assert relative_error(model(tokens).logits, want) < 1e-12
    assert unparallelize(model).sequence_parallel is None
    assert torch.equal(model(tokens).logits, want)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    parallelize(adapted, None)
    assert model.sequence_parallel is not None
    assert relative_error(adapted(input_ids=tokens).logits, want) < 1e-12
    unparallelize(adapted)
    assert model.sequence_parallel is None


def test_options_of_other_models_and_their_trainer_are_refused() -> None:
    with pytest.raises(InputError, match="order='zigzag' concerns models of Hugging Face Transformers"):
        parallelize(tiny_hf("pure"), None, order="zigzag")
    with pytest.raises(InputError, match="LinearLlamaForCausalLM has layers of this library"):
        check_model(tiny_hf("pure"))
    with pytest.raises(InputError, match=r"prefill\(\) is for models of other libraries; a LinearLlamaForCausalLM"):
        prefill(tiny_hf("pure"), random_tokens(1, 9))
