"""Sequence parallelism applied to a model from outside, and the sum of its gradients over ranks.

The one gradient convention: a rank's loss is its local sum over valid tokens, divided by the number of valid tokens of
all ranks (data × sequence). Parameter gradients are then *summed* over data × sequence, and equal those of one process.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.attention.softmax import SOFTMAX_METHODS, SoftmaxMethod
from longspan.checks import described
from longspan.comm.traffic import note_collective, waiting
from longspan.errors import InputError
from longspan.exchange import Exchanger, exchange_named
from longspan.exchange.auto.order import RankOrderOption
from longspan.layout import Order, SequenceLayout
from longspan.models.linear_llama3 import LinearLlama3
from longspan.models.mixers import ParallelOptions, SequenceMixer, SequenceParallel
from longspan.parallel.adapters import adapter_of
from longspan.parallel.sharded import is_divided, on_this_rank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from longspan.integrations.transformers.losses import LossKind

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed this many bytes at a time: enough to hide latency, little beside the model."""

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh_or_group: dist.ProcessGroup | DeviceMesh | None,
    *,
    order: Order | None = None,
    rank_order: RankOrderOption | None = None,
    exchange: str | Exchanger = "auto",
    softmax_method: SoftmaxMethod = "auto",
    loss_ranks: dist.ProcessGroup | DeviceMesh | None = None,
    loss: LossKind | None = None,
    verify: bool | Mapping[str, Any] = False,
    verify_tokens: int | None = None,
) -> Model:
    """Let `model` run on sequences that are split over the ranks of a group; changed in place and returned.

    Args:
        model: a causal language model of Hugging Face Transformers, or PEFT's around one; a `longspan.models.LinearLlama3`, or the
            `longspan.models.hf.LinearLlamaForCausalLM` that holds one; any
            module whose token-mixing layers are `longspan.models.mixers.SequenceMixer`s; or one whose class has an adapter
            (`longspan.parallel.register_adapter`). With the same weights on every rank.
        mesh_or_group: process group or DeviceMesh (such as ``mesh["sp"]``), as in `SequenceLayout`; None is the default group.
        order: Transformers only: which tokens of a sequence a rank takes, as in `SequenceLayout`. If not said, ``"zigzag"``, which
            balances softmax layers, or ``"contiguous"`` for a model that has none.
        rank_order: Transformers only: in which order ranks hold a sequence, as in `SequenceLayout`; or ``"measured"``: in that of
            their links, which are measured now (`longspan.exchange.measured_rank_order`; every rank calls this then). If not said,
            in that of their numbers.
        exchange: how linear layers exchange their states, as in the operators.
        softmax_method: how softmax layers exchange keys and values, as in `softmax_attention`.
        loss_ranks: of a model with experts: the ranks whose shares of a loss are added, data × sequence (``mesh["world"]`` of a
            `longspan.parallel.ParallelMesh`), over whose tokens the routers' losses are means. To be said where there are other
            ranks than those of the group; None is the group.
        loss: Transformers only: ``"mean"`` (if not said), so that averaging gradients over the ranks, as DistributedDataParallel,
            FSDP2 and Accelerate do, gives those of the whole loss; ``"sum"``, so that summing them does (`sum_gradients`).
        verify: Transformers only: compare loss and gradients of the first batch with those of one process, and raise where they
            differ: True for the first batch that the model is called with for gradients; or the batch itself, a mapping of a call's
            arguments, which is compared now (FSDP2 divides the weights afterwards).
        verify_tokens: how many tokens of that batch, at most; 1,024 if not said. One process must hold the model, its
            gradients and so many tokens.

    A model of Transformers is called as before, with whole sequences which are the same on every rank of the group, and returns
    this rank's logits: docs/transformers.md; so is `LinearLlamaForCausalLM`, whose loss is this rank's share, to be summed:
    docs/hugging_face_models.md. Others take ``model(layout.shard(tokens), layout=layout)`` with a layout of this
    very group, and no call without one where the group has several ranks: their mixers refuse others; sum their gradients with
    `sum_gradients`. Whose place a model has is kept as its ``sequence_parallel``. `unparallelize` undoes it.

    Raises:
        InputError: for a model that has no such mixer and no adapter, a layer of Transformers that is not known, a name that is not
            an exchange or a method, an option that does not concern the model, or a model with experts in a group that is not all
            ranks, where nothing is said of the others.
        LayoutError: for a group that this rank is not in, a mesh that is not one of sequence-parallel ranks, or a rank_order that
            does not hold each rank once.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"parallelize() takes a torch.nn.Module; got {described(model)}. Pass the model itself, not its output"
        )
    exchange_named(exchange)
    if softmax_method not in SOFTMAX_METHODS:
        raise InputError(f"softmax_method must be one of {', '.join(SOFTMAX_METHODS)}; got {softmax_method!r}")
    group, num_ranks = _resolve(mesh_or_group)
    options, place = ParallelOptions(exchange, softmax_method), SequenceParallel(group, num_ranks)
    adapter = adapter_of(type(model))
    has_experts = any(isinstance(module, LinearLlama3) and module.config.num_experts for module in model.modules())
    if loss_ranks is not None and not has_experts:
        raise InputError(
            f"parallelize(): loss_ranks concerns a longspan.models.LinearLlama3 with experts; got {type(model).__name__}, which is "
            "none. Leave it out"
        )
    mixers = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    if exchange_named(exchange).remembers_errors and not mixers:
        raise InputError(
            "parallelize(): the exchange has error feedback, which belongs to one layer; the layers of "
            f"{type(model).__name__} share one exchange. Give a codec without feedback, or a model of longspan's mixers"
        )
    if adapter is None and not mixers and _is_transformers_model(model):
        from longspan.integrations.transformers.pretrained import parallelize_pretrained

        return parallelize_pretrained(
            model,
            options,
            place,
            order=order,
            rank_order=rank_order,
            loss=loss or "mean",
            verify=verify,
            verify_tokens=verify_tokens,
        )
    of_transformers = {"order": order, "rank_order": rank_order, "loss": loss, "verify_tokens": verify_tokens}
    for name, given in {**of_transformers, "verify": None if verify is False else verify}.items():
        if given is not None:
            raise InputError(
                f"parallelize(): {name}={given!r} concerns models of Hugging Face Transformers, which are called with whole "
                f"sequences; {type(model).__name__} is called with a layout, which says the order. Leave {name} out"
            )
    if adapter is not None:
        model.__dict__[_UNDO] = adapter(model, options, place)
    else:
        if not mixers:
            raise InputError(
                f"parallelize() takes a model whose layers mix tokens by a longspan.models.mixers.SequenceMixer; got "
                f"{type(model).__name__}, which has none. Derive its attention from SequenceMixer, say how its class takes a "
                "layout with longspan.parallel.register_adapter(), or give the layout to the operators"
            )
        losses = _place_of_losses(loss_ranks, place) if has_experts else None
        for mixer in mixers:
            mixer.set_parallel(options, place)
        _place_inner(model, place, losses)
    # A module takes any attribute.
    model.sequence_parallel = place  # type: ignore[assignment]
    return model


def _place_of_losses(loss_ranks: dist.ProcessGroup | DeviceMesh | None, place: SequenceParallel) -> SequenceParallel:
    """The ranks whose shares of a loss are added, where a model with experts is parallelized for `place`."""
    if loss_ranks is not None:
        return SequenceParallel(*_resolve(loss_ranks))
    num_ranks = _resolve(None)[1]
    if num_ranks != place.num_ranks:
        raise InputError(
            f"parallelize(): the model has experts, whose losses are means over the tokens of all ranks; got a group of "
            f"{place.num_ranks} of the {num_ranks} ranks, and no loss_ranks. Say over which ranks the loss is summed, as in "
            'loss_ranks=mesh["world"], or loss_ranks=group if it is this group alone'
        )
    return place


def unparallelize(model: Model) -> Model:
    """Undo `parallelize`, in place: the model is as it was, and returned. Other models keep what they have.

    Raises:
        InputError: for a model that is not parallelized, or whose adapter returned nothing that undoes its work.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"unparallelize() takes a torch.nn.Module; got {described(model)}. Pass the model itself")
    adapter = adapter_of(type(model))
    mixers = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    if adapter is None and not mixers and _is_transformers_model(model):
        from longspan.integrations.transformers.pretrained import unparallelize_pretrained

        unparallelize_pretrained(model)
        return model
    if getattr(model, "sequence_parallel", None) is None:
        raise InputError(f"{type(model).__name__} is not parallelized: there is nothing to undo")
    if adapter is not None:
        undo = model.__dict__.get(_UNDO)
        if undo is None:
            raise InputError(
                f"the adapter of {type(model).__name__} returned nothing that undoes its work. Let it return a function that "
                "does, or build the model anew"
            )
        undo()
        del model.__dict__[_UNDO]
    else:
        for mixer in mixers:
            mixer.set_parallel(ParallelOptions(), None)
        _place_inner(model, None, None)
    model.sequence_parallel = None  # type: ignore[assignment]
    return model


