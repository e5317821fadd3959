"""The section [parallel]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from longspan.attention.softmax import SoftmaxMethod
from longspan.errors import ConfigError, InputError, LayoutError
from longspan.exchange import CODECS, TOPOLOGIES, Auto, Codec, Exchanger, TopK
from longspan.layout.shares import check_rank_order, check_weights


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks, and what each of them holds."""

    sp: int = 2
    """Sequence-parallel degree: ranks that share one sequence."""
    dp_shard: int = 1
    """Ranks over which a copy of the weights is divided (FSDP2); they train on different sequences."""
    dp_replicate: int | None = None
    """Copies of the weights; None takes 1, or under torchrun the ranks that dp_shard and sp leave."""
    shard_over_sp: bool = False
    """Divide the weights over the ranks that share a sequence as well."""
    order: Literal["contiguous", "zigzag"] = "zigzag"
    """Which tokens of a sequence a rank holds: one run of them, or two that balance causal softmax layers (zigzag)."""
    balance: tuple[Literal["even", "measured", "remeasured"] | float, ...] = ("even",)
    """Share of each sequence that a rank holds: equal ones (even); by its speed, measured before the first step and kept when the
    run goes on (measured), or measured again (remeasured); or a number for each of the sp ranks, in proportion to the others."""
    rank_order: tuple[Literal["given", "measured", "remeasured"] | int, ...] = ("given",)
    """In which order ranks hold a sequence: that of their numbers (given); the one in which a chain of states passes them fastest,
    by links measured before the first step and kept when the run goes on (measured), or measured again (remeasured); or each of the
    sp ranks once, from 0 on."""
    exchange: str = "auto"
    """How linear layers exchange their states: a topology of docs/exchange.md, or the fastest as measured at the start (auto)."""
    exchange_dtype: Literal["float32", "bfloat16", "float8", "int8", "top_k"] = "float32"
    """What states travel in: rounded (bfloat16), one byte and scales (float8, int8), or the largest of each head alone (top_k);
    sums stay float32."""
    exchange_top_k: float = 0.1
    """Share of a head's numbers that top_k sends."""
    exchange_error_feedback: bool = False
    """Let top_k add what it has left out to what the layer sends next."""
    exchange_max_relative_error: float | None = None
    """With exchange auto: let the cost model choose what states travel in, with at most so large an error of one passage."""
    softmax_method: SoftmaxMethod = "auto"
    """How softmax layers exchange their keys and values."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there is one for each local rank."""
    threads: int | None = None
    """CPU threads of a rank; None divides the cores between the local ranks."""
    timeout_seconds: float = 600.0
    """Give up when a collective has waited this long for another rank."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The numbers of `balance`; None where it is a word.

        Raises:
            ConfigError: for words and numbers together, and for numbers that are no weights of `sp` ranks.
        """
        words = [entry for entry in self.balance if isinstance(entry, str)]
        if len(words) == len(self.balance) == 1:
            return None
        if words or not self.balance:
            raise ConfigError(
                f"parallel.balance is {list(self.balance)}; it must be 'even', 'measured', 'remeasured', or one number for each of "
                f"the {self.sp} ranks of parallel.sp"
            )
        numbers = tuple(entry for entry in self.balance if not isinstance(entry, str))
        try:
            check_weights(numbers, self.sp)
        except LayoutError as error:
            raise ConfigError(f"parallel.balance: {error}") from error
        return numbers

    @property
    def given_rank_order(self) -> tuple[int, ...] | None:
        """The ranks of `rank_order`; None where it is a word.

        Raises:
            ConfigError: for words and numbers together, and for numbers that are no order of `sp` ranks.
        """
        words = [entry for entry in self.rank_order if isinstance(entry, str)]
        if len(words) == len(self.rank_order) == 1:
            return None
        if words or not self.rank_order:
            raise ConfigError(
                f"parallel.rank_order is {list(self.rank_order)}; it must be 'given', 'measured', 'remeasured', or each of the "
                f"{self.sp} ranks of parallel.sp once"
            )
        numbers = tuple(entry for entry in self.rank_order if not isinstance(entry, str))
        try:
            return check_rank_order(numbers, self.sp)
        except LayoutError as error:
            raise ConfigError(f"parallel.rank_order: {error}") from error

    def build_exchange(self, measure: bool = True) -> Exchanger:
        """How linear layers are told to exchange their states. measure: whether auto chooses by what it measures, or by figures.

        Raises:
            ConfigError: for a topology that does not exist.
        """
        if self.exchange != "auto" and self.exchange not in TOPOLOGIES:
            raise ConfigError(
                f"parallel.exchange must be 'auto' or one of {', '.join(map(repr, TOPOLOGIES))}; got {self.exchange!r}"
            )
        state_dtype, codec = self._wire()
        if self.exchange == "auto":
            try:
                return Auto(
                    state_dtype, measure=measure, max_relative_error=self.exchange_max_relative_error, codec=codec
                )
            except InputError as error:
                raise ConfigError(f"parallel.exchange_max_relative_error: {error}") from error
        if self.exchange_max_relative_error is not None:
            raise ConfigError(
                f"parallel.exchange_max_relative_error is {self.exchange_max_relative_error}, by which parallel.exchange 'auto' "
                f"chooses; parallel.exchange is {self.exchange!r}. Leave one of them out, or name a parallel.exchange_dtype"
            )
        return TOPOLOGIES[self.exchange](state_dtype, codec=codec)

    def _wire(self) -> tuple[torch.dtype | None, Codec | None]:
        """What states are rounded to, and what they are coded by."""
        if self.exchange_dtype == "top_k":
            try:
                return None, TopK(self.exchange_top_k, self.exchange_error_feedback)
            except InputError as error:
                raise ConfigError(f"parallel.exchange_top_k: {error}") from error
        for name, default in (("exchange_top_k", 0.1), ("exchange_error_feedback", False)):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"parallel.{name} is {getattr(self, name)}, which is an option of parallel.exchange_dtype 'top_k'; it is "
                    f"{self.exchange_dtype!r}. Leave parallel.{name} out"
                )
        if self.exchange_dtype in CODECS:
            return None, CODECS[self.exchange_dtype]()
        return (torch.bfloat16 if self.exchange_dtype == "bfloat16" else None), None
