"""The layers of the papers, token by token in plain PyTorch: what mixers are compared with. Nothing of the library is used.

Each function takes x ``[B, T, C]``, the mixer's parameters by name, and `Sizes`; and returns ``[B, T, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Heads and their size, as the config says; the layer's number and how many there are; eps of the norms; bounds: HGRN2's.

    values: RWKV-7's of its first layer, ``[B, T, H · D]``; None in that layer itself.
    """

    num_heads: int
    head_dim: int
    layer: int
    num_layers: int
    eps: float
    bounds: Tensor | None = None
    values: Tensor | None = None


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(x.exp())


def project(x: Tensor, p: Parameters, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T


def heads(x: Tensor, num_heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], num_heads, -1)


def convolved(x: Tensor, p: Parameters) -> Tensor:
    """silu(bias + Σ_j w_j x_{t-3+j}), a token after another."""
    weight, bias = p["convolution.weight"], p.get("convolution.bias")
    rows = []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0])
        for j in range(4):
            if t - 3 + j >= 0:
                total = total + weight[:, j] * x[:, t - 3 + j]
        rows.append(silu(total if bias is None else total + bias))
    return torch.stack(rows, dim=1)


Step = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""The state after token t: of the state before, and its key and value, each ``[B, H, ...]``."""


def recurrence(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float) -> Tensor:
    """o_t = scale · S_tᵀ q_t for q, k ``[B, T, H, K]`` and v ``[B, T, H, V]``."""
    state = torch.zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3], dtype=q.dtype)
    rows = []
    for t in range(q.shape[1]):
        state = step(state, k[:, t], v[:, t], t)
        rows.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(rows, dim=1)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def linear_attention(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    def feature(y: Tensor) -> Tensor:
        return torch.where(y > 0, y + 1, y.exp())

    q, k, v = (heads(project(x, p, f"{name}_proj"), s.num_heads) for name in "qkv")
    o = recurrence(feature(q), feature(k), v, lambda state, k, v, t: state + outer(k, v), s.head_dim**-0.5)
    return project(rms_norm(o, p["norm.weight"], s.eps).flatten(2), p, "out_proj")


def lightning(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """For a power of two of heads."""
    q, k, v = (heads(silu(project(x, p, f"{name}_proj")), s.num_heads) for name in "qkv")
    slopes = [2.0 ** (-8 * (head + 1) / s.num_heads) for head in range(s.num_heads)]
    factor = 1 - s.layer / (s.num_layers - 1) + 1e-5
    decay = torch.tensor([math.exp(-slope * factor) for slope in slopes], dtype=x.dtype)[:, None, None]
    o = recurrence(q, k, v, lambda state, k, v, t: decay * state + outer(k, v), 1.0)
    gate = torch.sigmoid(project(x, p, "gate_proj"))
    return project(rms_norm(o.flatten(2), p["norm.weight"], s.eps) * gate, p, "out_proj")


def retention(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """Neighbouring channels are turned together, as in the authors' code: the mixer's channels in another order."""
    half = s.head_dim // 2
    order = torch.arange(s.head_dim).reshape(2, half).T.flatten()
    angles = 1.0 / 10_000 ** torch.linspace(0, 1, half, dtype=torch.float64)

    def turned(y: Tensor) -> Tensor:
        y = heads(y, s.num_heads)[..., order]
        at = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * angles
        cos, sin = (f.repeat_interleave(2, dim=-1)[:, None] for f in (at.cos(), at.sin()))
        rotated = torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).flatten(-2)
        return y * cos + rotated * sin

    q, k = turned(project(x, p, "q_proj")), turned(project(x, p, "k_proj"))
    v = heads(project(x, p, "v_proj"), s.num_heads)
    decay = torch.tensor([1 - 2.0 ** (-5 - head) for head in range(s.num_heads)], dtype=x.dtype)[:, None, None]
    o = recurrence(q, k, v, lambda state, k, v, t: decay * state + outer(k, v), s.head_dim**-0.5)
    centred = o - o.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + s.eps).sqrt()
    return project(normed.flatten(2) * silu(project(x, p, "gate_proj")), p, "out_proj")


def simple_gla(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    def feature(y: Tensor) -> Tensor:
        return torch.where(y > 0, y + 1, y.exp())

    q, k, v = (heads(project(x, p, f"{name}_proj"), s.num_heads) for name in "qkv")
    g = -p["decay.A_log"].exp() * softplus(project(x, p, "decay.dt_proj") + p["decay.dt_bias"])

    def step(state: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
        return g[:, t].exp()[..., None, None] * state + outer(k, v)

    o = recurrence(feature(q), feature(k), v, step, s.head_dim**-0.5)
    gate = heads(silu(project(x, p, "gate_proj")), s.num_heads)
    return project((rms_norm(o, p["norm.weight"], s.eps) * gate).flatten(2), p, "out_proj")


def gla(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    q, k, v = (heads(project(x, p, f"{name}_proj"), s.num_heads) for name in "qkv")
    assert q.shape[-1] == k.shape[-1] == s.head_dim // 2 and v.shape[-1] == s.head_dim
    logits = project(project(x, p, "decay.to_rank_proj"), p, "decay.from_rank_proj") + p["decay.bias"]
    a = heads(torch.sigmoid(logits) ** (1 / 16), s.num_heads)
    o = recurrence(q, k, v, lambda state, k, v, t: a[:, t, ..., None] * state + outer(k, v), (s.head_dim // 2) ** -0.5)
    gate = heads(silu(project(x, p, "gate_proj")), s.num_heads)
    return project((rms_norm(o, p["norm.weight"], s.eps) * gate).flatten(2), p, "out_proj")


def gsa(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """64 slots of a key and a value, one state of each."""
    q, k, v = (heads(silu(project(x, p, f"{name}_proj")), s.num_heads) for name in "qkv")
    a = heads(torch.sigmoid(project(x, p, "forget_proj")) ** (1 / 8), s.num_heads)
    assert a.shape[-1] == 64
    keys, values = torch.zeros(2, x.shape[0], s.num_heads, 64, s.head_dim, dtype=x.dtype)
    rows = []
    for t in range(x.shape[1]):
        kept = a[:, t].unsqueeze(-1)
        keys = kept * keys + outer(1 - a[:, t], k[:, t])
        values = kept * values + outer(1 - a[:, t], v[:, t])
        weights = torch.einsum("bhmd,bhd->bhm", keys, q[:, t]).softmax(-1)
        rows.append(torch.einsum("bhm,bhmd->bhd", weights, values))
    o = silu(torch.stack(rows, dim=1).flatten(2))
    return project(rms_norm(o, p["norm.weight"], s.eps), p, "out_proj")


def _weighted(x: Tensor, p: Parameters, s: Sizes, kernel: Callable[[Tensor, Tensor], Tensor], eps: float) -> Tensor:
    """Attention with the weights kernel(q_t, k_s) / (Σ_s kernel(q_t, k_s) + eps): what the states of feature maps stand for."""
    q, k, v = (heads(project(x, p, f"{name}_proj"), s.num_heads).transpose(1, 2) for name in "qkv")
    assert q.shape[-1] == 16
    weights = kernel(q, k).tril()
    o = weights @ v / (weights.sum(-1, keepdim=True) + eps)
    return project(o.transpose(1, 2).flatten(2), p, "out_proj")


def based(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    def kernel(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.mT / 4
        return 1 + scores + scores**2 / 2

    return _weighted(x, p, s, kernel, 1e-12)


def rebased(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    def moved(y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return p["features.gamma"] * normed + p["features.beta"]

    return _weighted(x, p, s, lambda q, k: (moved(q) @ moved(k).mT) ** 2 / 16, 1e-5)


def hgrn2(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """bounds: ``[number of layers, C]``, of which the layer's is taken."""
    assert s.bounds is not None
    bound = heads(s.bounds[s.layer].expand(1, 1, -1), s.num_heads)[0, 0]
    f = bound + (1 - bound) * torch.sigmoid(heads(project(x, p, "forget_proj"), s.num_heads))
    q, i = heads(silu(project(x, p, "q_proj")), s.num_heads), heads(project(x, p, "i_proj"), s.num_heads)
    o = recurrence(q, 1 - f, i, lambda state, k, v, t: f[:, t, ..., None] * state + outer(k, v), 1.0)
    return project(rms_norm(o.flatten(2), p["norm.weight"], s.eps), p, "out_proj")


