"""The algebra of memory states: transitions, pairs, and their exclusive scan.

To a memory state S every stretch of tokens does ``S_out = A · S_in + U``. The pairs (A, U) compose associatively,

    (A2, U2) ∘ (A1, U1) = (A2 A1, A2 U1 + U2),

so the state that enters each stretch is an exclusive scan of pairs (LASP-2, arXiv 2502.07563, section 3; GLA, arXiv 2312.06635,
section 4). Variants of linear attention differ in the form of A alone.

Shapes: n stretches, B batch rows, H heads, K key size, V value size. States are ``[n, B, H, K, V]``. A transition object holds
the transitions of n stretches in one parameter tensor:

| class        | parameter           | A                          | numbers sent per stretch |
|--------------|---------------------|----------------------------|--------------------------|
| Identity     | log A, [n]          | 1                          | 0                        |
| HeadDecay    | log A, [n, H]       | γ_h^length                 | 0                        |
| ScalarDecay  | log A, [n, B, H]    | one number per head        | B·H                      |
| ChannelDecay | log A, [n, B, H, K] | one number per key channel | B·H·K                    |
| RateDecay    | Σ steps, [n, B, H]  | one number per key channel | B·H                      |
| LengthDecay  | Σ tokens, [n]       | one number per key channel | 0                        |
| Dense        | A, [n, B, H, K, K]  | a matrix                   | B·H·K·K                  |

RateDecay's log A is Σ steps times rates [H, K] that every rank knows, LengthDecay's the number of tokens times such rates, which
may be complex: two rows of a state are then one complex number. Rates belong to the *form* of a transition: what makes one of a
parameter, a class for all others (`Transition.form`).

A stretch in which a packed document starts has a zero transition: log A = −inf (RateDecay, LengthDecay: infinitely many steps;
Dense: a zero matrix), and needs no special case anywhere. Nothing crosses a zero transition, NaN and infinity included: it selects
zero, where a product would be NaN.
Decays are kept as logarithms in the dtype of the states: float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition(ABC):
    """The transitions A of n stretches of tokens, in one parameter tensor whose first dimension counts the stretches."""

    parameter: Tensor

    is_known: ClassVar[bool]
    """True where every rank can compute every stretch's A by itself, so that it is never sent."""

    @property
    def num_stretches(self) -> int:
        return self.parameter.shape[0]

    @property
    def form(self) -> Form:
        """What makes such a transition of another parameter."""
        return type(self)

    def __getitem__(self, index: int) -> Self:
        """The transition of one stretch, still with a first dimension (of size 1)."""
        return replace(self, parameter=self.parameter[index : index + 1])

    @classmethod
    @abstractmethod
    def parameter_shape(cls, state_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the parameter for states of shape ``[n, B, H, K, V]``."""

    @classmethod
    def repeated(cls, times: int) -> Form:
        """The form for states whose heads are those of `times` batch rows, one row after another."""
        return cls

    @classmethod
    def of_heads(cls, heads: slice) -> Form:
        """The form for states that have some of the heads."""
        return cls

    @abstractmethod
    def apply(self, state: Tensor) -> Tensor:
        """A · S for states ``[n, B, H, K, V]``."""

    @abstractmethod
    def adjoint(self) -> Self:
        """Aᵀ: what carries gradients of states backwards."""

    @abstractmethod
    def after(self, earlier: Self) -> Self:
        """The transition of `earlier` followed by this one: A_self · A_earlier."""

    @abstractmethod
    def cut(self, stretches: Sequence[bool]) -> Self:
        """The same transitions, zero for the stretches that are True: those in which a document starts."""

    @abstractmethod
    def outer(self, grad_out: Tensor, state_in: Tensor) -> Tensor:
        """Gradient of the parameter, given λ = ∂L/∂S_out and S_in ``[n, B, H, K, V]``: λ S_inᵀ projected on A's form.

        For decays it is the gradient of the logarithm, ``A ⊙ Σ λ ⊙ S_in``.
        """


class _LogDecay(Transition):
    """Transitions that multiply a state by exp(parameter), broadcast over the dimensions that the parameter lacks."""

    state_dims: ClassVar[tuple[int, ...]]
    """Which of the state's dimensions n, B, H, K, V (0 to 4) the parameter has."""

    @classmethod
    def parameter_shape(cls, state_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(state_shape[dim] for dim in cls.state_dims)

    def _factor(self) -> Tensor:
        shape = [1] * 5
        for size, dim in zip(self.parameter.shape, self.state_dims, strict=True):
            shape[dim] = size
        return self.parameter.exp().view(shape)

    def apply(self, state: Tensor) -> Tensor:
        factor = self._factor()
        return _without(state, factor == 0) * factor

    def adjoint(self) -> Self:
        return self

    def after(self, earlier: Self) -> Self:
        total = self.parameter + earlier.parameter
        # A sum with −inf is −inf, but for NaN and infinity.
        zero = (self.parameter == -torch.inf) | (earlier.parameter == -torch.inf)
        return type(self)(torch.where(zero, -torch.inf, total))

    def cut(self, stretches: Sequence[bool]) -> Self:
        if not any(stretches):
            return self
        return replace(self, parameter=_replace_rows(self.parameter, stretches, -torch.inf))

    def outer(self, grad_out: Tensor, state_in: Tensor) -> Tensor:
        summed_dims = [dim for dim in range(5) if dim not in self.state_dims]
        factor = self.parameter.exp()
        return _without((grad_out * state_in).sum(summed_dims), factor == 0) * factor


class Identity(_LogDecay):
    """A = 1 (basic linear attention), or 0 where a document starts. parameter: ``[n]``, 0 or −inf."""

    is_known = True
    state_dims = (0,)


@dataclass(frozen=True)
class HeadDecay(_LogDecay):
    """A = γ_h^length (Lightning Attention, RetNet). parameter: ``[n, H]``, length · log γ_h, or −inf.

    log_decay: log γ of each head as the host knows them; None where a device alone does. The host reads no parameter of another
    device than the CPU: it would wait.
    """

    log_decay: tuple[float, ...] | None = None

    is_known = True
    state_dims = (0, 2)


class ScalarDecay(_LogDecay):
    """A = one number per head (Mamba-2, simple GLA). parameter: ``[n, B, H]``, the sum of the stretch's log decays, or −inf."""

    is_known = False
    state_dims = (0, 1, 2)


class ChannelDecay(_LogDecay):
    """A = one number per key channel (GLA, HGRN2). parameter: ``[n, B, H, K]``, sums of log decays, or −inf."""

    is_known = False
    state_dims = (0, 1, 2, 3)


@dataclass(frozen=True)
class RateDecay(Transition):
    """A = one number per key channel, e^(rate · steps) (Mamba). parameter: ``[n, B, H]``, sums of steps of at least 0, or +inf.

    rates: ``[H, K]``, at most 0, the same on every rank; they are never sent, and take no gradient from here.
    """

    rates: Tensor

    is_known = False

    @property
    def form(self) -> Form:
        return Rates(self.rates)

    @classmethod
    def parameter_shape(cls, state_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(state_shape[:3])

    def _is_zero(self) -> Tensor:
        return (self.parameter == torch.inf).unsqueeze(-1)

    def _factor(self) -> Tensor:
        # A rate of 0 times infinitely many steps is NaN.
        return (self.parameter.unsqueeze(-1) * self.rates).exp().masked_fill(self._is_zero(), 0.0)

    def apply(self, state: Tensor) -> Tensor:
        factor = self._factor().unsqueeze(-1)
        return _without(state, factor == 0) * factor

    def adjoint(self) -> Self:
        return self

    def after(self, earlier: Self) -> Self:
        # A sum with +inf is +inf, but for NaN.
        zero = (self.parameter == torch.inf) | (earlier.parameter == torch.inf)
        return replace(self, parameter=torch.where(zero, torch.inf, self.parameter + earlier.parameter))

    def cut(self, stretches: Sequence[bool]) -> Self:
        if not any(stretches):
            return self
        return replace(self, parameter=_replace_rows(self.parameter, stretches, torch.inf))

    def outer(self, grad_out: Tensor, state_in: Tensor) -> Tensor:
        factor = self._factor()
        return (_without((grad_out * state_in).sum(-1), factor == 0) * factor * self.rates).sum(-1)


@dataclass(frozen=True, eq=False)
class Rates:
    """The form of `RateDecay` for some rates ``[H, K]``."""

    rates: Tensor

    is_known: ClassVar[bool] = False

    def __call__(self, parameter: Tensor) -> RateDecay:
        return RateDecay(parameter, self.rates)

    def parameter_shape(self, state_shape: Sequence[int]) -> tuple[int, ...]:
        """As of `Transition`."""
        return RateDecay.parameter_shape(state_shape)

    def repeated(self, times: int) -> Rates:
        """As of `Transition`."""
        return Rates(self.rates.repeat(times, 1))

    def of_heads(self, heads: slice) -> Rates:
        """As of `Transition`."""
        return Rates(self.rates[heads])


@dataclass(frozen=True)
class LengthDecay(Transition):
    """A = e^(rate · tokens) for each key channel (sums of exponentials). parameter: ``[n]`` float64, tokens of stretches, or +inf.

    rates: the same on every rank, and so never sent; they take no gradient from here. Real, float64 ``[H, K]``, at most 0. Or
    complex, complex128 ``[H, K / 2]`` with real parts of at most 0: the first half of a state's rows are the real parts of complex
    numbers, the second half their imaginary parts, and A multiplies these. Powers are made in float64: a phase keeps its digits.
    """

    rates: Tensor

    is_known = True

    @property
    def form(self) -> Form:
        return LengthRates(self.rates)

    @classmethod
    def parameter_shape(cls, state_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(state_shape[:1])

    def factor(self) -> Tensor:
        """e^(rate · tokens), ``[n, H, K]`` float64, or ``[n, H, K / 2]`` complex128; exactly zero for zero transitions."""
        lengths = self.parameter.view(-1, 1, 1)
        return (lengths * self.rates).exp().masked_fill(lengths == torch.inf, 0.0)

    def apply(self, state: Tensor) -> Tensor:
        factor = self.factor()[:, None, :, :, None]
        if not factor.is_complex():
            factor = factor.to(state.dtype)
            return _without(state, factor == 0) * factor
        real, imaginary = factor.real.to(state.dtype), factor.imag.to(state.dtype)
        zero = (real == 0) & (imaginary == 0)
        upper, lower = _without(state, torch.cat([zero, zero], dim=3)).chunk(2, dim=3)
        return torch.cat([real * upper - imaginary * lower, real * lower + imaginary * upper], dim=3)

    def adjoint(self) -> Self:
        return replace(self, rates=self.rates.conj()) if self.rates.is_complex() else self

    def after(self, earlier: Self) -> Self:
        return replace(self, parameter=self.parameter + earlier.parameter)

    def cut(self, stretches: Sequence[bool]) -> Self:
        if not any(stretches):
            return self
        return replace(self, parameter=_replace_rows(self.parameter, stretches, torch.inf))

    def outer(self, grad_out: Tensor, state_in: Tensor) -> Tensor:
        factor = self.factor()
        return (self.of_numbers(grad_out, state_in).sum(1) * factor.conj() * self.rates.conj()).real.sum((1, 2))

    def of_numbers(self, grad_out: Tensor, state_in: Tensor) -> Tensor:
        """``Σ_V conj(S_in) ⊙ λ`` of the numbers that A multiplies, ``[n, B, H, K]`` or complex ``[n, B, H, K / 2]``."""
        if self.rates.is_complex():
            grad, state = (torch.complex(*x.chunk(2, dim=3)) for x in (grad_out, state_in))
            found = (grad * state.conj()).sum(-1)
        else:
            found = (grad_out * state_in).sum(-1)
        return _without(found, (self.factor() == 0).unsqueeze(1))


@dataclass(frozen=True, eq=False)
class LengthRates:
    """The form of `LengthDecay` for some rates ``[H, K]``, or complex ``[H, K / 2]``."""

    rates: Tensor

    is_known: ClassVar[bool] = True

    def __call__(self, parameter: Tensor) -> LengthDecay:
        return LengthDecay(parameter, self.rates)

    def parameter_shape(self, state_shape: Sequence[int]) -> tuple[int, ...]:
        """As of `Transition`."""
        return LengthDecay.parameter_shape(state_shape)

    def repeated(self, times: int) -> LengthRates:
        """As of `Transition`."""
        return LengthRates(self.rates.repeat(times, 1))

    def of_heads(self, heads: slice) -> LengthRates:
        """As of `Transition`."""
        return LengthRates(self.rates[heads])


Form = type[Transition] | Rates | LengthRates
"""What makes a transition of its parameter, and says what it is of states of some shape."""


class Dense(Transition):
    """A = a K×K matrix (DeltaNet, Gated DeltaNet, KDA). parameter: ``[n, B, H, K, K]``, the matrix itself."""

    is_known = False

    @classmethod
    def parameter_shape(cls, state_shape: Sequence[int]) -> tuple[int, ...]:
        return (*state_shape[:4], state_shape[3])

    def _is_zero(self) -> Tensor:
        """Which matrices are zero, ``[n, B, H, 1, 1]``."""
        return (self.parameter == 0).all(-1, keepdim=True).all(-2, keepdim=True)

    def apply(self, state: Tensor) -> Tensor:
        return self.parameter @ _without(state, self._is_zero())

    def adjoint(self) -> Self:
        return type(self)(self.parameter.mT)

    def after(self, earlier: Self) -> Self:
        own = _without(self.parameter, earlier._is_zero())
        return type(self)(own @ _without(earlier.parameter, self._is_zero()))

    def cut(self, stretches: Sequence[bool]) -> Self:
        if not any(stretches):
            return self
        return type(self)(_replace_rows(self.parameter, stretches, 0.0))

    def outer(self, grad_out: Tensor, state_in: Tensor) -> Tensor:
        return _without(grad_out @ state_in.mT, self._is_zero())


def _without(x: Tensor, zero: Tensor) -> Tensor:
    """`x` with zeros in the place of what a zero transition meets: 0 · NaN and 0 · ∞ are NaN."""
    # The mask is as small as a transition, and the host has it on a CPU: a pass over the states is saved where nothing is cut.
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(zero.any()):
        return x
    return x.masked_fill(zero, 0.0)


def _replace_rows(parameter: Tensor, rows: Sequence[bool], value: float) -> Tensor:
    constant = torch.full_like(parameter[0], value)
    return torch.stack([constant if replaced else parameter[row] for row, replaced in enumerate(rows)])


@dataclass(frozen=True)
class Pair:
    """What n stretches of tokens do to a memory state: ``S_out = A · S_in + U``.

    transition: the n transitions A. state: U ``[n, B, H, K, V]``, the state that each stretch writes starting from zero.
    """

    transition: Transition
    state: Tensor

    def apply(self, state_in: Tensor) -> Tensor:
        """A · S_in + U."""
        return self.transition.apply(state_in) + self.state

    def after(self, earlier: Pair) -> Pair:
        """`earlier` followed by this pair, as one pair."""
        return Pair(self.transition.after(earlier.transition), self.apply(earlier.state))


def exclusive_scan(pair: Pair, initial_state: Tensor | None = None) -> Tensor:
    """The state that enters each of n stretches, given their pairs in order.

    Args:
        pair: (A, U) of n stretches.
        initial_state: state before the first stretch, ``[B, H, K, V]``; None is zero.

    Returns:
        ``[n, B, H, K, V]``; ``S_in,0 = initial_state``, ``S_in,i+1 = A_i · S_in,i + U_i``.
    """
    state = torch.zeros_like(pair.state[:1]) if initial_state is None else initial_state.unsqueeze(0)
    incoming = [state]
    for index in range(pair.state.shape[0] - 1):
        state = pair.transition[index].apply(state) + pair.state[index : index + 1]
        incoming.append(state)
    return torch.cat(incoming)


def exclusive_scan_adjoint(transition: Transition, grad_in: Tensor) -> Tensor:
    """Gradient of the state that leaves each of n stretches: the same scan from the last to the first, on (Aᵀ, G).

    Args:
        transition: A of n stretches.
        grad_in: G ``[n, B, H, K, V]``, gradient of the state that enters each stretch, from that stretch's own output.

    Returns:
        λ ``[n, B, H, K, V]``; ``λ_{n-1} = 0``, ``λ_i = G_{i+1} + A_{i+1}ᵀ λ_{i+1}``. It is also the gradient of U.
    """
    adjoint = transition.adjoint()
    grad = torch.zeros_like(grad_in[:1])
    outgoing = [grad]
    for index in range(grad_in.shape[0] - 1, 0, -1):
        grad = adjoint[index].apply(grad) + grad_in[index : index + 1]
        outgoing.append(grad)
    outgoing.reverse()
    return torch.cat(outgoing)
