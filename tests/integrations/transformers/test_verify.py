"""The self-check: the caller's first batch, shortened, beside one process; a fault that nothing else tells is found by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import longspan
from longspan.integrations.transformers import shard_batch
from longspan.integrations.transformers.call import CALL
from longspan.integrations.transformers.model import state_of
from longspan.integrations.transformers.verify import VERIFIED_TOKENS, shortened
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import IGNORED, PACKED, PLAIN, batch
from tests.integrations.transformers.test_rotary import options_of
from tests.ranks import raised, run_on_ranks

POSITIONS = torch.cat([torch.arange(20), torch.arange(17)])[None].expand(2, -1)
MASK = torch.ones_like(PLAIN.ids)
MASK[1, 30:] = 0
BATCHES: dict[str, dict[str, Any]] = {
    "plain": PLAIN.arguments(),
    "packed": PACKED.arguments(),
    "packed rows": {**PLAIN.arguments(), "position_ids": POSITIONS},
    "by bounds": {
        "input_ids": PACKED.ids,
        "labels": PACKED.ids,
        "cu_seq_lens_q": torch.tensor(PACKED.bounds, dtype=torch.int32),
    },
    "one document by bounds": {
        "input_ids": PACKED.ids,
        "labels": PACKED.ids,
        "cu_seq_lens_q": torch.tensor([0, 53], dtype=torch.int32),
    },
    "padded": {"input_ids": PLAIN.ids, "labels": PLAIN.ids.masked_fill(MASK == 0, IGNORED), "attention_mask": MASK},
    "counted": {**PLAIN.arguments(), "num_items_in_batch": torch.tensor(40)},
    "without labels": {"input_ids": PACKED.ids, "position_ids": PACKED.positions},
    "no label counts": {"input_ids": PLAIN.ids, "labels": torch.full_like(PLAIN.ids, IGNORED)},
}


def verified(name: str, options: dict[str, Any], given: dict[str, Any], verify_tokens: int | None) -> None:
    """The model is as it would be without the check, and its gradients are those of the call."""
    plain, checked = (longspan.parallelize(build(name, **options), None) for _ in range(2))
    longspan.unparallelize(checked)
    longspan.parallelize(checked, None, verify=True, verify_tokens=verify_tokens)
    found = []
    for model in (plain, checked):
        with torch.no_grad():
            model(**given)
        output = model(**given)
        counts = "labels" in given and bool((given["labels"] != IGNORED).any())
        (output.loss if counts else output.logits.square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    state = state_of(checked)
    assert state is not None and state.tokens_to_verify is None and state.num_calls == {True: 1, False: 1}
    for one, other in zip(*found, strict=True):
        assert one is other or torch.equal(one, other)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("packed", "counted") else pytest.param(kind, marks=pytest.mark.slow) for kind in BATCHES],
)
def test_what_is_right_passes(kind: str) -> None:
    run_on_ranks(2, verified, "llama", {}, BATCHES[kind], None)


@pytest.mark.slow_rows("rwkv", "without labels", "qwen3_next")
@pytest.mark.parametrize("kind", ["packed", "without labels"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bamba", {"z_loss_coefficient": 0.1}),
        ("qwen3_next", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
        ("rwkv", {}),
        ("llama", options_of("dynamic")),
    ],
)
def test_packed_documents_pass_in_every_kind_of_layer(name: str, options: dict[str, Any], kind: str) -> None:
    given = dict(BATCHES[kind])
    if name == "rwkv":
        # It computes its loss in its own way.
        given.pop("labels", None)
    run_on_ranks(2, verified, name, options, given, 40)


@pytest.mark.slow
def test_one_document_that_is_told_passes_in_linear_layers() -> None:
    run_on_ranks(2, verified, "qwen3_next", {}, BATCHES["one document by bounds"], None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bamba", {"z_loss_coefficient": 0.1}),
        ("qwen3_next", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
    ],
)
def test_losses_of_whole_batches_are_compared_too(name: str, options: dict[str, Any]) -> None:
    # Of padded tokens a loss of all logits is refused, the balance loss leaves them out.
    run_on_ranks(2, verified, name, options, BATCHES["plain" if name == "bamba" else "padded"], None)


def shift_inside(model: Any) -> None:
    """A layer that mixes tokens in a way that nothing tells: by one token inside of a feed-forward layer."""
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(torch.cat([x[:, :1], x[:, :-1]], dim=1))


def lose_documents(model: nn.Module) -> None:
    """Documents that run into each other."""
    state = state_of(model)
    assert state is not None
    layout = state.layout_of
    state.layout_of = lambda given, bounds: layout(given, None)  # type: ignore[method-assign]


def lose_padding(model: nn.Module) -> None:
    """A balance loss that counts padding."""
    forward = type(model).forward

    def without_mask(*args: Any, **given: Any) -> Any:
        if CALL in given:
            del given["attention_mask"]
        return forward(model, *args, **given)

    model.forward = without_mask


def own_count(model: nn.Module) -> None:
    """Each rank divides by the number of its own labels."""
    state = state_of(model)
    assert state is not None
    local = state._local_labels

    def counted(given: dict[str, Any], layout: Any) -> Any:
        labels, _ = local(given, layout)
        return labels, (labels != IGNORED).sum() * layout.num_ranks

    state._local_labels = counted  # type: ignore[method-assign]


FAULTS: dict[str, tuple[Callable[[Any], None], str, dict[str, Any], str]] = {
    "tokens shifted inside a layer": (shift_inside, "llama", {}, "plain"),
    "documents lost": (lose_documents, "llama", {}, "packed"),
    "documents lost in a linear layer": (lose_documents, "qwen3_next", {}, "without labels"),
    "labels counted on each rank": (own_count, "llama", {}, "plain"),
    "padding lost": (
        lose_padding,
        "qwen3_next",
        {"output_router_logits": True, "router_aux_loss_coef": 0.5},
        "padded",
    ),
}


def caught(what: str) -> tuple[str, str]:
    plant, name, options, kind = FAULTS[what]
    model = build(name, **options)
    longspan.parallelize(model, None, verify=True)
    plant(model)
    first = raised(lambda: model(**BATCHES[kind]))
    assert raised(lambda: model(**BATCHES[kind])) == first, "a check that failed must not be passed by a second call"
    return first


@pytest.mark.slow_rows("padding lost", "in a linear layer")
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_found_in_the_first_batch(what: str) -> None:
    for kind, message in run_on_ranks(2, caught, what):
        assert kind == "InputError" and "differs from one process" in message, message


def given_now() -> list[tuple[str, str]]:
    found = []
    right = build("llama")
    longspan.parallelize(right, None, verify=PACKED.arguments(), verify_tokens=20)
    state = state_of(right)
    assert state is not None and state.tokens_to_verify is None
    wrong = build("llama")
    shift_inside(wrong)
    found.append(raised(lambda: longspan.parallelize(wrong, None, verify=PACKED.arguments())))
    assert getattr(wrong, "sequence_parallel", None) is None
    assert not any(module._forward_pre_hooks for module in wrong.modules()), "a model that was refused was changed"
    other = batch(2, 37, seed=dist.get_rank())
    found.append(raised(lambda: longspan.parallelize(build("llama"), None, verify=other.arguments())))
    return found


def test_a_batch_may_be_given_before_the_weights_are_divided() -> None:
    for fault, batches in run_on_ranks(2, given_now):
        assert fault[0] == "InputError" and "differs from one process" in fault[1]
        assert batches[0] == "InputError" and "different batches" in batches[1]


def refused_calls() -> dict[str, tuple[str, str]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    divided: Any = longspan.parallelize(build("llama"), None, verify=True)
    fully_shard(divided, mesh=init_device_mesh("cpu", (2,)))
    whole = longspan.parallelize(build("llama"), None, verify=True)
    part = shard_batch(PLAIN.arguments(), longspan.SequenceLayout(37))
    return {
        "fully_shard": raised(lambda: divided(**PLAIN.arguments())),
        "split already": raised(lambda: whole(**part)),
    }


def test_what_cannot_be_compared_is_said() -> None:
    for found in run_on_ranks(2, refused_calls):
        for what, (kind, message) in found.items():
            assert kind == "InputError" and what in message and "verify=batch" in message, message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"verify": 512}, "verify must be True, False or the first batch"),
        ({"verify": True, "verify_tokens": 0}, "verify_tokens must be an integer, 1 at least"),
        ({"verify": True, "verify_tokens": True}, "verify_tokens must be an integer"),
        ({"verify_tokens": 512}, "Say verify=True, too"),
    ],
)
def test_options_are_checked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(longspan.InputError, match=says):
        longspan.parallelize(build("llama"), None, **given)


def test_what_was_found_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="longspan"):
        longspan.parallelize(build("llama"), None, verify=PLAIN.arguments())
    assert "over 1 ranks, 2 rows of 37 tokens, differs from one process by" in caplog.text


def test_a_backbone_has_no_loss_to_compare() -> None:
    model: Any = build("llama")
    with pytest.raises(longspan.InputError, match="LlamaModel has no head"):
        longspan.parallelize(model.model, None, verify=True)


def test_rows_are_kept_whole_where_they_fit() -> None:
    ids, labels = PLAIN.ids.repeat(2, 1), PLAIN.labels.repeat(2, 1)
    labels[0] = IGNORED
    given = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(37)[None], "other": "kept"}
    assert shortened(given, 148) is given
    short = shortened(given, 80)
    # Of the second and the fourth row more labels count than of the others, whose prompts are longer.
    counts = (labels != IGNORED).sum(1)
    rows = counts.sort(descending=True, stable=True).indices[:2].sort().values
    assert torch.equal(short["input_ids"], ids[rows]) and torch.equal(short["labels"], labels[rows])
    assert short["position_ids"] is not None and short["position_ids"].shape == (1, 37)
    assert short["other"] == "kept"


def test_a_long_row_is_cut_where_most_labels_count() -> None:
    length = 3 * VERIFIED_TOKENS
    ids = torch.arange(length)[None]
    labels = ids.clone()
    labels[:, : 2 * VERIFIED_TOKENS] = IGNORED
    positions = torch.cat([torch.arange(length - 500), torch.arange(500)])
    bounds = torch.tensor([0, length - 500, length])
    given: dict[str, Tensor] = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions[None, None].expand(3, 1, -1),
        "cu_seq_lens_q": bounds,
    }
    short = shortened(given, VERIFIED_TOKENS)
    assert torch.equal(short["input_ids"], ids[:, -VERIFIED_TOKENS:])
    assert bool((short["labels"] != IGNORED).all())
    assert torch.equal(short["position_ids"], given["position_ids"][..., -VERIFIED_TOKENS:])
    assert short["cu_seq_lens_q"].tolist() == [0, VERIFIED_TOKENS - 500, VERIFIED_TOKENS]
    # Without labels, and where all count, it is the beginning.
    assert torch.equal(shortened({"input_ids": ids}, 10)["input_ids"], ids[:, :10])
    assert torch.equal(shortened({"input_ids": ids, "labels": ids}, 10)["input_ids"], ids[:, :10])
