"""The exchange as two autograd nodes, so that it overlaps with computation in both directions.

`start_exchange` makes the first node and launches the forward collective; `PendingExchange.wait` makes the second. The engine runs
nodes in the reverse order of their creation: backward, the second node launches the reverse collective, then everything that
was computed between start and wait runs, then the first node waits for what arrives. The two nodes share nothing but the
launched collective.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longspan.comm.numbering import backward_of, steps_of
from longspan.comm.profiling import named_range
from longspan.exchange.recomputation import carrier_of
from longspan.exchange.topology import Carrier, Exchanger, Handle, ReverseHandle
from longspan.first_order import first_order
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, Cost
from longspan.state import Form, Pair


@dataclass
class _StateLink:
    """What the two nodes of one exchange hand to each other."""

    carrier: Carrier
    kind: Form
    layout: SequenceLayout
    keeps_incoming: bool
    number: int = 0
    forward: Handle | None = None
    reverse: ReverseHandle | None = None
    incoming: Tensor | None = field(default=None, repr=False)


class _StateStart(torch.autograd.Function):
    """Launches the exchange; in backward, waits for the reverse one.

    | | shape | |
    |---|---|---|
    | state | [num_segments, B, H, K, V] | U of this rank's segments |
    | parameter | see longspan.state | A of the same segments (of all segments where it is known everywhere) |
    | ticket | [] | ties the two nodes together; carries no value |

    Backward: ∂U = λ; ∂A = λ S_inᵀ projected on A's form.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, parameter: Tensor, link: _StateLink) -> Tensor:
        ctx.link = link
        with named_range("longspan.exchange.start"):
            # What is still being sent must not hold the graph that it came from.
            pair = Pair(link.kind(parameter.detach()), state.detach())
            link.forward = link.carrier.start(pair, link.layout)
            link.number = steps_of(group_of(link.layout)).number
        if link.keeps_incoming:
            ctx.save_for_backward(parameter)
        return state.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        link: _StateLink = ctx.link
        assert link.reverse is not None
        with named_range("longspan.exchange.wait.backward"):
            grad_state = link.reverse.wait()
        link.reverse = None
        grad_parameter = None
        if link.keeps_incoming:
            (parameter,) = ctx.saved_tensors
            assert link.incoming is not None
            grad_parameter = link.kind(parameter).outer(grad_state, link.incoming)
            link.incoming = None
        return grad_state, grad_parameter, None


class _StateWait(torch.autograd.Function):
    """Waits for the exchange; in backward, launches the reverse one.

    | | shape | |
    |---|---|---|
    | ticket | [] | from the start node |
    | joins | [] or None | a leaf, where this rank's states take no gradient but others' may |
    | incoming | [num_segments, B, H, K, V] | S_in of this rank's segments |

    Backward: sends G = ∂L/∂S_in. The start node waits for what comes back; this node does where the start node takes no gradient.
    """

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, joins: Tensor | None, link: _StateLink) -> Tensor:
        assert link.forward is not None
        with named_range("longspan.exchange.wait"):
            arrived = link.forward.wait()
        link.forward = None
        ctx.link = link
        ctx.save_for_backward(arrived.incoming if link.keeps_incoming else None, *arrived.context)
        return arrived.incoming

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_incoming,) = grads
        link: _StateLink = ctx.link
        link.incoming, *context = ctx.saved_tensors
        with named_range("longspan.exchange.start.backward"), backward_of(link.number):
            link.reverse = link.carrier.start_reverse(link.kind, tuple(context), grad_incoming, link.layout)
        if not ctx.needs_input_grad[0]:
            link.reverse.wait()
            link.reverse = None
            return None, None, None
        return grad_incoming.new_zeros(()), None, None


@dataclass(frozen=True)
class PendingExchange:
    """An exchange that has been started and not yet waited for."""

    _ticket: Tensor
    _link: _StateLink
    _exchange: Exchanger
    _pair: Pair

    @property
    def shape(self) -> torch.Size:
        """Of the states, ``[num_segments, B, H, K, V]``."""
        return self._pair.state.shape

    def modelled(self) -> tuple[Cost, Cluster]:
        """Its cost by the model, and the machines that the model assumes."""
        return self._exchange.modelled(self._pair, self._link.layout)

    def wait(self, joins: bool = False) -> Tensor:
        """S_in ``[num_segments, B, H, K, V]`` of this rank's segments; differentiable; to be called once.

        joins: take part in the backward exchange even if this rank's states take no gradient, because those of other ranks may.
        """
        leaf = None
        if joins and not self._ticket.requires_grad:
            leaf = self._ticket.new_zeros((), requires_grad=True)
        incoming: Tensor = _StateWait.apply(self._ticket, leaf, self._link)
        return incoming


def start_exchange(exchange: Exchanger, pair: Pair, layout: SequenceLayout) -> PendingExchange:
    """Start exchanging the states of this rank's segments, without waiting.

    Args:
        exchange: how to exchange.
        pair: U ``[num_segments, B, H, K, V]`` of this rank's segments, and their transitions, or those of all segments in global
            order where `Transition.is_known`. A segment in which a document starts has a zero transition.
        layout: of two ranks or more.

    Gradients reach U, and the transitions where they require one and are not known everywhere.
    """
    if exchange.remembers_errors and not torch.is_grad_enabled():
        # An evaluation between two steps: what they have left out is of other states.
        exchange = exchange.remembering_nothing()
    parameter = pair.transition.parameter
    keeps_incoming = parameter.requires_grad and not pair.transition.is_known
    link = _StateLink(carrier_of(exchange, pair, layout), pair.transition.form, layout, keeps_incoming)
    ticket: Tensor = _StateStart.apply(pair.state, parameter, link)
    return PendingExchange(ticket, link, exchange, pair)
