"""What each weight of a mixer is made of where a Llama's attention becomes one: a table, one entry a mixer.

What is shared is copied: queries, keys, values and the output's projection, as in T2R (arXiv 2103.13076), LoLCATs (2410.10254) and,
with C, B and x of Mamba for queries, keys and values, the Mamba in the Llama (2408.15237). What a mixer has of its own starts where
it changes least: decays slow, short convolutions passing the token itself, gates by σ open to the same share everywhere, norms at
the size of the values. What no entry names keeps the mixer's own initial values, as Mamba-2's steps and decays do in the Mamba in
the Llama.

Shapes: C channels of the residual stream, H heads, H_kv key and value heads, D head dimension, K channels of a mixer's keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.models.mixers.mamba2 import STATE_SIZE


@dataclass(frozen=True)
class Attention:
    """What a layer of a Llama has, float32: q ``[H, D, C]``, k, v ``[H_kv, D, C]``, o ``[C, H, D]``, norm ``[C]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm: Tensor

    @property
    def repeats(self) -> int:
        """Query heads of a key and value head."""
        return len(self.q) // len(self.k)

    @property
    def keys(self) -> Tensor:
        """Keys of all heads, ``[H, D, C]``."""
        return self.k.repeat_interleave(self.repeats, dim=0)

    @property
    def values(self) -> Tensor:
        """Values of all heads, ``[H, D, C]``."""
        return self.v.repeat_interleave(self.repeats, dim=0)

    @property
    def size_of_values(self) -> float:
        """Root mean square of the values of an input whose channels, behind the norm, are of mean square one and independent."""
        return float((self.v * self.norm).square().sum(-1).mean().sqrt())


@dataclass(frozen=True)
class Made:
    """A weight: its numbers, how they were made, of which of Llama's projections, and how many of them those decided."""

    tensor: Tensor
    how: str
    sources: tuple[str, ...] = ()
    num_taken: int = 0


Make = Callable[[Attention, Tensor], Made]
"""Makes a weight of a layer's attention and the mixer's own initial value of it."""

_SLOWEST, _FASTEST = 4096.0, 32.0
"""Tokens of the time constants that decays begin with, spread over heads."""

_LEAST_SHARE = -4.0
"""Bias of RWKV-7's shares of the first layer's values: 2 % of them."""


def _taken(tensor: Tensor, how: str, *sources: str) -> Made:
    return Made(tensor, how, sources, tensor.numel())


def _repeated(attention: Attention, how: str) -> str:
    return how if attention.repeats == 1 else f"{how}, each head {attention.repeats} times"


def _query(attention: Attention, drawn: Tensor) -> Made:
    return _taken(attention.q.flatten(0, 1), "copied", "q_proj")


def _key(attention: Attention, drawn: Tensor) -> Made:
    return _taken(attention.keys.flatten(0, 1), _repeated(attention, "copied"), "k_proj")


def _negative_key(attention: Attention, drawn: Tensor) -> Made:
    """HGRN2's key is σ(−forget), times what its bound leaves: σ of Llama's key so. Liger (2503.01496) makes gates of keys, too."""
    return _taken(-attention.keys.flatten(0, 1), _repeated(attention, "copied with the other sign"), "k_proj")


def _value(attention: Attention, drawn: Tensor) -> Made:
    return _taken(attention.values.flatten(0, 1), _repeated(attention, "copied"), "v_proj")


def _out(attention: Attention, drawn: Tensor) -> Made:
    return _taken(attention.o.flatten(1), "copied", "o_proj")


def _twice_the_values(attention: Attention, drawn: Tensor) -> Made:
    both = torch.cat([attention.values, attention.values], dim=1)
    return _taken(both.flatten(0, 1), _repeated(attention, "copied, the channels of a head twice"), "v_proj")


def _half_the_out(attention: Attention, drawn: Tensor) -> Made:
    both = torch.cat([attention.o, attention.o], dim=2) / 2
    return _taken(both.flatten(1), "copied, half for each copy of the values", "o_proj")


def _of_first_step(make: Make) -> Make:
    """The rows of a token's first step; its others keep their initial values."""

    def made(attention: Attention, drawn: Tensor) -> Made:
        first, tensor = make(attention, drawn), drawn.clone()
        tensor[: len(first.tensor)] = first.tensor
        return Made(tensor, f"the first step of a token: {first.how}; others: new", first.sources, first.num_taken)

    return made


def _reduced_query(attention: Attention, drawn: Tensor) -> Made:
    return _reduced(attention, drawn, 0, "q_proj")