def _place_inner(model: nn.Module, place: SequenceParallel | None, losses: SequenceParallel | None) -> None:
    """Tell the model inside of what Transformers and PEFT put around it, which is what is called with a layout.

    losses: the ranks whose shares of a loss are added, where the model has experts.
    """
    for module in model.modules():
        if isinstance(module, LinearLlama3):
            module.sequence_parallel, module.loss_ranks = place, losses


_UNDO = "_longspan_undo"
"""Where a model keeps what its adapter returned."""


def _is_transformers_model(model: nn.Module) -> bool:
    """Whether a model is Transformers'; whose module is loaded then."""
    if "transformers" not in sys.modules:
        return False
    from longspan.integrations.transformers.structure import is_transformers_model

    return is_transformers_model(model)


@torch.no_grad()
def sum_gradients(
    module_or_parameters: nn.Module | Iterable[nn.Parameter], group: dist.ProcessGroup | DeviceMesh | None = None
) -> None:
    """Sum every parameter's gradient over the ranks of a group, in place.

    Args:
        module_or_parameters: the same on every rank, in the same order. A parameter without a gradient on a rank counts as
            zero there, and has the sum afterwards; those that require no gradient are left alone.
        group: all ranks that share the parameters, data × sequence; None is the default group.

    Few collectives of at most about 32 MiB; none in a group of one. Sums are in the gradients' dtype.

    Parameters that FSDP2 has sharded (`fully_shard` over ``mesh["dp"]``) have sharded gradients, which FSDP2 itself reduces over
    its mesh: give the other ranks alone, ``sum_gradients(model, mesh["sp"])``, and this rank's shards are summed. Let FSDP2 sum
    instead of average, by ``set_gradient_divide_factor(1.0)`` on every module that was given to `fully_shard`.

    A sparse gradient (``nn.Embedding(sparse=True)``) is sent as a dense one, and is sparse again afterwards.

    Raises:
        InputError: for sharded parameters whose mesh has other ranks of the group, over which their gradients are reduced already.
    """
    parameters = (
        module_or_parameters.parameters() if isinstance(module_or_parameters, nn.Module) else module_or_parameters
    )
    process_group, num_ranks = _resolve(group)
    if num_ranks == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        _check_mesh(parameter, process_group)
    for bucket in _buckets(trained):
        flat = torch.cat([_gradient_on_this_rank(parameter).flatten() for parameter in bucket])
        note_collective("all_reduce", "backward", 2 * (num_ranks - 1) * flat.nbytes // num_ranks)
        with waiting():
            dist.all_reduce(flat, group=process_group)
        for parameter, summed in zip(bucket, flat.split([on_this_rank(p).numel() for p in bucket]), strict=True):
            _set_gradient(parameter, summed)


def _check_mesh(parameter: nn.Parameter, group: dist.ProcessGroup | None) -> None:
    """Refuse a sharded parameter whose gradient is reduced already over ranks of the group."""
    if not is_divided(parameter):
        return
    mesh: DeviceMesh = parameter.device_mesh  # type: ignore[attr-defined]
    over = sorted({*mesh.mesh.flatten().tolist()} & {*dist.get_process_group_ranks(group)})
    if len(over) > 1:
        names = mesh.mesh_dim_names or ()
        raise InputError(
            f"sum_gradients: a parameter of shape {tuple(parameter.shape)} is a DTensor over the mesh {names or mesh}, whose "
            f"ranks {over} are in the group too: its gradient is reduced over them already. Sum over the other ranks alone, as in "
            'sum_gradients(model, mesh["sp"]) for parameters that are sharded over mesh["dp"], or, where there are none, not '
            "at all; let FSDP2 sum and not average by set_gradient_divide_factor(1.0) on every module given to fully_shard"
        )


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, at most about `BUCKET_BYTES` together, in the order given."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        kinds[parameter.dtype, parameter.device].append(parameter)
    for same_kind in kinds.values():
        bucket: list[nn.Parameter] = []
        num_bytes = 0
        for parameter in same_kind:
            size = on_this_rank(parameter).nbytes
            if bucket and num_bytes + size > BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(parameter)
            num_bytes += size
        yield bucket


def _gradient_on_this_rank(parameter: nn.Parameter) -> Tensor:
    """This rank's gradient, dense; zero where there is none."""
    if parameter.grad is None:
        return torch.zeros_like(on_this_rank(parameter))
    own = on_this_rank(parameter.grad)
    return own if own.layout is torch.strided else own.to_dense()


def _set_gradient(parameter: nn.Parameter, summed: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    own = on_this_rank(parameter.grad)
    summed = summed.view_as(on_this_rank(parameter))
    if own.layout is torch.strided:
        own.copy_(summed)
    else:
        parameter.grad = summed.to_sparse(own.sparse_dim())


def _resolve(mesh_or_group: dist.ProcessGroup | DeviceMesh | None) -> tuple[dist.ProcessGroup | None, int]:
    """The process group and its size: a layout resolves and checks a group, whatever its length."""
    if mesh_or_group is None and dist.is_torchelastic_launched() and not dist.is_initialized():
        warnings.warn(
            "parallelize(model, None): torchrun has started this process, but there is no default process group, so that each of "
            "its processes runs whole sequences by itself. Call torch.distributed.init_process_group() before",
            stacklevel=3,
        )
    layout = SequenceLayout(2**40, mesh_or_group)
    return layout.group, layout.num_ranks