def mamba(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """Channel by channel: a state of 16 numbers for each of twice as many channels as the heads have."""
    inner = 2 * s.num_heads * s.head_dim
    u, z = project(x, p, "in_proj")[..., :inner], project(x, p, "in_proj")[..., inner:]
    u = convolved(u, p)
    parts = project(u, p, "x_proj")
    rank = parts.shape[-1] - 32
    steps = softplus(parts[..., :rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    rates = p["rates.A_log"].exp()
    state = torch.zeros(x.shape[0], inner, 16, dtype=x.dtype)
    rows = []
    for t in range(x.shape[1]):
        step, key, query = steps[:, t, :, None], parts[:, t, None, rank : rank + 16], parts[:, t, rank + 16 :]
        state = (-step * rates).exp() * state + step * key * u[:, t, :, None]
        rows.append(torch.einsum("bn,ben->be", query, state) + p["rates.D"] * u[:, t])
    return project(torch.stack(rows, dim=1) * silu(z), p, "out_proj")


def mamba2(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    num_heads = 2 * s.num_heads
    inner = num_heads * s.head_dim
    z, inputs, dt = project(x, p, "in_proj").split((inner, inner + 256, num_heads), dim=-1)
    u, b, c = convolved(inputs, p).split((inner, 128, 128), dim=-1)
    u, delta, rate = heads(u, num_heads), softplus(dt + p["decay.dt_bias"]), -p["decay.A_log"].exp()
    state = torch.zeros(x.shape[0], num_heads, s.head_dim, 128, dtype=x.dtype)
    rows = []
    for t in range(x.shape[1]):
        kept = (delta[:, t] * rate).exp()[..., None, None]
        state = kept * state + delta[:, t, :, None, None] * outer(u[:, t], b[:, t, None].expand(-1, num_heads, -1))
        rows.append(torch.einsum("bhpn,bn->bhp", state, c[:, t]) + p["skip.D"][:, None] * u[:, t])
    y = torch.stack(rows, dim=1).flatten(2)
    return project(rms_norm(y * silu(z), p["norm.weight"], s.eps), p, "out_proj")


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """S_t = (I − β k kᵀ) Diag(decay) S_{t-1} + β k vᵀ, for decay ``[B, T, H, K or 1]``."""

    def step(state: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
        state = decay[:, t, ..., None] * state
        read = torch.einsum("bhk,bhkv->bhv", k, state)
        return state + beta[:, t, :, None, None] * outer(k, v - read)

    return recurrence(q, k, v, step, q.shape[-1] ** -0.5)


def _convolved_heads(x: Tensor, p: Parameters, s: Sizes) -> tuple[Tensor, ...]:
    """q and k of length 1, and v, each projection convolved by its own rows of the taps."""
    parts = [project(x, p, f"{name}_proj") for name in "qkv"]
    first, found = 0, []
    for part in parts:
        taps = p["convolution.weight"][first : first + part.shape[-1]]
        first += part.shape[-1]
        found.append(heads(convolved(part, {"convolution.weight": taps}), s.num_heads))
    assert first == len(p["convolution.weight"])
    q, k, v = found
    return unit(q), unit(k), v


def deltanet(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    q, k, v = _convolved_heads(x, p, s)
    beta = torch.sigmoid(project(x, p, "strength.beta_proj"))
    o = _delta(q, k, v, beta, torch.ones_like(beta).unsqueeze(-1))
    return project(rms_norm(o, p["norm.weight"], s.eps).flatten(2), p, "out_proj")


def gated_deltanet(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    q, k, v = _convolved_heads(x, p, s)
    assert v.shape[-1] == 2 * k.shape[-1]
    beta = torch.sigmoid(project(x, p, "strength.beta_proj"))
    g = -p["decay.A_log"].exp() * softplus(project(x, p, "dt_proj") + p["decay.dt_bias"])
    o = _delta(q, k, v, beta, g.exp().unsqueeze(-1))
    gate = heads(silu(project(x, p, "gate_proj")), s.num_heads)
    return project((rms_norm(o, p["norm.weight"], s.eps) * gate).flatten(2), p, "out_proj")


def deltaproduct(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """Two steps of the delta rule a token, the first behind the decay."""
    size, inner = s.head_dim, s.num_heads * s.head_dim
    projected = torch.cat([project(x, p, f"{name}_proj") for name in "qkv"], dim=-1)
    q, k, v = convolved(projected, p).split((inner, 2 * inner, 4 * inner), dim=-1)
    q, k = unit(heads(q, s.num_heads)), unit(k.reshape(*k.shape[:2], 2, s.num_heads, size))
    v = v.reshape(*v.shape[:2], 2, s.num_heads, 2 * size)
    beta = 2 * torch.sigmoid(project(x, p, "strength.beta_proj")).reshape(*x.shape[:2], 2, s.num_heads)
    decay = (-p["decay.A_log"].exp() * softplus(project(x, p, "dt_proj") + p["decay.dt_bias"])).exp()
    state = torch.zeros(x.shape[0], s.num_heads, size, 2 * size, dtype=x.dtype)
    rows = []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state
        for n in range(2):
            read = torch.einsum("bhk,bhkv->bhv", k[:, t, n], state)
            state = state + beta[:, t, n, :, None, None] * outer(k[:, t, n], v[:, t, n] - read)
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * size**-0.5)
    o = torch.stack(rows, dim=1)
    gate = heads(silu(project(x, p, "gate_proj")), s.num_heads)
    return project((rms_norm(o, p["norm.weight"], s.eps) * gate).flatten(2), p, "out_proj")


def rwkv7(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """Row vectors as in the paper: the state is values × keys."""
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    at = dict(zip("rwkvag", (x + (shifted - x) * mu for mu in p["token_mix.mu"]), strict=True))

    def low_rank(name: str, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return project(function(project(y, p, f"{name}_proj.to_rank_proj")), p, f"{name}_proj.from_rank_proj")

    r, v = heads(project(at["r"], p, "r_proj"), s.num_heads), heads(project(at["v"], p, "v_proj"), s.num_heads)
    if s.values is not None:
        share = heads(torch.sigmoid(low_rank("value", at["v"], lambda y: y) + p["channels.value"]), s.num_heads)
        v = (1 - share) * v + share * heads(s.values, s.num_heads)
    k = project(at["k"], p, "k_proj")
    a = torch.sigmoid(low_rank("rate", at["a"], lambda y: y) + p["channels.rate"])
    d = low_rank("decay", at["w"], torch.tanh) + p["channels.decay"]
    w = heads(torch.exp(-math.exp(-0.5) * torch.sigmoid(d)), s.num_heads)
    removal = unit(heads(k * p["channels.removal"], s.num_heads))
    written = heads(k * torch.lerp(torch.ones_like(a), a, p["channels.replacement"].expand_as(a)), s.num_heads)
    a = heads(a, s.num_heads)
    state = torch.zeros(x.shape[0], s.num_heads, s.head_dim, s.head_dim, dtype=x.dtype)
    rows = []
    for t in range(x.shape[1]):
        kappa = removal[:, t]
        transition = torch.diag_embed(w[:, t]) - kappa.unsqueeze(-1) * (a[:, t] * kappa).unsqueeze(-2)
        state = state @ transition + v[:, t].unsqueeze(-1) * written[:, t].unsqueeze(-2)
        rows.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    o = torch.stack(rows, dim=1)
    centred = o - o.mean(-1, keepdim=True)
    normed = (centred / (centred.pow(2).mean(-1, keepdim=True) + s.head_dim * s.eps).sqrt()).flatten(2)
    normed = normed * p["channels.scale"] + p["channels.shift"]
    weight = (r * heads(p["channels.bonus"].expand_as(k), s.num_heads) * written).sum(-1, keepdim=True)
    gate = low_rank("gate", at["g"], torch.sigmoid)
    return project((normed + (weight * v).flatten(2)) * gate, p, "out_proj")


def kda(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    q, k, v = _convolved_heads(x, p, s)
    beta = torch.sigmoid(project(x, p, "strength.beta_proj"))
    dt = project(project(x, p, "dt_proj.0"), p, "dt_proj.1") + p["decay.dt_bias"]
    g = -p["decay.A_log"].exp()[:, None] * heads(softplus(dt), s.num_heads)
    o = _delta(q, k, v, beta, g.exp())
    gate = heads(torch.sigmoid(project(project(x, p, "gate_proj.0"), p, "gate_proj.1")), s.num_heads)
    return project((rms_norm(o, p["norm.weight"], s.eps) * gate).flatten(2), p, "out_proj")


def chela(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """The long kernel tap by tap, on what the short one gives."""
    short, rates = convolved(x, p), p["convolution.log_rates"].exp()
    rows = []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0])
        for lag in range(t + 1):
            tap = (p["convolution.coefficients"] * (-lag * rates).exp()).sum(-1)
            total = total + tap * short[:, t - lag]
        rows.append(total)
    z = torch.stack(rows, dim=1)
    q, k = (heads(silu(project(z, p, f"{name}_proj")), s.num_heads) for name in "qk")
    v = heads(project(x, p, "v_proj"), s.num_heads)
    o = recurrence(q, k, v, lambda state, k, v, t: state + outer(k, v), s.head_dim**-0.5)
    gate = heads(silu(project(z, p, "gate_proj")), s.num_heads)
    return project((rms_norm(o, p["norm.weight"], s.eps) * gate).flatten(2), p, "out_proj")


def softmax(x: Tensor, p: Parameters, s: Sizes) -> Tensor:
    """Llama 3's attention, base 500,000, with key and value heads that serve two query heads each; a window of 5 tokens."""
    half = s.head_dim // 2
    angles = 500_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    at = torch.polar(torch.ones((), dtype=torch.float64), torch.arange(x.shape[1])[:, None] * angles)

    def turned(name: str, num_heads: int) -> Tensor:
        y = heads(project(x, p, name), num_heads)
        z = torch.complex(y[..., :half], y[..., half:]) * at[:, None]
        return torch.cat([z.real, z.imag], dim=-1)

    q, k = turned("q_proj", s.num_heads), turned("k_proj", s.num_heads // 2).repeat_interleave(2, dim=2)
    v = heads(project(x, p, "v_proj"), s.num_heads // 2).repeat_interleave(2, dim=2)
    rows = []
    for t in range(x.shape[1]):
        seen = slice(max(0, t - 4), t + 1)
        weights = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, seen]).mul(s.head_dim**-0.5).softmax(-1)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, v[:, seen]).flatten(1))
    return project(torch.stack(rows, dim=1), p, "out_proj")


REFERENCES: Mapping[str, Callable[[Tensor, Parameters, Sizes], Tensor]] = {
    function.__name__: function
    for function in (
        linear_attention,
        lightning,
        retention,
        simple_gla,
        gla,
        gsa,
        based,
        rebased,
        hgrn2,
        mamba,
        mamba2,
        deltanet,
        gated_deltanet,
        deltaproduct,
        rwkv7,
        kda,
        chela,
        softmax,
    )
}
