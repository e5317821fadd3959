"""Calls without values: what a compiler traces, what is planned on fake tensors, and what a checkpoint's policy may see.

An operator of this library computes in place, block by block, by a plan made on the host. A compiler that traced it would unroll
the blocks and compile them again for every length; a policy of selective checkpointing that saved one of its products would hand
back what has been changed since. So to both an operator is one thing:

    `torch.compile`, `torch.export`, fake and meta tensors    an `OpaqueOperator`: its shapes by a function, its gradient by
                                                              another operator, which computes forward once more
    several ranks under `torch.compile`                       a plain call between two graphs (`outside_graphs`), so that the
                                                              exchanges of all ranks keep their order
    selective checkpointing                                   a plain call that the policy does not see
                                                              (`unseen_by_checkpointing`), recomputed as a whole
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (Tensor, torch.nn.Parameter)
_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")


def has_no_values(x: Tensor) -> bool:
    """Whether a compiler traces this call, or x is a tensor without values: fake, or on the device ``meta``."""
    return torch.compiler.is_compiling() or x.is_meta or (type(x) not in _PLAIN and _is_fake(x))


def _is_fake(x: Tensor) -> bool:
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, FakeTensor | FunctionalTensor)


def makes_fakes() -> bool:
    """Whether new tensors are fake ones: `FakeTensorMode` is on."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def breaks_graphs() -> bool:
    """Whether `torch.compile` traces this call, and a function may be called between two graphs."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which `torch.compile` calls as it is, between two graphs: neither it nor what it calls is traced."""
    # torch.compiler.disable would load the compiler with `import longspan`.
    disabled: Callable[P, R] = torch._disable_dynamo(function)
    return disabled


