"""What the engine asks of a model, and which classes of models can do it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.models.mixers import SequenceMixer
from longspan.ops.chunked.scores import TokenScores


class Memory(Protocol):
    """What a model remembers behind a segment: tensors by name, and whatever else belongs to them.

    tensors: what the next segment alone is given, such as states, whose gradients the engine hands on. The rest, such as keys and
    values that all later segments read, is passed on as it is and gathers gradients by itself.
    """

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Any:
        """The same with these tensors in the place of its own; none is what is kept of each segment in any case."""
        ...

    def sent_back(self, kept: Any) -> Iterable[tuple[Tensor, Tensor]]:
        """Of the rest: what the segment has made in this pass, each with the gradient that later segments have sent to `kept`.

        kept: what the segment left in the first pass, which later ones were given.
        """
        ...


class StreamedSequence(Protocol):
    """One sequence on its way through a model, segment by segment.

    counts_first: whether every segment, the last one too, is to be remembered once before any loss: where a loss is no sum over
    tokens, such as those of routers. Then `all_remembered` is called in between.
    """

    counts_first: bool

    def start(self) -> Any:
        """What is remembered where a document begins: constants, as nothing hands their gradients on."""
        ...

    def remember(self, tokens: Tensor, layout: SequenceLayout | None, memory: Any) -> Any:
        """What is remembered behind the tokens; called without gradients."""
        ...

    def all_remembered(self) -> None:
        """All segments have been given to `remember` once."""
        ...

    def loss(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, memory: Any, keeps: bool
    ) -> tuple[Tensor, Any]:
        """This rank's share of the loss, a scalar, and what is remembered behind the tokens, None unless it `keeps` that."""
        ...

    def scores(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, memory: Any, keeps: bool
    ) -> tuple[TokenScores, Any]:
        """As `loss`, of each token by itself; called without gradients."""
        ...

    def end(self) -> None:
        """The sequence is done, or given up."""
        ...


class StreamedModel(Protocol):
    """A model that can be given what it remembers of earlier tokens, with gradients."""

    def sequence(self, num_valid: int, routing: Any, offload: bool) -> StreamedSequence:
        """Begin a sequence whose losses are divided by `num_valid`.

        routing: what the caller says of routers, or None. offload: whether what all later segments read is kept in host memory.
        """
        ...


Model = TypeVar("Model", bound=nn.Module)
StreamAdapter = Callable[[Model], StreamedModel]
"""Makes a model one that runs in segments; raises InputError for a layer that cannot, by its name. It changes nothing."""

_ADAPTERS: dict[type[nn.Module], StreamAdapter[Any]] = {}


def register_stream(model_class: type[Model], adapter: StreamAdapter[Model]) -> None:
    """Let `longspan.stream` take models of a class, or derived from it, by calling ``adapter(model)``.

    A class nearer to the model's own goes before one further up; an adapter that was registered before is replaced.
    """
    _ADAPTERS[model_class] = adapter


def _adapter_of(model: nn.Module) -> StreamAdapter[Any] | None:
    return next((_ADAPTERS[base] for base in type(model).__mro__ if base in _ADAPTERS), None)


def is_others_pretrained(model: object) -> bool:
    """Whether a model is Transformers' or PEFT's around one, of layers that are not this library's."""
    if "transformers" not in sys.modules or not isinstance(model, nn.Module):
        return False
    if any(isinstance(module, SequenceMixer) for module in model.modules()):
        return False
    from longspan.integrations.transformers.structure import is_transformers_model

    return is_transformers_model(model)


def adapted(model: nn.Module) -> StreamedModel:
    """The model as the engine takes it.

    Raises:
        InputError: for a class that has no adapter, or a model that its adapter refuses.
    """
    adapter = _adapter_of(model)
    if adapter is None and is_others_pretrained(model):
        from longspan.streaming.pretrained import StreamedPretrained

        return StreamedPretrained(model)
    if adapter is None:
        inside = next((name for name, part in model.named_modules() if name and _adapter_of(part) is not None), None)
        if inside is not None:
            raise InputError(
                f"stream() takes a model itself, not what is around it; got {type(model).__name__}, whose part {inside!r} is a "
                f"{type(model.get_submodule(inside)).__name__}. Pass that part; over ranks sum its gradients with "
                "longspan.sum_gradients()"
            )
        known = ", ".join(sorted(base.__name__ for base in _ADAPTERS))
        raise InputError(
            f"stream() takes a model that can be given what it remembers of earlier tokens: {known}, and those of Hugging Face "
            f"Transformers that longspan.parallelize takes; got {type(model).__name__}. Say how its class does it with "
            "longspan.streaming.register_stream()"
        )
    return adapter(model)
