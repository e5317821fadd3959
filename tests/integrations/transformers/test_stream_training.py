"""Models of Transformers in segments of time with what a step is made of: adapters, dropout, recomputation, divided weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import longspan
from longspan.integrations.transformers import stream_batch
from longspan.parallel import MeshDegrees, ParallelMesh, gathered, shard_weights
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import (
    PACKED,
    PLAIN,
    Batch,
    Expected,
    Wide,
    batch,
    expected,
    gradients_of,
)
from tests.integrations.transformers.training import with_adapters
from tests.ranks import run_on_ranks

TOLERANCE = 1e-10
HYBRID: dict[str, Any] = {"num_hidden_layers": 2, "attn_layer_indices": [1]}
"""Of Bamba: a convolution and a state, and a softmax layer behind them."""

# Of PEFT's, which asks models of Transformers by an older name.
ignores_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def hybrid() -> nn.Module:
    return build("bamba", **HYBRID)


def errors_of(loss: Tensor, gradients: dict[str, Tensor], want: Expected) -> dict[str, float]:
    if gradients.keys() != want.gradients.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(gradients.keys() ^ want.gradients.keys())}")
    errors = {f"gradient of {key}": relative_error(gradients[key], want.gradients[key]) for key in gradients}
    return {**errors, "loss": relative_error(loss, want.loss)}


def check(errors: dict[str, float]) -> None:
    error, what = worst_of(errors)
    assert error < TOLERANCE, f"{what} is off by {error:.1e}"


class Masks:
    """In the place of `F.dropout`: draws as it does and notes what it has drawn, or drops what it is told to, call by call."""

    def __init__(self, told: list[Tensor] | None = None) -> None:
        self.drawn: list[Tensor] = []
        self._told = None if told is None else iter(told)

    def __call__(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        mask = torch.empty_like(x).bernoulli_(1 - p) / (1 - p) if self._told is None else next(self._told)
        self.drawn.append(mask)
        return x * mask


def of_the_sequence(drawn: list[Tensor], num_segments: int, num_passes: int) -> list[Tensor]:
    """For each dropout of a model the masks of all segments, which are the first passes, one after another."""
    number = len(drawn) // num_passes
    assert number > 4 and len(drawn) == number * num_passes
    return [torch.cat(drawn[first : num_segments * number : number], dim=1) for first in range(number)]


@ignores_peft
@pytest.mark.parametrize(("keep_every", "num_passes"), [(1, 7), (3, 9)])
def test_adapters_with_dropout_are_one_piece_with_the_same_masks(
    monkeypatch: pytest.MonkeyPatch, keep_every: int, num_passes: int
) -> None:
    """Four segments: three forward, four backward, and two again where not all is kept."""
    model = longspan.parallelize(with_adapters(hybrid(), dropout=0.3).train(), None)
    masks = Masks()
    monkeypatch.setattr(F, "dropout", masks)
    with Wide():
        loss = longspan.stream(model, 10, keep_every=keep_every).forward_backward(
            **stream_batch(model, PLAIN.arguments())
        )
    monkeypatch.setattr(F, "dropout", Masks(of_the_sequence(masks.drawn, 4, num_passes)))
    want = expected(with_adapters(hybrid(), dropout=0.3).train(), PLAIN)
    assert all("lora" in name for name in want.gradients)
    check(errors_of(loss, gradients_of(model), want))


def gradients(recomputes: bool) -> dict[str, Tensor]:
    model: Any = longspan.parallelize(with_adapters(hybrid(), dropout=0.3).float().train(), None)
    if recomputes:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    longspan.stream(model, 10).forward_backward(**stream_batch(model, PACKED.arguments()))
    return gradients_of(model)


@ignores_peft
def test_layers_that_are_recomputed_leave_the_same_bits_and_drop_the_same_numbers() -> None:
    want, got = gradients(False), gradients(True)
    different = [key for key in want if not torch.equal(got[key], want[key])]
    assert got.keys() == want.keys() and not different, different


BATCHES = (PLAIN, batch(2, 29, seed=4))
"""Two micro batches of a step; they have different numbers of labels that count."""


def num_valid(of: Batch) -> int:
    return int((of.labels[:, 1:] != -100).sum())


def expected_of_both() -> Expected:
    """The loss of all labels of both batches, and its gradients."""
    parts = [expected(hybrid(), of) for of in BATCHES]
    counts = [num_valid(of) for of in BATCHES]
    assert counts[0] != counts[1]

    def joined(values: list[Tensor]) -> Tensor:
        return sum((x * count for x, count in zip(values, counts, strict=True)), torch.zeros(())) / sum(counts)

    gradients = {name: joined([part.gradients[name] for part in parts]) for name in parts[0].gradients}
    return Expected(joined([part.loss for part in parts]), parts[0].logits, gradients)


def accumulated(divides: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of both batches, one after another, over two ranks that share sequences and, if said, divide weights."""
    mesh = ParallelMesh(MeshDegrees(sp=2, shard_over_sp=divides))
    model = longspan.parallelize(hybrid(), mesh["sp"], loss="sum")
    if divides:
        shard_weights(model, mesh)
    streamed, total = longspan.stream(model, 10), torch.zeros((), dtype=torch.float64)
    for of in BATCHES:
        given = {**of.arguments(), "num_items_in_batch": sum(map(num_valid, BATCHES))}
        with Wide():
            total += streamed.forward_backward(**stream_batch(model, given), is_last=of is BATCHES[-1])
    if not divides:
        longspan.sum_gradients(model)
    dist.all_reduce(total)
    return total, gathered([(name, p.grad) for name, p in model.named_parameters() if p.grad is not None], True)