def unseen_by_checkpointing(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, of whose operations a policy of selective activation checkpointing sees none; they are all recomputed.

    What it computes in place must not be saved half-way, and a collective must not be left out: its buffer would stay empty.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        with _without_policies():
            return function(*args, **kwargs)

    return call


@contextmanager
def _without_policies() -> Iterator[None]:
    """Takes the modes of selective checkpointing off the stack of dispatch modes; others stay."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode
    from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

    policies = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    # Modes of tracing have places of their own below the stack's.
    above = [mode for mode in _get_current_dispatch_mode_stack() if getattr(mode, "_mode_key", None) is None]
    if not any(isinstance(mode, policies) for mode in above):
        yield
        return
    for _ in above:
        _pop_mode()
    kept = [mode for mode in above if not isinstance(mode, policies)]
    for mode in kept:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in kept:
            _pop_mode()
        for mode in above:
            _push_mode(mode)


@contextmanager
def outside_modes() -> Iterator[None]:
    """Plain tensors whatever modes are on, such as one that makes every new tensor a fake one."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, where PyTorch has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


class OpaqueOperator:
    """A function of tensors as one operator of PyTorch, differentiable once.

    Its gradient is an operator, too. Unless it is given, it runs the function again, with autograd, so that nothing but inputs is
    kept.
    """

    def __init__(
        self,
        name: str,
        parameters: str,
        num_outputs: int,
        function: Callable[..., Sequence[Tensor]],
        fake: Callable[..., Sequence[Tensor]],
        gradient: Callable[..., Sequence[Tensor | None]] | None = None,
    ) -> None:
        """
        Args:
            name: ``"longspan::…"``.
            parameters: as in a schema of PyTorch; those that are ``Tensor`` or ``Tensor?`` take gradients if they are floating.
            num_outputs: number of tensors that it returns.
            function: what it computes; takes the parameters by position.
            fake: its outputs without values, contiguous, in the same order.
            gradient: takes the gradients of all outputs, the outputs, and the parameters by position; returns the gradients of
                those that are ``Tensor`` or ``Tensor?``, in order.
        """
        kinds = [parameter.split()[0] for parameter in parameters.split(", ")]
        self._places = [place for place, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?")]
        self._function, self._gradient = function, gradient
        outputs = ", ".join(["Tensor"] * num_outputs)
        self.operator = torch.library.custom_op(
            name, self._forward, mutates_args=(), schema=f"({parameters}) -> ({outputs})"
        )
        self._unwrap: Callable[[Sequence[Tensor]], Any] = tuple if num_outputs > 1 else itemgetter(0)
        self.operator.register_fake(lambda *args: self._unwrap(fake(*args)))
        self._backward_operator = torch.library.custom_op(
            f"{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor[] gradients, Tensor[] outputs, bool[] wanted, {parameters}) -> Tensor[]",
        )
        self._backward_operator.register_fake(self._backward_fake)
        self.operator.register_autograd(self._gradients, setup_context=self._setup)

    def __call__(self, *args: Any) -> Any:
        return self.operator(*args)

    def _forward(self, *args: Any) -> Any:
        with torch.no_grad():
            return self._unwrap([x.contiguous() for x in self._function(*args)])

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = () if self._gradient is None else output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*(inputs[place] for place in self._places), *outputs)
        ctx.others = [None if place in self._places else x for place, x in enumerate(inputs)]

    def _gradients(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        saved = ctx.saved_tensors
        for place, x in zip(self._places, saved, strict=False):
            args[place] = x
        outputs = list(saved[len(self._places) :])
        wanted = [bool(ctx.needs_input_grad[place]) for place in self._places]
        found = self._backward_operator(list(grads), outputs, wanted, *args)
        results: list[Tensor | None] = [None] * len(args)
        for place, is_wanted, grad in zip(self._places, wanted, found, strict=True):
            results[place] = grad if is_wanted else None
        return tuple(results)

    def _backward(self, gradients: list[Tensor], outputs: list[Tensor], wanted: list[bool], *args: Any) -> list[Tensor]:
        found: Sequence[Tensor | None]
        if self._gradient is not None:
            with torch.no_grad():
                found = self._gradient(gradients, outputs, *args)
        else:
            found = self._computed_again(gradients, wanted, args)
        # An operator gives no tensor that it was given, and none twice.
        taken = {x.untyped_storage().data_ptr() for x in gradients}
        results = []
        for place, is_wanted, grad in zip(self._places, wanted, found, strict=True):
            if not is_wanted:
                grad = self._nothing(args)
            elif grad is None:
                grad = torch.zeros_like(args[place], memory_format=torch.contiguous_format)
            elif grad.untyped_storage().data_ptr() in taken:
                grad = grad.clone(memory_format=torch.contiguous_format)
            results.append(grad.contiguous())
            taken.add(results[-1].untyped_storage().data_ptr())
        return results

    def _computed_again(
        self, gradients: Sequence[Tensor], wanted: Sequence[bool], args: Sequence[Any]
    ) -> Sequence[Tensor | None]:
        given = list(args)
        with _autograd():
            for place, is_wanted in zip(self._places, wanted, strict=True):
                if given[place] is not None:
                    given[place] = given[place].detach().requires_grad_(is_wanted)
            leaves = [given[place] for place, is_wanted in zip(self._places, wanted, strict=True) if is_wanted]
            pairs = [(x, grad) for x, grad in zip(self._function(*given), gradients, strict=True) if x.requires_grad]
            outputs, incoming = [x for x, _ in pairs], [grad for _, grad in pairs]
            found = iter(torch.autograd.grad(outputs, leaves, incoming, allow_unused=True) if pairs else ())
        return [next(found, None) if is_wanted else None for is_wanted in wanted]

    def _backward_fake(
        self, gradients: list[Tensor], outputs: list[Tensor], wanted: list[bool], *args: Any
    ) -> list[Tensor]:
        return [
            torch.empty_like(args[place], memory_format=torch.contiguous_format) if is_wanted else self._nothing(args)
            for place, is_wanted in zip(self._places, wanted, strict=True)
        ]

    def _nothing(self, args: Sequence[Any]) -> Tensor:
        like: Tensor = next(args[place] for place in self._places if args[place] is not None)
        return like.new_empty(0)