def _reduced_key(attention: Attention, drawn: Tensor) -> Made:
    return _reduced(attention, drawn, 1, "k_proj")


def _reduced(attention: Attention, drawn: Tensor, which: int, name: str) -> Made:
    """Keys of fewer channels: those of a head in which queries and keys meet most."""
    num_heads, size = attention.q.shape[:2]
    tensor = drawn.clone().unflatten(0, (num_heads, -1))
    wanted = tensor.shape[1]
    factor = meeting_channels(attention.q, attention.keys, wanted)[which]
    # What attends takes q·k / √K, and Llama's softmax q·k / √D.
    tensor[:, : factor.shape[1]] = factor * (wanted / size) ** 0.25
    kept = f"{factor.shape[1]} channels of {wanted} a head, of {size}"
    how = _repeated(attention, f"the channels in which queries and keys meet most, {kept}")
    return Made(tensor.flatten(0, 1), how, (name, "k_proj" if which == 0 else "q_proj"), factor.numel())


def meeting_channels(q: Tensor, k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Projections to `size` channels whose products are the nearest to those of q and k, ``[H, D, C]`` each.

    The best approximation of that rank of each head's qᵀ k, by its singular values (Eckart and Young); both factors have the same
    size. Fewer channels where D or C is smaller.
    """
    (of_q, triangle_q), (of_k, triangle_k) = (torch.linalg.qr(x.double().transpose(1, 2)) for x in (q, k))
    u, s, v = torch.linalg.svd(triangle_q @ triangle_k.transpose(1, 2))
    root = s[:, None, :size].sqrt()
    left, right = of_q @ u[..., :size] * root, of_k @ v.transpose(1, 2)[..., :size] * root
    return left.transpose(1, 2).to(q.dtype), right.transpose(1, 2).to(k.dtype)


def _mamba_inputs(attention: Attention, drawn: Tensor) -> Made:
    """z, x, B, C and Δ in one matrix: x of the values, each head twice, B of the keys and C of the queries, as in 2408.15237."""
    inner = 2 * attention.q[..., 0].numel()
    tensor = drawn.clone()
    _, x, b, c, _ = tensor.split((inner, inner, STATE_SIZE, STATE_SIZE, tensor.shape[0] - 2 * (inner + STATE_SIZE)))
    x.copy_(attention.values.repeat_interleave(2, dim=0).flatten(0, 1))
    # All heads share B and C: those channels of all heads together in which queries and keys meet most.
    q, k = (part.flatten(0, 1).unsqueeze(0) for part in (attention.q, attention.keys))
    of_q, of_k = (factor[0] for factor in meeting_channels(q, k, STATE_SIZE))
    b[: len(of_k)], c[: len(of_q)] = of_k, of_q
    how = (
        f"x: values, each head {2 * attention.repeats} times; B, C: the channels in which keys and queries of all heads meet most, "
        f"{len(of_k)} of {STATE_SIZE}; z and dt: new"
    )
    return Made(tensor, how, ("v_proj", "k_proj", "q_proj"), x.numel() + of_k.numel() + of_q.numel())


def _mamba_values(attention: Attention, drawn: Tensor) -> Made:
    """u and z in one matrix: u of the values, each head twice. B and C are made of u, where queries and keys have no place."""
    tensor = drawn.clone()
    u = tensor[: tensor.shape[0] // 2]
    u.copy_(attention.values.repeat_interleave(2, dim=0).flatten(0, 1))
    return Made(tensor, f"u: values, each head {2 * attention.repeats} times; z: new", ("v_proj",), u.numel())


def _mamba_out(attention: Attention, drawn: Tensor) -> Made:
    both = attention.o.repeat_interleave(2, dim=1) / 2
    return _taken(both.flatten(1), "copied, half for each copy of the values", "o_proj")


def _passing(attention: Attention, drawn: Tensor) -> Made:
    taps = torch.zeros_like(drawn)
    taps[:, -1] = 1.0
    return Made(taps, "new: passes the token itself")


def _zero(attention: Attention, drawn: Tensor) -> Made:
    return Made(torch.zeros_like(drawn), "new: 0")


def _value_size(attention: Attention, drawn: Tensor) -> Made:
    size = attention.size_of_values
    return Made(torch.full_like(drawn, size), f"new: {size:.3g}, the size of the values")


def _twice_value_size(attention: Attention, drawn: Tensor) -> Made:
    """Behind the norm is a gate of σ(0)."""
    size = 2 * attention.size_of_values
    return Made(torch.full_like(drawn, size), f"new: {size:.3g}, twice the size of the values, for a gate of 1/2")


def _time_constants(num_heads: int) -> Tensor:
    """Tokens after which a head has forgotten all but 1/e, float64 ``[num_heads]``."""
    return torch.logspace(math.log10(_FASTEST), math.log10(_SLOWEST), num_heads, dtype=torch.float64)


_SLOW = f"new: heads forget in {_FASTEST:.0f} to {_SLOWEST:.0f} tokens"


def _own_values(attention: Attention, drawn: Tensor) -> Made:
    """ν = σ(bias) near zero: the values of a Llama's layer are its own."""
    return Made(torch.full_like(drawn, _LEAST_SHARE), "new: next to nothing of the first layer's values")


def _unit_rates(attention: Attention, drawn: Tensor) -> Made:
    return Made(torch.zeros_like(drawn), "new: a rate of 1")


def _slow_steps(attention: Attention, drawn: Tensor) -> Made:
    """dt_bias with softplus(dt_bias) = 1 / time constant; of a head, all its channels have the same."""
    steps = 1 / _time_constants(len(attention.q))
    inverse = steps + torch.log(-torch.expm1(-steps))
    return Made(inverse.repeat_interleave(drawn.numel() // len(steps)).to(drawn.dtype), _SLOW)


def _slow_logits(attention: Attention, drawn: Tensor) -> Made:
    """GLA's bias with log σ(bias) / 16 = −1 / time constant."""
    logits = -torch.log(torch.expm1(16 / _time_constants(len(attention.q))))
    return Made(logits.repeat_interleave(drawn.numel() // len(attention.q)).to(drawn.dtype), _SLOW)


_SHARED: dict[str, Make] = {
    "q_proj.weight": _query,
    "k_proj.weight": _key,
    "v_proj.weight": _value,
    "out_proj.weight": _out,
}
_REDUCED = _SHARED | {"q_proj.weight": _reduced_query, "k_proj.weight": _reduced_key}
_WIDE = _SHARED | {"v_proj.weight": _twice_the_values, "out_proj.weight": _half_the_out}
_NORM: dict[str, Make] = {"norm.weight": _value_size}
_OPEN_NORM: dict[str, Make] = {"norm.weight": _twice_value_size}
_STEPS: dict[str, Make] = {"decay.A_log": _unit_rates, "decay.dt_bias": _slow_steps}
_TAPS: dict[str, Make] = {"convolution.weight": _passing}

RECIPES: Mapping[str, Mapping[str, Make]] = {
    "linear_attention": _SHARED | _NORM,
    "lightning": _SHARED | {"gate_proj.weight": _zero} | _OPEN_NORM,
    "retention": _WIDE,
    "simple_gla": _SHARED | _STEPS | _NORM,
    "gla": _REDUCED | {"decay.bias": _slow_logits} | _NORM,
    "gsa": _SHARED | _NORM,
    "based": _REDUCED,
    "rebased": _REDUCED,
    "hgrn2": {
        "q_proj.weight": _query,
        "forget_proj.weight": _negative_key,
        "i_proj.weight": _value,
        "out_proj.weight": _out,
    }
    | _NORM,
    "mamba": {"in_proj.weight": _mamba_values, "out_proj.weight": _mamba_out, "convolution.bias": _zero} | _TAPS,
    "mamba2": {"in_proj.weight": _mamba_inputs, "out_proj.weight": _mamba_out, "convolution.bias": _zero}
    | _TAPS
    | _NORM,
    "chela": _SHARED | _TAPS | _NORM,
    "deltanet": _SHARED | _TAPS | _NORM,
    "gated_deltanet": _WIDE | _TAPS | _STEPS | _NORM,
    "deltaproduct": _WIDE
    | {"k_proj.weight": _of_first_step(_key), "v_proj.weight": _of_first_step(_twice_the_values)}
    | _TAPS
    | _STEPS
    | _NORM,
    "rwkv7": {
        "r_proj.weight": _query,
        "k_proj.weight": _key,
        "v_proj.weight": _value,
        "out_proj.weight": _out,
        "channels.value": _own_values,
    },
    "kda": _SHARED | _TAPS | _STEPS | {"gate_proj.1.weight": _zero} | _OPEN_NORM,
}
"""Weights of each linear mixer, by their names in it, and what makes them; a weight that is not named keeps its initial value.
A new mixer is one line."""

OPEN_GATES: Mapping[str, str] = {"simple_gla": "gate_proj.weight"}
"""Mixers whose silu gates are opened where there is text to do it on (`longspan.train.calibration`), and the gates' weights: those
whose scores are positive, as the softmax layer's are. Where they are not, what a gate lets through resembles that layer's output no
more, open or not (docs/conversion.md has what was measured)."""
