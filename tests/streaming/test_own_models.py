"""A model of one's own, as docs/stream.md has it, runs in segments with the gradients of one piece."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import longspan
from longspan import SequenceLayout
from longspan.errors import InputError
from tests.compare import relative_error, worst
from tests.streaming.test_page import blocks

NUM_TOKENS = 23


@functools.cache
def names() -> dict[str, Any]:
    """What the page defines."""
    found: dict[str, Any] = {}
    for block in (blocks()[0], blocks()[4]):
        exec(compile(block, "<docs/stream.md>", "exec"), found)
    return found


def own_model() -> Any:
    made = names()["Recurrence"]
    torch.manual_seed(3)
    return made().double()


@pytest.mark.parametrize("documents", [None, (0, 3, 8, 21, 23)])
@pytest.mark.parametrize("keep_every", [1, 3])
def test_segments_are_one_piece(documents: Sequence[int] | None, keep_every: int) -> None:
    """A document may begin inside of a segment, and with one that is not kept."""
    tokens = torch.randint(256, (1, NUM_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    layout = SequenceLayout.local(NUM_TOKENS, documents)
    whole, model = own_model(), own_model()
    sequence = names()["InSegments"](whole, NUM_TOKENS)
    want, _ = sequence.loss(inputs, labels, layout, sequence.start(), False)
    want.backward()
    found = longspan.stream(model, 4, keep_every=keep_every).forward_backward(inputs, labels, layout)
    errors = {name: relative_error(x.grad, whole.get_parameter(name).grad) for name, x in model.named_parameters()}
    assert worst([relative_error(found, want), *errors.values()]) < 1e-12, errors


def test_a_parameter_with_which_documents_begin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have no gradient."""
    model = own_model()
    begun = longspan.stream(model, 4)
    monkeypatch.setattr(begun._streamed, "sequence", lambda *_: Learned(model))
    with pytest.raises(InputError, match=r"state, with which a document begins, requires a gradient"):
        begun.forward_backward(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))


class Learned:
    """A sequence that begins with a parameter."""

    counts_first = False

    def __init__(self, model: Any) -> None:
        self._model = model

    def start(self) -> Any:
        return names()["Remembered"]({"state": self._model.decay})

    def end(self) -> None:
        """Nothing is held."""
