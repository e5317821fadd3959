"""LASP-2 over LASP and Ring Attention at the size of arXiv 2502.07563, by formulas: 2,048K tokens on 64 GPUs that are not here.

One layer of a model of a billion parameters, forward + backward, on one GPU of 64. Its computation is operations over an assumed
rate; the exchange of states is the cost model's, on its round numbers for GPUs (`longspan.plan.gpu_cluster`). Nothing is measured.

P ranks of T tokens, width D = heads · head size, F the width of the feed-forward layer.
"""

from __future__ import annotations

from benchmarks.harness import Table
from longspan.exchange import TOPOLOGIES
from longspan.plan import Problem, gpu_cluster
from longspan.state import Identity

RANKS, SEQ_LEN = 64, 2**21
HEADS, SIZE, FEED_FORWARD, CHUNK = 16, 128, 8192, 64
OPERATIONS_A_SECOND = 125e12
"""40 % of an A100's in bfloat16."""
# Backward computes every product's two gradients; attention recomputes its scores, too.
_BACKWARD, _BACKWARD_OF_ATTENTION = 2.0, 2.5

_TOKENS, _WIDTH = SEQ_LEN // RANKS, HEADS * SIZE


def _seconds(operations: float) -> float:
    return operations / OPERATIONS_A_SECOND


def rest_of_layer() -> float:
    """Seconds of a layer, forward + backward, without its attention: four projections and three products of F × D."""
    return (1 + _BACKWARD) * _seconds(2.0 * _TOKENS * (4 * _WIDTH**2 + 3 * _WIDTH * FEED_FORWARD))


def linear_attention() -> float:
    """Seconds forward of a rank's own tokens, in chunks: scores and outputs inside a chunk, states written and read."""
    return _seconds(_TOKENS * HEADS * (4.0 * CHUNK * SIZE + 4.0 * SIZE**2))


def softmax_attention() -> float:
    """Seconds forward of a rank's part of all pairs of a token and an earlier one."""
    return _seconds(4.0 * SEQ_LEN**2 / 2 * _WIDTH / RANKS)


def states_exposed(topology: str, hides: float) -> float:
    """Seconds of an exchange of states, both ways, that `hides` seconds forward and twice as long backward do not hide."""
    problem = Problem(RANKS, HEADS, SIZE, SIZE, Identity)
    cost = TOPOLOGIES[topology]().cost(problem, gpu_cluster(RANKS))
    return cost.forward.exposed(hides) + cost.backward.exposed(_BACKWARD * hides)


def keys_and_values_round() -> float:
    """Seconds in which keys and values of T tokens in bfloat16 pass P − 1 times on, and backward they and their gradients."""
    cluster = gpu_cluster(RANKS)
    block = 2 * 2 * _TOKENS * _WIDTH
    return (RANKS - 1) * (cluster.to_next(block) + cluster.to_next(2 * block))


def layers() -> dict[str, float]:
    """Seconds of a layer, forward + backward, by method."""
    query = _seconds(2.0 * _TOKENS * _WIDTH**2)
    linear = (1 + _BACKWARD_OF_ATTENTION) * linear_attention()
    softmax = (1 + _BACKWARD_OF_ATTENTION) * softmax_attention()
    rest, passing = rest_of_layer(), keys_and_values_round()
    return {
        "LASP-2 (all_gather)": rest + linear + states_exposed("all_gather", query),
        "LASP, local work first (ring)": rest + linear + states_exposed("ring", query),
        # Each rank's attention begins when it has the state of the one before.
        "LASP, receiving first": rest + RANKS * linear + states_exposed("ring", 0.0),
        "Ring Attention, linear attention's work": rest + max(linear, passing),
        "Ring Attention (softmax)": rest + max(softmax, passing),
    }


def sequence_parallel_modelled(quick: bool) -> Table:
    """Formulas take no time: `quick` makes no difference."""
    table = Table(
        "sequence_parallel_modelled",
        f"A layer at {SEQ_LEN:,} tokens on {RANKS} GPUs, modelled: width {_WIDTH}, H{HEADS} D{SIZE}, feed-forward {FEED_FORWARD}",
        "measured in arXiv 2502.07563, whole models: LASP-2 is 1.152 times as fast as LASP, 1.366 times as Ring Attention",
        ["method", "ms", "of these attention and exchange", "LASP-2 is so many times as fast"],
    )
    taken = layers()
    first, *_ = taken.values()
    for name, seconds in taken.items():
        table.add(name, f"{seconds * 1e3:.1f}", f"{(seconds - rest_of_layer()) * 1e3:.1f}", f"{seconds / first:.2f}")
    return table


TABLES = {"sequence_parallel_modelled": sequence_parallel_modelled}
