"""What the routers of a model decide, over all ranks: the auxiliary losses, and what a run says of them.

Shapes: L layers with experts, E experts, k experts of a token, N tokens of all ranks, data × sequence.

    balance    E · Σ_e f_e P_e              f_e: share of all choices that fall on e; P_e: mean probability of e
    z          mean of (log Σ_e e^logit_e)²

Balance (arXiv 2101.03961, equation 4) is 1 where all experts are chosen equally often; z is of arXiv 2202.08906, equation 5. Every
token counts, whether it has a label or not: experts compute it. f has no gradient, so that a rank's share of balance is
E · Σ_e f_e · (its own sum of the probabilities of e) / N. The counts behind f are all that it needs of the others: one all-reduce
of integers for all layers together, forward alone and outside of what is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.exchange.all_reduce import sum_over_ranks
from longspan.layout import SequenceLayout
from longspan.models.mixers.mixer import SequenceParallel


class Routed(NamedTuple):
    """What one router has decided, in sums over its tokens.

    choices: int64 ``[E]``, how often each expert was chosen. probabilities: ``[E]``, the sum of its probabilities. squared_logs:
    ``[]``, the sum of the squares of log Σ e^logit. entropy: ``[]``, the sum of the entropies of the probabilities in nats, without
    gradient. All but the choices are float32, float64 for float64.
    """

    choices: Tensor
    probabilities: Tensor
    squared_logs: Tensor
    entropy: Tensor


@dataclass
class Routing:
    """What a caller says of the auxiliary losses, and is told of the routers: one object for all calls of a step.

    num_tokens: what sums over tokens are divided by, the tokens of all ranks in all calls of the step, as `num_valid` counts those
    with labels. None is those of a call.

    of_sequence: int64 ``[L, E]``, the choices of all ranks in the whole sequence, where a call is of one segment of time; see
    `counted`. None is those of the call.

    The rest is told, and is summed over the calls. choices: int64 ``[L, E]``, of all ranks; None where there was none. The others
    are 0-dimensional and this rank's shares; the sums over the ranks are: cross_entropy, the loss without auxiliary losses; balance
    and z, their means over layers; entropy, that of a router's probabilities in nats, a mean over tokens and layers; auxiliary,
    what the auxiliary losses add to the loss.
    """

    num_tokens: int | None = None
    of_sequence: Tensor | None = field(default=None, init=False)
    choices: Tensor | None = field(default=None, init=False)
    cross_entropy: Tensor | float = field(default=0.0, init=False)
    balance: Tensor | float = field(default=0.0, init=False)
    z: Tensor | float = field(default=0.0, init=False)
    entropy: Tensor | float = field(default=0.0, init=False)
    auxiliary: Tensor | float = field(default=0.0, init=False)

    def count(self, routed: Sequence[Routed]) -> None:
        """Add the choices of this rank in one more segment of time to `of_sequence`; `routed`: of each layer with experts."""
        choices = torch.stack([layer.choices for layer in routed])
        self.of_sequence = choices if self.of_sequence is None else self.of_sequence + choices

    def counted(self, ranks: SequenceParallel | None) -> None:
        """All segments were counted: `of_sequence` is of all `ranks` from here on, and `choices` know it."""
        if self.of_sequence is None:
            return
        if ranks is not None:
            self.of_sequence = sum_over_ranks(self.of_sequence, ranks.group)
        self.choices = self.of_sequence if self.choices is None else self.choices + self.of_sequence

    @property
    def fullest(self) -> float:
        """The tokens of the fullest expert of any layer, in units of the mean; 1 where all experts have the same number."""
        if self.choices is None:
            return 1.0
        choices = self.choices.double()
        return float((choices.amax(-1) / choices.mean(-1)).amax())

    @property
    def idle(self) -> float:
        """The share of all layers' experts that no token has chosen."""
        return 0.0 if self.choices is None else float((self.choices == 0).double().mean())


def ranks_of_losses(layout: SequenceLayout | None, place: SequenceParallel | None) -> SequenceParallel | None:
    """The ranks over whose tokens losses are means in a call with `layout`; None is this process alone.

    place: what the model was told. A layout by `SequenceLayout.local` says that a call is of this process alone.
    """
    is_alone = layout is not None and layout.group is None
    return None if place is None or place.num_ranks == 1 or is_alone else place


def auxiliary_loss(
    routed: Sequence[Routed],
    *,
    experts_per_token: int,
    balance_weight: float,
    z_weight: float,
    ranks: SequenceParallel | None,
    routing: Routing | None,
) -> Tensor:
    """This rank's share of the sum over layers of ``balance_weight · balance + z_weight · z``.

    Args:
        routed: of each layer with experts.
        ranks: over whose tokens the losses are means, see `ranks_of_losses`; each of them makes this call.
        routing: whose `num_tokens` divides the sums, and which is told what was found.

    Returns:
        A scalar, float32 or float64. The sum of the ranks' shares is the whole loss, and the sum of their gradients its gradient.
        Where both weights are 0 and nobody is told, nothing is computed.
    """
    if routing is None and balance_weight == z_weight == 0.0:
        return torch.zeros_like(routed[0].squared_logs)
    of_sequence = None if routing is None else routing.of_sequence
    choices = torch.stack([layer.choices for layer in routed]) if of_sequence is None else of_sequence
    if ranks is not None and of_sequence is None:
        choices = sum_over_ranks(choices, ranks.group)
    probabilities = torch.stack([layer.probabilities for layer in routed])
    shares = choices / choices.sum(-1, keepdim=True).to(probabilities.dtype)
    num_tokens: Tensor | int = choices[0].sum() // experts_per_token
    if routing is not None and routing.num_tokens is not None:
        num_tokens = routing.num_tokens
    balance = shares.shape[-1] * (shares * probabilities).sum(-1) / num_tokens
    z = torch.stack([layer.squared_logs for layer in routed]) / num_tokens
    loss = balance_weight * balance.sum() + z_weight * z.sum()
    if routing is not None:
        entropy = torch.stack([layer.entropy for layer in routed]) / num_tokens
        if of_sequence is None:
            routing.choices = choices if routing.choices is None else routing.choices + choices
        routing.balance = routing.balance + balance.detach().mean()
        routing.z = routing.z + z.detach().mean()
        routing.entropy = routing.entropy + entropy.detach().mean()
        routing.auxiliary = routing.auxiliary + loss.detach()
    return loss
