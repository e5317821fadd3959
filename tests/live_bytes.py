"""How many bytes of tensors live at once: what an allocator is asked for, whatever it makes of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes of memory that operators have returned in the block and that lived at once; what was there before not counted.

    most: so far. Deterministic, where the memory of a process is not. Backward on a CPU runs in the block as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._note(x)
        return result

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        known = self._living.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._at_most += storage.nbytes() - (0 if known is None else known[1])
        self._living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        # What has gone meanwhile is looked for where it could matter.
        if self._at_most > self.most:
            self._living = {key: kept for key, kept in self._living.items() if not kept[0].expired()}
            self._at_most = sum(num_bytes for _, num_bytes in self._living.values())
            self.most = max(self.most, self._at_most)
