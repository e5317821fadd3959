"""Keys of earlier stretches brought together: whole on every rank, as an initial state is.

Shapes: B batch rows, L tokens of all ranks that are kept, of a part or of all, H_kv key and value heads, D head dimension, D_v that
of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.softmax.checks import check_window
from longspan.attention.softmax.earlier import NAME, EarlierKeys, KeyPart
from longspan.attention.softmax.final_state import KeysAndValues
from longspan.attention.softmax.gathering import gathered_runs, start_gather
from longspan.attention.softmax.host_memory import one_ahead
from longspan.attention.softmax.packing import take_runs, unpack
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout
from longspan.layout.visibility import length, located, union


@torch.no_grad()
def whole_keys(earlier: EarlierKeys, layout: SequenceLayout, window: int | None = None) -> KeysAndValues:
    """See `EarlierKeys.whole`."""
    check_window(window)
    if not earlier.parts:
        raise InputError(f"{NAME}: there are no keys yet, of {earlier.num_tokens} tokens. Read a stretch first")
    check_layout(layout, layout.num_local_tokens, NAME)
    k, v = earlier.parts[0].k, earlier.parts[0].v
    num_tokens = sum(length(run) for part in earlier.parts for run in part.runs)
    device = earlier.parts[0].device
    found = [x.new_empty((x.shape[0], num_tokens, *x.shape[2:]), device=device) for x in (k, v)]
    offset = 0
    for part, coming in one_ahead(earlier.parts, lambda x: (x, x.fetch(with_grads=False))):
        own = coming.wait()
        for whole, x in zip(found, _gathered(part, own[0], own[1], layout), strict=True):
            whole[:, offset : offset + x.shape[1]] = x
        offset += x.shape[1]
        del own, coming
    last = num_tokens if window is None else min(window - 1, num_tokens)
    return found[0][:, num_tokens - last :], found[1][:, num_tokens - last :]


def _gathered(part: KeyPart, k: Tensor, v: Tensor, layout: SequenceLayout) -> Sequence[Tensor]:
    """A part's keys and values ``[B, L, H_kv, D or D_v]`` in the order of the sequence."""
    runs = union(run for own in part.runs for run in own)
    if layout.num_ranks == 1:
        return k, v
    longest = max(map(length, part.runs))
    arrived = start_gather(k, v, longest, layout, "earlier keys and values").wait()
    return unpack(take_runs(arrived, located(runs, gathered_runs(part.runs, longest))), k, v)
