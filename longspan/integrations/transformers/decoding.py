"""Decoding with a parallelized model: the model as it was, on this rank alone, from a cache that `prefill` has filled.

A new token is one step of every layer: there is no sequence to split. So a call that is given such a cache takes the unmodified
code, with the attention implementation that the model had, and meets no other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from longspan.errors import InputError

if TYPE_CHECKING:
    from longspan.integrations.transformers.model import ParallelModel

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What models call their cache; Mamba's have a name of their own."""

_PREFILLED = "longspan_prefilled"
"""Attribute of a cache that `prefill` has filled: how many tokens it was filled with."""


def mark_prefilled(cache: Any, num_tokens: int) -> None:
    """Let a parallelized model decode with `cache`."""
    setattr(cache, _PREFILLED, num_tokens)


def cache_of(given: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, or None."""
    return next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)


class Decoding:
    """Runs of the unmodified model inside of a parallelized one.

    modules: those whose forward, or ``generate``, runs unmodified now, outermost first.
    """

    def __init__(self, model: ParallelModel) -> None:
        self.model = model
        self.modules: list[nn.Module] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoding:
        """That of the model's copy, whichever of the two is met first."""
        return deepcopy(self.model, memo).decoding

    @property
    def is_running(self) -> bool:
        """Whether the model runs as it was: hooks let everything pass."""
        return bool(self.modules)

    def begins(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether a call of the head or the backbone runs unmodified: asked before it, answered by `ends` behind it."""
        if self.modules:
            return True
        if getattr(cache_of(given), _PREFILLED, None) is None:
            return False
        self._enter(module)
        return True

    def ends(self, module: nn.Module) -> bool:
        """Whether the call that ends now ran unmodified."""
        if not self.modules:
            return False
        if self.modules[-1] is module:
            self._leave()
        return True

    def _enter(self, module: nn.Module) -> None:
        if not self.modules:
            self.model.take_off()
        self.modules.append(module)

    def _leave(self) -> None:
        self.modules.pop()
        if not self.modules:
            self.model.put_on()

    @contextmanager
    def unmodified(self) -> Iterator[None]:
        """The model as it was, for as long as the context lasts."""
        # No module of the model, so that no forward inside ends it.
        self._enter(nn.Module())
        try:
            yield
        finally:
            self._leave()

    def install(self, head: nn.Module) -> None:
        """Let ``head.generate`` decode on this rank, or say why it cannot."""
        if callable(getattr(head, "generate", None)):
            head.__dict__["generate"] = self.generate

    def uninstall(self, head: nn.Module) -> None:
        head.__dict__.pop("generate", None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the unmodified model, from a cache that `longspan.prefill` returned on this rank.

        Raises:
            InputError: without such a cache, or where Transformers would feed tokens again that the cache holds already.
        """
        head: Any = self.model.head
        cache = cache_of(kwargs)
        if getattr(cache, _PREFILLED, None) is None:
            raise InputError(
                f"generate() of a parallelized {type(head).__name__} without a cache of longspan.prefill: each new token is one "
                "step, which no ranks can share. Take cache = longspan.prefill(model, input_ids[:, :-1]).cache on every rank, and "
                "model.generate(input_ids, past_key_values=cache) on the rank where it is not None; or "
                "longspan.unparallelize(model) to generate without other ranks"
            )
        _check_continues(head, cache, kwargs, args)
        generate: Callable[..., Any] = type(head).generate
        with self.unmodified():
            return generate(head, *args, **kwargs)


def _check_continues(head: nn.Module, cache: Any, given: dict[str, Any], args: tuple[Any, ...]) -> None:
    """Refuse more than one token beside a cache that does not know its length: Transformers drops no token then."""
    tokens = given.get("input_ids", given.get("inputs", args[0] if args else None))
    if not isinstance(tokens, Tensor) or tokens.shape[-1] <= 1 or _knows_its_length(cache, given):
        return
    with_positions = given.get("cache_params") is None
    raise InputError(
        f"generate() of {type(head).__name__} was given {tokens.shape[-1]} tokens and a cache that does not know how many it holds "
        "(a limitation of Transformers): all would be fed again. Pass the last token alone, "
        f"model.generate(input_ids[:, -1:], {'past_key_values' if with_positions else 'cache_params'}=cache"
        f"{', position_ids=torch.tensor([[its position]])' if with_positions else ''}), which returns it with the new ones"
    )


def _knows_its_length(cache: Any, given: dict[str, Any]) -> bool:
    # Transformers asks past_key_values alone.
    if given.get("past_key_values") is None:
        return False
    return int(cache.get_seq_length()) > 0
