"""What `selective_scan` refuses: what does not fit, before anything is sent, and on every rank alike.

Shapes: as in `longspan.attention.selective_scan`.
"""

from __future__ import annotations

from torch import Tensor

from longspan.autocast import as_in_product
from longspan.checks import check_not_empty, check_same_device, check_tensor, check_tensors
from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError
from longspan.exchange.all_reduce import max_over_ranks
from longspan.layout import SequenceLayout
from longspan.ops.backends import DTYPES, MAX_HEAD_SIZE, TRITON_CHUNK_SIZES, choose_backend
from longspan.ops.selective_scan.block import ScanInputs
from longspan.tracing import has_no_values

NAME = "selective_scan"
BACKENDS = ("torch", "triton")


def checked_inputs(given: ScanInputs) -> ScanInputs:
    """The tensors with u as a matrix product has it, and B and C as ``[B, T, G, N]``; raises as `selective_scan` does."""
    optional = {"D": given.D, "z": given.z, "delta_bias": given.delta_bias}
    check_tensors(NAME, u=given.u, delta=given.delta, A=given.A, B=given.B, C=given.C)
    check_tensors(NAME, **{name: x for name, x in optional.items() if x is not None})
    u = as_in_product(given.u)
    if u.dim() != 3:
        raise InputError(
            f"{NAME} takes u [B, T, E], tokens before channels; got shape {tuple(u.shape)}. Transpose what has its tokens last: "
            "u.transpose(1, 2)"
        )
    check_not_empty(NAME, "u", u, "row, token and channel")
    check_same_device(NAME, u=u, delta=given.delta, A=given.A, B=given.B, C=given.C, **optional)
    num_channels = u.shape[2]
    B, C = (_in_groups(name, x, u) for name, x in (("B", given.B), ("C", given.C)))
    if B.shape != C.shape:
        raise InputError(
            f"{NAME}: B and C must have one shape; got {tuple(given.B.shape)} and {tuple(given.C.shape)}. Expand the one that has "
            "fewer groups"
        )
    if u.dtype not in DTYPES["torch"] + DTYPES["triton"] or not u.dtype == B.dtype == C.dtype:
        raise InputError(
            f"{NAME} takes u, B and C of one dtype out of float64, float32, bfloat16; got {u.dtype}, {B.dtype} and {C.dtype}. "
            "Convert them before the call"
        )
    _expect("delta", given.delta, tuple(u.shape), "[B, T, E]")
    _expect("A", given.A, (num_channels, B.shape[3]), "[E, N]")
    for name, x in optional.items():
        if x is not None:
            _expect(name, x, *((tuple(u.shape), "[B, T, E]") if name == "z" else ((num_channels,), "[E]")))
    return given._replace(u=u, B=B, C=C)


def _in_groups(name: str, x: Tensor, u: Tensor) -> Tensor:
    """B or C as ``[B, T, G, N]``."""
    batch, num_tokens, num_channels = u.shape
    grouped = x.unsqueeze(2) if x.dim() == 3 else x
    if grouped.dim() != 4 or tuple(grouped.shape[:2]) != (batch, num_tokens):
        raise InputError(
            f"{NAME}: {name} must be [B, T, N] or [B, T, G, N] with B and T {(batch, num_tokens)} as u has them; got "
            f"{tuple(x.shape)}. Expand one that is the same for all tokens, and transpose one that has its tokens last"
        )
    check_not_empty(NAME, name, grouped, "group and number of a state")
    if num_channels % grouped.shape[2]:
        raise InputError(
            f"{NAME}: the {num_channels} channels of u must be a multiple of the {grouped.shape[2]} groups of {name}. Pass as "
            "many groups as divide the channels"
        )
    return grouped


def _expect(name: str, x: Tensor, shape: tuple[int, ...], dims: str) -> None:
    if tuple(x.shape) != shape:
        raise InputError(
            f"{NAME}: {name} must be {dims} = {shape}; got shape {tuple(x.shape)}. Lay it out as the docstring says"
        )


def chosen_backend(inputs: ScanInputs, backend: str | None, chunk_size: int | None) -> str:
    """The backend of a call; raises as `selective_scan` does."""
    fits = inputs.A.shape[1] <= MAX_HEAD_SIZE and (chunk_size is None or chunk_size in TRITON_CHUNK_SIZES)
    backend = choose_backend(NAME, BACKENDS, inputs.u, fits, backend)
    if inputs.u.dtype not in DTYPES[backend]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[backend])
        raise InputError(
            f"{NAME} takes u of {names} with backend={backend!r}; got {inputs.u.dtype}. Convert it before the call"
        )
    return backend


def check_initial_state(inputs: ScanInputs, initial_state: Tensor | None, layout: SequenceLayout) -> None:
    """Raise InputError for a state that does not fit."""
    if initial_state is None:
        return
    check_tensor(NAME, "initial_state", initial_state)
    rows, first = (layout.num_documents, "num_documents") if layout.has_document_states else (inputs.u.shape[0], "B")
    expected, dtype = (rows, *inputs.A.shape), accumulation_dtype(inputs.u.dtype)
    if tuple(initial_state.shape) != expected or initial_state.dtype != dtype:
        raise InputError(
            f"{NAME}: initial_state must be [{first}, E, N] = {expected} in {dtype}; got {tuple(initial_state.shape)} in "
            f"{initial_state.dtype}. Convert it with initial_state.to({dtype})"
        )
    check_same_device(NAME, u=inputs.u, initial_state=initial_state)


def check_signs(inputs: ScanInputs, delta_softplus: bool, layout: SequenceLayout) -> None:
    """Raise InputError for rates above 0 and steps below 0, on every rank alike; what is NaN is neither, and shows in outputs."""
    # On other devices the check would make the host wait; a compiler does not see values.
    if inputs.u.device.type != "cpu" or has_no_values(inputs.u):
        return
    largest = float(inputs.A.detach().amax())
    if largest > 0:
        raise InputError(
            f"{NAME}: A holds rates of decay and must not exceed 0; its largest value is {largest:g}. Use for example "
            "-torch.exp(A_log)"
        )
    if delta_softplus:
        return
    steps = inputs.delta.detach()
    if inputs.delta_bias is not None:
        steps = steps + inputs.delta_bias.detach().to(steps.dtype)
    # A rank that raised alone would leave the others waiting for its state.
    depth = float(max_over_ranks((-steps.amin().double()).nan_to_num(nan=0.0).view(1), layout))
    if depth > 0:
        raise InputError(
            f"{NAME}: delta holds step sizes and must be at least 0{'' if inputs.delta_bias is None else ' with delta_bias'}; the "
            f"smallest of all ranks is {-depth:g}. If these are logits, pass delta_softplus=True"
        )
