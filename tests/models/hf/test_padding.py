"""Padded and packed batches: each row, or document, gives exactly what it gives by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longspan import SequenceLayout
from longspan.errors import InputError
from tests.compare import relative_error, worst
from tests.models.hf.tiny import KINDS, alone, padded, tiny_hf
from tests.models.tiny import random_tokens

LENGTHS = [7, 70, 1, 33]
TOLERANCE = 1e-12


# Pure ones on both sides, each other kind on one.
@pytest.mark.slow_rows(r"^(experts|window)-left$", r"^hybrid-right$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^pure-right$")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_padded_batch_is_what_it_is_alone(kind: str, side: str) -> None:
    """Without a cache, and with one, which is filled as those of single rows."""
    model = tiny_hf(kind)
    tokens, mask, rows = padded(LENGTHS, side, width=75)
    with torch.no_grad():
        for use_cache in (False, True):
            out = model(tokens, attention_mask=mask, use_cache=use_cache)
            errors = [relative_error(out.logits[i, mask[i] == 1], alone(model, row)) for i, row in enumerate(rows)]
            assert worst(errors) < TOLERANCE, (use_cache, errors)
            assert not out.logits[mask == 0].any()
        last = model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=2).logits
        assert relative_error(last, out.logits[:, -2:]) < TOLERANCE
        # Behind the last token of each row, whichever side its padding is on.
        more = random_tokens(len(rows), 3, seed=99)
        behind = model(more, past_key_values=out.past_key_values).logits
        for i, row in enumerate(rows):
            assert relative_error(behind[i], alone(model, torch.cat([row, more[i]]))[-3:]) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_backbone_gives_what_the_head_reads(side: str) -> None:
    model = tiny_hf("hybrid")
    tokens, mask, _ = padded(LENGTHS, side)
    read: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        handle = head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        handle.remove()
        # The tokens of all rows, one behind the other.
        [given] = read
        assert torch.equal(hidden[mask == 1], given[0])
        # As many tokens at once, as products of other shapes may round in other ways.
        assert torch.equal(logits[mask == 1], head(given)[0])
    assert not hidden[mask == 0].any() and not logits[mask == 0].any()
    with pytest.raises(InputError, match="the backbone takes no cache and returns no tuple"):
        model.base_model(input_ids=tokens, use_cache=True)
    with pytest.raises(InputError, match="takes no colour"):
        model.base_model(input_ids=tokens, colour=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_and_every_gradient_of_a_padded_batch_are_those_of_its_rows(side: str) -> None:
    model = tiny_hf("hybrid").train()
    tokens, mask, rows = padded(LENGTHS, side)
    labels = tokens.masked_fill(mask == 0, -100)
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = sum(len(row) - 1 for row in rows)
    losses = [F.cross_entropy(model.model(row[None])[0, :-1], row[1:], reduction="sum") for row in rows if len(row) > 1]
    want = torch.stack(losses).sum() / count
    want.backward()
    assert relative_error(loss, want) < TOLERANCE
    for name, parameter in model.named_parameters():
        assert got[name] is not None and parameter.grad is not None and parameter.grad.any()
        assert relative_error(got[name], parameter.grad) < 1e-11, name


def test_the_label_of_a_row_s_first_token_is_predicted_by_no_padding() -> None:
    model = tiny_hf("hybrid")
    tokens, mask, _ = padded(LENGTHS, "left")
    ignored = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    # Labels of padding itself count nothing either.
    assert torch.equal(model(tokens, attention_mask=mask, labels=tokens).loss, ignored)
    # Where they were counted before, the loss would be too small.
    with pytest.raises(InputError, match="counts labels that no token predicts"):
        model(tokens, attention_mask=mask, labels=tokens, num_items_in_batch=100)
    first = mask.argmax(1)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[torch.arange(len(tokens)), first] = -100
    share = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=214).loss
    assert relative_error(share, ignored * (sum(LENGTHS) - len(LENGTHS)) / 214) < TOLERANCE


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_packed_documents_see_nothing_of_each_other(how: str) -> None:
    model = tiny_hf("hybrid")
    lengths = [5, 40, 1, 20]
    tokens = random_tokens(1, sum(lengths))
    told = {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, 5, 45, 46, 66], dtype=torch.int32),
    }
    with torch.no_grad():
        out = model(tokens, labels=tokens, max_length_q=40, **{how: told[how]})
        layout = SequenceLayout.local(66, [0, 5, 45, 46, 66])
        want = model.model(tokens, layout)
        loss = model.model(tokens, layout, labels=layout.shard_labels(tokens))
    assert relative_error(out.logits, want) < TOLERANCE
    # No label of a document is predicted by the one before.
    assert relative_error(out.loss, loss) < TOLERANCE
    with pytest.raises(InputError, match="counts labels that no token predicts"):
        model(tokens, labels=tokens, num_items_in_batch=62, **{how: told[how]})
    labels = tokens.clone()
    labels[0, [5, 45, 46]] = -100
    assert (
        relative_error(model(tokens, labels=labels, num_items_in_batch=62, **{how: told[how]}).loss, loss) < TOLERANCE
    )


def test_rows_of_packed_documents_are_so_many_documents() -> None:
    model = tiny_hf("pure")
    tokens = random_tokens(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    with torch.no_grad():
        logits = model(tokens, position_ids=positions, use_cache=False).logits
    for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 0, 12)):
        assert relative_error(logits[row, start:stop], alone(model, tokens[row, start:stop])) < TOLERANCE


def test_what_is_no_padding_is_refused() -> None:
    model = tiny_hf("pure")
    tokens = random_tokens(2, 6)
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])
    with pytest.raises(InputError, match="padding between tokens of a row"):
        model(tokens, attention_mask=holes)
    with pytest.raises(InputError, match=r"attention_mask must be \[B, N\] = \(2, 6\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(InputError, match="must have a column for each of the 6 tokens; got 5"):
        model(tokens, attention_mask=torch.ones(2, 5))
    for use_cache in (False, True):
        with pytest.raises(InputError, match="tokens padding"):
            model(tokens, attention_mask=torch.zeros(2, 6), use_cache=use_cache)
    with pytest.raises(InputError, match="must go on behind its 0 tokens in the cache"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=True)
    with pytest.raises(InputError, match=r"position_ids must be \[B, N\] = \(2, 6\)"):
        model(tokens, position_ids=torch.arange(5)[None], use_cache=False)
    with pytest.raises(InputError, match="must be of one row"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 6]), use_cache=False)
    with pytest.raises(InputError, match="max_length_q alone do not say where packed documents start"):
        model(tokens, max_length_q=3, use_cache=False)
