"""What a Linear-Llama3 remembers of each row of a batch, as a cache of Transformers.

Rows of a padded batch have seen different numbers of tokens. A model's memory is of rows that have seen equally many, so a cache
holds one memory for each such number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache

from longspan.errors import InputError
from longspan.models.memory import ModelMemory
from longspan.models.mixers import LayerMemory


@dataclass(frozen=True)
class RowGroup:
    """Rows of a batch that have seen the same number of tokens.

    rows: their numbers in the batch. memory: of these rows, in this order; None before the first token.
    """

    rows: tuple[int, ...]
    memory: ModelMemory | None = None

    def take(self, places: Sequence[int], rows: Sequence[int]) -> RowGroup:
        """The rows at `places` of this group, any number of times, which are called `rows` from now on."""
        if self.memory is None or list(places) == list(range(len(self.rows))):
            return RowGroup(tuple(rows), self.memory)
        return RowGroup(tuple(rows), select_rows(self.memory, places))


class LinearLlamaCache(Cache):
    """``past_key_values`` of `LinearLlamaForCausalLM`, which fills it in place.

    A linear layer takes memory that does not grow with the number of tokens, a softmax layer a key and a value for each token that
    is still seen. A state cannot be taken back: `crop` is refused, and with it assisted generation.

    groups: what the rows remember, empty before the first call. num_columns: tokens of a row so far, padding included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.groups: list[RowGroup] = []
        self.num_columns = 0

    @classmethod
    def of(cls, memory: ModelMemory) -> LinearLlamaCache:
        """A cache of rows that have all seen the same number of tokens."""
        cache = cls()
        cache.groups = [RowGroup(tuple(range(batch_of(memory))), memory)]
        cache.num_columns = memory.num_tokens
        return cache

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is remembered."""
        return sum(group.memory.num_bytes for group in self.groups if group.memory is not None)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return sum(len(group.rows) for group in self.groups) if self.groups else -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row so far, padding included, as attention masks count them."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no largest length."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there were tokens."""
        return self.num_columns > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be what row beam_idx[i] was, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these numbers, in this order, each as often as it is named."""
        chosen: list[int] = indices.tolist()
        selected = []
        for group in self.groups:
            place_of = {row: place for place, row in enumerate(group.rows)}
            rows = [row for row, before in enumerate(chosen) if before in place_of]
            if rows:
                selected.append(group.take([place_of[chosen[row]] for row in rows], rows))
        self.groups = selected

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one behind the other."""
        if self.groups:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.groups, self.num_columns = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove no tokens.

        Raises:
            InputError: for any other number.
        """
        if tokens_to_remove:
            raise InputError(
                f"a cache of linear layers cannot take back tokens; crop({tokens_to_remove}) was asked for. Keep a "
                "copy.deepcopy(cache) of before them"
            )

    @property
    def is_croppable(self) -> bool:
        """False: a state of linear attention holds no single tokens."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: what is remembered is another tensor after each token."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return bool(self.groups)

    def __len__(self) -> int:
        """Layers that it holds something of."""
        memory = next((group.memory for group in self.groups if group.memory is not None), None)
        return 0 if memory is None else len(memory.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rows={self.batch_size}, num_columns={self.num_columns}, num_bytes={self.num_bytes:,})"

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: the model fills its cache itself."""
        raise InputError(
            "a LinearLlamaCache is filled by LinearLlamaForCausalLM alone; a layer of another model has called update(). Give each "
            "model a cache of its own"
        )


def batch_of(memory: ModelMemory) -> int:
    """Rows of a memory."""
    return next(len(tensor) for layer in memory.layers for tensor in layer.tensors.values())


def select_rows(memory: ModelMemory, rows: Sequence[int]) -> ModelMemory:
    """What a model remembers of some rows, in this order: each tensor's first dimension is the batch."""

    def of_layer(layer: LayerMemory) -> LayerMemory:
        return LayerMemory(
            {
                name: tensor.index_select(0, torch.tensor(rows, device=tensor.device))
                for name, tensor in layer.tensors.items()
            }
        )

    return ModelMemory(memory.num_tokens, tuple(of_layer(layer) for layer in memory.layers))
