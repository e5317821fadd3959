"""What a model remembers of the tokens so far, of all its layers: `ModelMemory`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from longspan.models.mixers import LayerMemory


@dataclass(frozen=True)
class ModelMemory:
    """What a model remembers of the tokens so far, the same on every rank; it carries gradients.

    A linear layer takes constant memory, a softmax layer a key and a value for each token that is still seen. Of packed documents
    it is what is remembered of the last one; num_tokens: of that document so far.
    """

    num_tokens: int
    layers: tuple[LayerMemory, ...]

    def detach(self) -> ModelMemory:
        """The same numbers without their graph: where a segment's gradients end."""
        return ModelMemory(self.num_tokens, tuple(layer.detach() for layer in self.layers))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of all layers, by the layer's number and their name."""
        return {f"{number}.{name}": x for number, layer in enumerate(self.layers) for name, x in layer.tensors.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ModelMemory:
        """The same with these tensors, named so, in the place of its own."""
        own: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for name, x in tensors.items():
            number, _, of_layer = name.partition(".")
            own[int(number)][of_layer] = x
        layers = (replace(layer, tensors=named) for layer, named in zip(self.layers, own, strict=True))
        return ModelMemory(self.num_tokens, tuple(layers))

    def sent_back(self, kept: ModelMemory) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values that this call has made, each with the gradient that later segments of time have sent to `kept`.

        kept: the same memory, as an earlier call left it, which later segments were given; its gradients are taken from it.
        """
        for layer, of_kept in zip(self.layers, kept.layers, strict=True):
            made = None if layer.earlier is None else layer.earlier.last
            held = None if of_kept.earlier is None else of_kept.earlier.last
            if made is not None and held is not None:
                yield from zip((made.k, made.v), held.take_grads(), strict=True)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.num_bytes for layer in self.layers)
