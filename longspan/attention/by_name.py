"""Every operator by its name, in two phases (`write`, then ``.read``) or in one call.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from torch import Tensor

from longspan.attention import linear
from longspan.attention.bidirectional import write_bidirectional
from longspan.attention.linear import LinearMemory, check_query
from longspan.attention.memory import KeyMemory, StateMemory
from longspan.attention.options import SCHEDULES, Schedule
from longspan.autocast import as_in_product
from longspan.checks import check_choice, check_flag, check_tensor
from longspan.errors import InputError
from longspan.exchange import Exchanger
from longspan.layout import SequenceLayout
from longspan.layout.calls import stops_graphs
from longspan.ops.variants import VARIANTS
from longspan.tracing import outside_graphs

if TYPE_CHECKING:
    from longspan.attention.softmax import EarlierKeys, SoftmaxMethod

_LINEAR_OPTIONS = ("causal", "initial_state", "output_final_state", "exchange", "backend", "chunk_size")
_SOFTMAX_OPTIONS = ("causal", "window", "initial_state", "earlier", "output_final_state", "method", "num_heads")
_GATE_NAMES = sorted({gate.name for variant in VARIANTS.values() for gate in variant.gates})


class LinearOptions(TypedDict, total=False):
    """What `write` takes for linear attention beside k, v and the layout: gates, and options as in the one-call operators."""

    g: Tensor
    beta: Tensor
    a: Tensor
    b: Tensor
    p: Tensor
    s: Tensor
    u: Tensor
    log_decay: Tensor | Sequence[float]
    causal: bool
    initial_state: Tensor | None
    output_final_state: bool
    exchange: str | Exchanger
    backend: str | None
    chunk_size: int | None


class SoftmaxOptions(TypedDict, total=False):
    """What `write` takes for softmax attention beside k, v and the layout: options as in `softmax_attention`."""

    causal: bool
    window: int | None
    initial_state: tuple[Tensor, Tensor] | None
    earlier: EarlierKeys | None
    output_final_state: bool
    method: SoftmaxMethod
    num_heads: int | None


# A string that is not known to be "softmax" names linear attention.
@overload
def write(  # type: ignore[overload-overlap]
    operator: Literal["softmax"],
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = ...,
    **options: Unpack[SoftmaxOptions],
) -> KeyMemory: ...


@overload
def write(
    operator: str,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = ...,
    **options: Unpack[LinearOptions],
) -> StateMemory: ...


def write(
    operator: str,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    **options: Any,
) -> StateMemory | KeyMemory:
    """Write what later tokens need and start its exchange, without waiting; read it with ``.read(q)`` when the queries are there.

    Args:
        operator: the name of an operator (``"linear_attention"``, ``"retention"``, ``"simple_gla"``, ``"gla"``,
            ``"gla_with_bonus"``, ``"gated_slot_attention"``, ``"delta_rule"``, ``"gated_delta_rule"``, ``"kda"``,
            ``"gated_delta_product"``, ``"dplr_delta_rule"``, ``"comba"``), or ``"softmax"``.
        k: ``[B, T, H_k, K]``; for `gated_delta_product` ``[B, T, N, H_k, K]``.
        v: ``[B, T, H, V]``, or ``[B, T, N, H, V]``, the dtype of k.
        layout: which tokens this rank holds; None is one device.
        options: the operator's gates by name (such as `g`, `beta`, `log_decay`), and its options: for linear attention `causal`,
            `initial_state`, `output_final_state`, `exchange`, `backend`, `chunk_size` as in the one-call operators; for softmax
            `causal`, `window`, `initial_state`, `earlier`, `output_final_state`, `method`, `num_heads`.

    Returns:
        A `longspan.Memory`: ``.read(q, scale=None) -> o [B, T, H, V]``, and ``.final_state()`` if it was written with
        ``output_final_state=True``; for linear attention also ``.read_overlapped(q, scale=None)``, and for softmax
        ``.read(q, scale=None, softcap=None, sinks=None)``.

    Everything computed between `write` and `read` that needs no other rank hides the exchange, forward and backward:

        memory = longspan.write("simple_gla", k, v, g=g, layout=layout)
        q = q_proj(x)
        o = memory.read(q)

    Raises:
        InputError: for shapes, dtypes, gates or options that do not fit.
        LayoutError: for another number of tokens than the layout's.
    """
    if operator == "softmax":
        from longspan.attention.softmax import write_softmax

        _check_options(operator, options, _SOFTMAX_OPTIONS)
        return write_softmax(k, v, layout=layout, **options)
    check_choice("write", "operator", operator, ("softmax", *VARIANTS), "See docs/adding_a_variant.md for adding one")
    gates = {name: options.pop(name) for name in _GATE_NAMES if name in options}
    _check_options(operator, options, _LINEAR_OPTIONS)
    if not check_flag(operator, "causal", options.pop("causal", True)):
        return _write_bidirectional(operator, k, v, gates, layout=layout, **options)
    return linear.write_linear(operator, k, v, gates, layout=layout, **options)


def _check_options(operator: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(
            f"{operator} has the options {', '.join(known)}, and its gates; got {', '.join(unknown)}. Leave them out"
        )


def _write_bidirectional(
    operator: str,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Any],
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **options: Any,
) -> StateMemory:
    if initial_state is not None or output_final_state:
        raise InputError(
            f"{operator}: with causal=False there is no state before or after the sequence; got "
            f"{'output_final_state=True' if initial_state is None else 'an initial_state'}. Leave out initial_state and "
            "output_final_state"
        )
    return write_bidirectional(operator, k, v, gates, **options)


def apply_operator(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Any],
    output_final_state: bool,
    *,
    scale: float | None,
    schedule: Schedule,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """An operator in one call: o, and with `output_final_state` the pair (o, final_state).

    gates: by name. scale: None is K^-½. options: `layout`, and those of `write`.
    """
    q, k, v = as_in_product(q), as_in_product(k), as_in_product(v)
    check_tensor(operator, "k", k)
    check_query(operator, q, k, scale)
    check_schedule(operator, schedule, options.get("causal", True))
    # One stop of a graph instead of one per phase.
    call = _write_and_read_outside_graphs if stops_graphs(options["layout"]) else _write_and_read
    return call(operator, q, k, v, gates, scale, output_final_state, schedule, options)


def overlaps(schedule: Schedule, memory: StateMemory) -> bool:
    """Whether one call reads a memory, which has been written just now, in the overlapped order."""
    if schedule == "auto":
        return isinstance(memory, LinearMemory) and memory.overlap_pays()
    return schedule == "overlapped"


def check_schedule(operator: str, schedule: object, causal: object) -> None:
    """Raise InputError unless an operator can be called in this order."""
    check_choice(operator, "schedule", schedule, SCHEDULES, "Leave it out for 'auto'")
    if schedule == "overlapped" and causal is False:
        raise InputError(
            f"{operator}: schedule='overlapped' is for causal attention: with causal=False a token reads nothing before the states "
            "of all ranks are there; got causal=False. Leave out schedule"
        )


def _write_and_read(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Any],
    scale: float | None,
    output_final_state: bool,
    schedule: Schedule,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    memory: StateMemory = write(operator, k, v, **gates, output_final_state=output_final_state, **options)
    o = memory.read_overlapped(q, scale) if overlaps(schedule, memory) else memory.read(q, scale)
    return (o, memory.final_state()) if output_final_state else o


_write_and_read_outside_graphs = outside_graphs(_write_and_read)
