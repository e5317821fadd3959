"""The model is the one inside: logits, loss, hidden states, embeddings, checkpointing; and what it does not take is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longspan.errors import InputError
from longspan.models import LinearLlama3
from longspan.models.hf import LinearLlamaConfig, LinearLlamaForCausalLM
from tests.compare import relative_error
from tests.models.hf.tiny import KINDS, alone, tiny_hf
from tests.models.tiny import random_tokens

CONFIG: dict[str, Any] = {
    "vocab_size": 29,
    "dim": 16,
    "num_layers": 2,
    "pattern": "LN",
    "num_heads": 2,
    "hidden_dim": 24,
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_those_of_the_model_inside(kind: str) -> None:
    model = tiny_hf(kind)
    tokens = random_tokens(2, 21)
    want = model.model(tokens)
    out = model(tokens, labels=tokens)
    assert torch.equal(out.logits, want)
    loss = F.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert relative_error(out.loss, loss) < 1e-14
    share = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(100)).loss
    assert relative_error(share, loss * 40 / 100) < 1e-14
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(tokens, shift_labels=shifted).loss, out.loss)
    assert torch.equal(model(tokens, labels=torch.full_like(tokens, -100)).loss, torch.zeros((), dtype=torch.float64))
    as_tuple = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], want)


def test_in_training_logits_are_left_out_unless_they_are_asked_for() -> None:
    tokens = random_tokens(1, 9)
    model = tiny_hf("hybrid").train()
    out = model(tokens, labels=tokens)
    assert out.logits is None and out.past_key_values is None
    asked = tiny_hf("hybrid", {"logits_in_training": True}).train()
    both = asked(tokens, labels=tokens)
    assert torch.equal(both.loss, out.loss) and torch.equal(both.logits, model.model(tokens))


def test_the_last_logits_or_some_of_them_are_kept() -> None:
    model = tiny_hf("hybrid")
    tokens = random_tokens(2, 9)
    want = model.model(tokens)
    for use_cache in (False, True):
        for kept, place in ((0, slice(None)), (1, slice(-1, None)), (4, slice(-4, None)), (30, slice(None))):
            got = model(tokens, logits_to_keep=kept, use_cache=use_cache).logits
            assert got.shape == want[:, place].shape and relative_error(got, want[:, place]) < 1e-12
        some = model(tokens, logits_to_keep=torch.tensor([2, 5]), use_cache=use_cache).logits
        assert relative_error(some, want[:, [2, 5]]) < 1e-12


@pytest.mark.parametrize("use_cache", [False, True])
def test_hidden_states_are_the_embedding_and_what_each_block_gives(use_cache: bool) -> None:
    model = tiny_hf("hybrid")
    tokens = random_tokens(2, 9)
    out = model(tokens, output_hidden_states=True, use_cache=use_cache, logits_to_keep=2)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embedding(tokens))
    assert torch.equal(model.model.head(out.hidden_states[-1])[:, -2:], out.logits)
    assert model(tokens).hidden_states is None


def test_gradient_checkpointing_computes_blocks_again_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(2, 21)
    model = tiny_hf("hybrid").train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    want = gradients()
    block = type(model.model.blocks[0])
    forward, counts = block.forward, {"calls": 0}

    def counted(self: Any, *args: Any) -> Any:
        counts["calls"] += 1
        return forward(self, *args)

    monkeypatch.setattr(block, "forward", counted)
    for reentrant in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_activation_checkpointing
        counts["calls"] = 0
        got = gradients()
        assert counts["calls"] == 4
        assert all(torch.equal(got[name], want[name]) for name in want)
        model.eval()
        counts["calls"] = 0
        model(tokens, labels=tokens).loss.backward()
        assert counts["calls"] == 2
        model.train()
    model.activation_checkpointing_disable()
    counts["calls"] = 0
    gradients()
    assert counts["calls"] == 2 and not model.is_activation_checkpointing


def test_every_second_block_alone_is_computed_again_where_that_is_asked() -> None:
    model = tiny_hf("pure", num_layers=4).train()
    model.activation_checkpointing_enable(every_n_layers=2)
    assert ["forward" in block.__dict__ for block in model.model.blocks] == [True, False, True, False]


def test_initial_weights_are_drawn_from_the_random_state() -> None:
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return LinearLlamaForCausalLM(LinearLlamaConfig(**CONFIG)).model.head.weight

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
    torch.manual_seed(1)
    model = LinearLlamaForCausalLM(LinearLlamaConfig(**CONFIG))
    torch.manual_seed(1)
    reference = LinearLlama3(LinearLlamaConfig(**CONFIG).core())
    reference.init_weights(int(torch.randint(2**63 - 1, ())))
    for got, want in zip(model.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows_and_shrinks(tied: bool) -> None:
    model = tiny_hf("hybrid", tie_embeddings=tied)
    tokens = random_tokens(1, 9)
    before = model.model(tokens)
    model.resize_token_embeddings(40, mean_resizing=False)
    assert (model.model.head.weight is model.model.embedding.weight) == tied
    assert model.config.vocab_size == model.model.config.vocab_size == 40
    assert relative_error(model(tokens).logits[..., :29], before) < 1e-14
    assert model(tokens, labels=torch.full_like(tokens, 39)).loss.isfinite()
    model.resize_token_embeddings(29)
    assert relative_error(model(tokens).logits, before) < 1e-14
    assert model.get_input_embeddings() is model.model.embedding
    assert model.get_output_embeddings() is model.model.head
    assert isinstance(model.get_output_embeddings(), nn.Linear)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tiny_hf("hybrid").train()
    model.activation_checkpointing_enable()
    tokens = random_tokens(1, 9)
    other = copy.deepcopy(model)
    other(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in other.parameters())
    same = pickle.loads(pickle.dumps(tiny_hf("hybrid")))
    assert torch.equal(same(tokens).logits, model.eval()(tokens).logits)


def test_bfloat16_weights_give_logits_near_those_of_float64() -> None:
    model = tiny_hf("hybrid")
    tokens = random_tokens(1, 30)
    want = alone(model, tokens[0])
    narrow = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        out = narrow(tokens, labels=tokens)
    assert out.logits.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    assert relative_error(out.logits[0], want) < 0.1
    assert out.loss.isfinite()


def test_a_context_beyond_that_of_training_is_warned_of_once() -> None:
    model = tiny_hf("hybrid", {"max_position_embeddings": 8})
    model(random_tokens(1, 8))
    cache = model(random_tokens(1, 8)).past_key_values
    with pytest.warns(UserWarning, match="9 tokens are more than the 8 of a sequence that softmax layers were trained"):
        model(random_tokens(1, 1), past_key_values=cache)
    model(random_tokens(1, 20))
    for kind in ("pure", "window"):
        tiny_hf(kind, {"max_position_embeddings": 8})(random_tokens(1, 20), use_cache=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": None}, r"input_ids must be int64 \[B, N\]"),
        ({"input_ids": torch.zeros(1, 3)}, r"input_ids must be int64 \[B, N\]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids must have at least one row and token"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "inputs_embeds are not supported"),
        ({"output_attentions": True}, "linear layers have no attention weights"),
        ({"token_type_ids": torch.zeros(1, 3)}, "takes no token_type_ids. Leave that out: return_token_type_ids=False"),
        ({"use_cache": True, "labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels were given with a cache"),
        ({"use_cache": True, "cu_seq_lens_q": torch.tensor([0, 3])}, "packed documents .* have no cache together"),
        ({"past_key_values": (1, 2)}, "past_key_values must be a LinearLlamaCache"),
    ],
)
def test_what_it_does_not_take_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_hf("pure")(**{"input_ids": random_tokens(1, 3), **given})