@pytest.mark.slow_rows("^whole$")
@pytest.mark.parametrize("divides", [True, False], ids=["divided", "whole"])
def test_micro_batches_add_up_over_ranks_whose_weights_are(divides: bool) -> None:
    want = expected_of_both()
    for loss, found in run_on_ranks(2, accumulated, divides):
        check(errors_of(loss, found, want))


def fully_sharded(model: Any, inside: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in inside.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Any] = gradients_of(model)
    return {name: gradient.full_tensor() for name, gradient in found.items()}


def averaged_by_fsdp2(adapters: bool) -> tuple[Tensor, dict[str, Tensor]]:
    inside: Any = hybrid()
    model = with_adapters(inside) if adapters else inside
    longspan.parallelize(model, None)
    # The outermost module divides what no layer has: PEFT's, where it is around the model.
    fully_sharded(model, inside)
    with Wide():
        loss = longspan.stream(model, 10).forward_backward(**stream_batch(model, PLAIN.arguments()))
    dist.all_reduce(loss)
    return loss / 2, whole_gradients(model)


@ignores_peft
@pytest.mark.slow_rows("^weights$")
@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
def test_what_fsdp2_averages_over_two_ranks_is_one_process(adapters: bool) -> None:
    want = expected(with_adapters(hybrid()) if adapters else hybrid(), PLAIN)
    for loss, found in run_on_ranks(2, averaged_by_fsdp2, adapters):
        check(errors_of(loss, found, want))


@ignores_peft
@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["adapters first", "parallelized first"])
@pytest.mark.parametrize("name", ["olmo_hybrid", "jamba"])
def test_adapters_over_two_ranks_come_before_or_after(name: str, before: bool) -> None:
    want = expected(with_adapters(build(name)), PLAIN)
    for loss, found in run_on_ranks(2, with_adapters_over_ranks, name, before):
        # Jamba reads the matrix of this projection itself, nobody its adapter: no gradient, and zeros behind a sum over ranks.
        unread = found.keys() - want.gradients.keys()
        assert all(name == "jamba" and ".dt_proj.lora" in key and not found.pop(key).any() for key in unread)
        check(errors_of(loss, found, want))


def with_adapters_over_ranks(name: str, before: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = with_adapters(build(name)) if before else longspan.parallelize(build(name), None, loss="sum")
    model = longspan.parallelize(model, None, loss="sum") if before else with_adapters(model)
    with Wide():
        loss = longspan.stream(model, 10).forward_backward(**stream_batch(model, PLAIN.arguments()))
    longspan.sum_gradients(model)
    dist.all_reduce(loss)
    return loss, gradients_of(model)
