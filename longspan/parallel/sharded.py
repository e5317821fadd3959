"""Weights that are divided over ranks by FSDP2, and gathered layer by layer as they are computed with.

The one gradient convention holds: a rank's loss is its local sum over valid tokens, divided by the number of valid tokens of all
ranks (data × sequence), and gradients are sums over all of them. FSDP2 takes means by default; its divisor is set to one, and it is
given all ranks: it scatters the sums over the ranks along ``"shard"``, and sums over those along ``"replicate"``, which hold the
same share. So nothing is left to sum after backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longspan.checks import described
from longspan.errors import InputError
from longspan.parallel.mesh import ParallelMesh

Model = TypeVar("Model", bound=nn.Module)


def shard_weights(
    model: Model,
    mesh: ParallelMesh,
    *,
    blocks: Iterable[nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Divide the weights of a model over the ranks along ``"shard"`` of a mesh, by FSDP2; changed in place and returned.

    Args:
        model: with the same weights on every rank; after `longspan.parallelize`, if its sequences are shared.
        mesh: whose ``"shard"`` dimension has several ranks.
        blocks: the modules that are gathered and reduced one at a time; if not said, the entries of the outermost
            `torch.nn.ModuleList`s. The model itself is one more, of what is in none of them.
        dtype: what is computed in, such as torch.bfloat16; None is that of the weights. The weights stay what they are, gradients
            are summed and kept in float32 at least.

    A rank's loss is its sum over valid tokens divided by the number of valid tokens of all ranks. After ``loss.backward()`` the
    gradients are the sums over all ranks of the mesh: call no `sum_gradients`. Weights and gradients are `DTensor`s of this rank's
    share; `gathered` gives the whole.

    Raises:
        InputError: for what is no module, weights of no dimension, a mesh that divides no weights, or a model without blocks.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not isinstance(model, nn.Module):
        raise InputError(f"shard_weights() takes a torch.nn.Module; got {described(model)}. Pass the model itself")
    if not mesh.degrees.shards_weights:
        raise InputError(
            "shard_weights() divides weights over the ranks along dp_shard, and with shard_over_sp those along sp; there is "
            f"one of them in a mesh of {mesh.degrees}. Use a larger dp_shard, or leave the weights whole and call sum_gradients()"
        )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise InputError(
                f"shard_weights(): {name} has no dimension to divide; got a scalar. Make it a tensor of shape (1,)"
            )
    units = blocks_of(model, blocks)
    # FSDP2 would cast what is inside of arguments, too: angles of rotary embeddings and memory states, which stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32, cast_forward_inputs=False
    )
    all_modules: list[nn.Module] = [*units, model]
    for module in all_modules:
        if dtype is not None:
            module.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)
        sharded: Any = fully_shard(module, mesh=mesh.weights, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        # A divisor of one by a plain sum, which every backend has.
        sharded.set_force_sum_reduction_for_comms(True)
    return model


def cast_input(x: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in `dtype`, and everything else as it is."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(cast_input(x, dtype) for x in args), {name: cast_input(x, dtype) for name, x in kwargs.items()}


def blocks_of(model: nn.Module, blocks: Iterable[nn.Module] | None) -> list[nn.Module]:
    """The blocks that are given, or those of the outermost module lists; raises InputError where there are none."""
    found = list(_outermost_blocks(model) if blocks is None else blocks)
    if not found:
        raise InputError(
            f"what is done block by block needs blocks; {type(model).__name__} has no torch.nn.ModuleList of them. Say which "
            "modules they are: blocks=[...]"
        )
    return found


def _outermost_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of the module lists that are in no other module list: a model's blocks, in its order."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _outermost_blocks(child)


@contextmanager
def accumulating(model: nn.Module, is_last: bool) -> Iterator[None]:
    """In the block, gradients that are made are kept on this rank, and those of the last micro-batch summed with them.

    is_last: whether it is the block of the last micro-batch of a step. Weights that are not sharded are summed afterwards, by
    `sum_gradients`.
    """
    sharded: Any = model if is_sharded(model) else None
    if sharded is not None:
        sharded.set_requires_gradient_sync(is_last)
    try:
        yield
    finally:
        if sharded is not None:
            sharded.set_requires_gradient_sync(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_weights` has divided a model's weights."""
    return hasattr(model, "set_requires_gradient_sync")


def free_gathered(model: nn.Module) -> None:
    """Let go of gathered weights: those of the model itself stay gathered after a forward pass without a backward one."""
    for module in model.modules():
        if is_sharded(module):
            sharded: Any = module
            sharded.reshard()


def on_this_rank(x: Any) -> Tensor:
    """A tensor, or this rank's share of it."""
    local: Tensor = x.to_local() if is_divided(x) else x
    return local


def is_divided(x: Any) -> bool:
    """Whether x is a DTensor; to ask for the class would import it, which takes a second."""
    return hasattr(x, "device_mesh")


@torch.no_grad()
def gathered(tensors: Iterable[tuple[str, Tensor]], keeps: bool) -> dict[str, Tensor]:
    """Whole tensors by name, on the ranks that keep them; the others have an empty dictionary.

    Args:
        tensors: names, and tensors whole or divided over ranks; the same names on every rank, in any order.
        keeps: whether this rank wants them. One that does not has at most one whole tensor at a time.
    """
    found = {}
    # What was read from a file comes in another order on each rank, and gathers are matched by theirs.
    for name, tensor in sorted(tensors, key=itemgetter(0)):
        whole = tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
        if keeps:
            found[name] = whole.detach()
        del whole
    return found


@torch.no_grad()
def copy_whole(whole: Tensor, target: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be divided over ranks: each rank copies its share."""
    if not is_divided(target):
        target.copy_(whole)
        return
    on_this_rank(target).copy_(on_this_rank(divided_like(whole, target)))


def divided_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, divided over ranks as `like` is, or as it is if that is whole."""
    if not is_divided(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    # Every rank has the same: nothing is sent.
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
