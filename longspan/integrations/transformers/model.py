"""A Transformers model over ranks, in place: what its hooks do.

Two modules of a model are met: the head, which has labels, and the backbone, which has tokens. So the order in which a model is
parallelized, given to PEFT and given to TRL makes no difference. `ParallelModel` is kept by the head; its methods are the hooks.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextvars import Token
from copy import deepcopy
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longspan.errors import InputError, LayoutError
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.exchange.recomputation import keeping_states
from longspan.integrations.transformers import attention, dispatch, inputs, losses, mixers, rotary
from longspan.integrations.transformers.cache import Recorder
from longspan.integrations.transformers.call import CALL, RUNNING, ParallelCall
from longspan.integrations.transformers.decoding import Decoding, cache_of
from longspan.integrations.transformers.fla_methods import COMPUTE_LOSS, loss_of_shifted_labels
from longspan.integrations.transformers.methods import METHODS
from longspan.integrations.transformers.structure import (
    arguments_by_name,
    backbone_of,
    head_of,
    modeling_files_of,
    owner_of,
)
from longspan.layout import Order, SequenceLayout
from longspan.models.mixers import ParallelOptions, SequenceParallel
from longspan.tracing import outside_graphs

Model = TypeVar("Model", bound=nn.Module)

COMPARED_BATCHES = 2
"""How many calls have their ids compared over the ranks, of those with gradients and of those without: a wrong sampler would be
silent otherwise, and that of training is another than that of evaluation."""
KEPT_LAYOUTS = 8
"""Layouts of the last batches, which keep what was built for them."""

_OF_FUSED_HEAD = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""What TRL's head returns for each token."""

_STATE = "longspan_parallel"
_ABSENT = inspect.Parameter.empty
"""An attribute that an instance did not have by itself; a class, which copies of the model have in common."""


class ParallelModel:
    """What longspan keeps for a model it has parallelized.

    head: the model with the loss, or the backbone alone. backbone: the module that turns tokens into hidden states. numbers: of its
    mixers, in order. call: the
    forward that runs now. last_layout: of the last forward. num_calls: so far, with gradients (True) and without. gathers_logits:
    whether calls without gradients return the logits of whole sequences. tokens_to_verify: how many tokens of the next batch with
    gradients are compared with one process, or None.
    """

    def __init__(
        self,
        head: nn.Module,
        options: ParallelOptions,
        place: SequenceParallel,
        order: Order | None,
        loss: losses.LossKind,
        rank_order: tuple[int, ...] | None = None,
    ) -> None:
        self.head = head
        self.backbone = backbone_of(head)
        self.options, self.place, self.loss = options, place, loss
        self.mixers = mixers.mixers_of(self.backbone)
        self.numbers = {mixer: number for number, mixer in enumerate(self.mixers)}
        balances = any(mixers.ATTENTION in kind.calls for kind in self.mixers.values())
        self.order: Order = order or ("zigzag" if balances else "contiguous")
        self.rank_order = rank_order
        self.modeling_files = modeling_files_of(head)
        self.looks_at_largest = any(rotary.looks_at_largest_position(module) for module in self.backbone.modules())
        self.decoding = Decoding(self)
        self.call: ParallelCall | None = None
        self.last_layout: SequenceLayout | None = None
        self.num_calls: Counter[bool] = Counter()
        self._layouts: OrderedDict[tuple[int, tuple[int, ...] | None], SequenceLayout] = OrderedDict()
        self._tokens: list[tuple[Any, Token[Any]]] = []
        self._head_runs = False
        self._implementations: list[tuple[Any, str | None]] = []
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        self.gathers_logits = False
        self._num_rows = 1
        self._counted_by_trainer = False
        self._z_loss_coefficient: float | None = None
        self.tokens_to_verify: int | None = None
        self._handles: list[RemovableHandle] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModel:
        """A copy of the model is parallel too: of the same group, with its own mixers and hooks."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        vars(other).update(vars(self))
        other.decoding = Decoding(other)
        for name in ("head", "backbone", "mixers", "numbers", "num_calls", "_handles", "_implementations", "_replaced"):
            setattr(other, name, deepcopy(getattr(self, name), memo))
        other.call, other._tokens, other._layouts, other._head_runs = None, [], OrderedDict(), False
        dispatch.install(other, other.modeling_files)
        return other

    def __reduce__(self) -> Any:
        raise InputError(
            "a parallelized model cannot be pickled whole: it holds a process group. Save its state_dict() or call "
            "save_pretrained(), which are those of the model as it was, or longspan.unparallelize(model) first"
        )

    # --------------------------------------------------------------------------------------------- installing

    def install(self) -> None:
        """Hook the model."""
        dispatch.install(self, self.modeling_files)
        attention.register()
        self._own_config()
        self._implementations = [(config, config._attn_implementation_internal) for config in self._configs()]
        self.put_on()
        for module in self.mixers:
            self._hook(module, self.before_mixer, self.after_mixer)
        for module in self.backbone.modules():
            if rotary.looks_at_largest_position(module):
                self._hook(module, self.before_rotary, self.after_rotary)
        self._hook(self.backbone, self.before_backbone, self.after_backbone)
        if self.head is not self.backbone:
            self._hook(self.head, self.before_head, self.after_head)
            self.decoding.install(self.head)
        setattr(self.head, _STATE, self)
        self.head.sequence_parallel = self.place  # type: ignore[assignment]

    def uninstall(self) -> None:
        """The model as it was."""
        for handle in self._handles:
            handle.remove()
        self.take_off()
        self.decoding.uninstall(self.head)
        for module in self.backbone.modules():
            bound = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(bound, BoundCheckpointing):
                module.__dict__["_gradient_checkpointing_func"] = bound.checkpoint
        dispatch.uninstall(self, self.modeling_files)
        delattr(self.head, _STATE)
        del self.head.sequence_parallel

    def put_on(self) -> None:
        """What is set in the model itself, beside its hooks: the attention implementation, and methods of some mixers."""
        for config, _ in self._implementations:
            config._attn_implementation_internal = attention.ATTENTION_NAME
        for module, kind in self.mixers.items():
            for path, stand_in in kind.methods.items():
                owner, name = owner_of(module, path)
                self._replace(owner, name, MethodType(METHODS[stand_in], owner))
            for name in kind.switched_off:
                self._replace(module, name, False)
        if hasattr(self.head, COMPUTE_LOSS):
            self._replace(self.head, COMPUTE_LOSS, MethodType(loss_of_shifted_labels, self.head))

    def take_off(self) -> None:
        """The opposite of `put_on`."""
        for config, before in self._implementations:
            config._attn_implementation_internal = before
        while self._replaced:
            module, name, before = self._replaced.pop()
            if before is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

    def _replace(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute of an instance until `take_off`."""
        self._replaced.append((module, name, module.__dict__.get(name, _ABSENT)))
        module.__dict__[name] = value

    def _hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _own_config(self) -> None:
        """Give the model configs of its own: another model made from the same object must not see what is set in them."""
        copies: dict[int, Any] = {}
        for module in self.head.modules():
            config = module.__dict__.get("config")
            if config is not None:
                module.config = deepcopy(config, copies)

    def _configs(self) -> list[Any]:
        found = {
            id(config): config
            for module in self.head.modules()
            if (config := module.__dict__.get("config")) is not None
        }
        return list(found.values())

    # --------------------------------------------------------------------------------------------- one forward

    def layout_of(self, given: dict[str, Any], bounds: list[int] | None) -> SequenceLayout:
        """The layout of a batch of whole sequences; the same one for the same lengths."""
        rows, length = inputs.tokens_of(given).shape[:2]
        key = (length, None) if bounds is None else (rows * length, tuple(bounds))
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = SequenceLayout(key[0], self.place.group, self.order, bounds, rank_order=self.rank_order)
        self._layouts[key] = layout
        while len(self._layouts) > KEPT_LAYOUTS:
            self._layouts.popitem(last=False)
        return layout

    @outside_graphs
    def before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Whole sequences stay whole here, but for the labels; the backbone splits what it is given."""
        given = arguments_by_name(module, args, kwargs)
        if self.decoding.begins(module, given):
            return None
        if self.tokens_to_verify is not None and torch.is_grad_enabled():
            from longspan.integrations.transformers.verify import verify_first_batch

            verify_first_batch(self, given)
        self._head_runs = True
        self._num_rows = inputs.tokens_of(given).shape[0]
        call, given = self._begin(given)
        labels, shifted = given.get("labels"), given.get("shift_labels")
        if labels is not None or shifted is not None:
            self._check_loss()
            self._counted_by_trainer = given.get("num_items_in_batch") is not None
            if self._counted_by_trainer and self.num_calls[torch.is_grad_enabled()] <= COMPARED_BATCHES:
                inputs.check_first_labels(given, call.layout, self._num_rows)
            local, num_valid = self._local_labels(given, call.layout)
            if not self._counted_by_trainer:
                given["num_items_in_batch"] = num_valid
            given["labels"] = given["shift_labels"] = local
        self._scale_z_loss(call)
        balance = None if call.segment is None else call.segment.balance
        self._set(losses.LOSS_CALL, losses.LossCall(call.layout, not given.get(losses.FUSED_HEAD), balance))
        given[CALL] = self.call = call
        return (), given

    def after_head(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The share of the loss becomes what the caller's way of combining gradients needs."""
        if self.decoding.ends(module):
            return output
        self.call, self._head_runs = None, False
        if self._z_loss_coefficient is not None:
            self.head.z_loss_coefficient = self._z_loss_coefficient  # type: ignore[assignment]
            self._z_loss_coefficient = None
        self._reset()
        if output is None:
            return output
        layout = kwargs[CALL].layout
        if kwargs[CALL].segment is not None:
            # Shares of a sequence's loss: of all its segments together they are combined.
            return output
        if not torch.is_grad_enabled():
            self._gather_outputs(output, layout, bool(kwargs.get(losses.FUSED_HEAD)))
        if kwargs.get("labels") is None:
            return output
        share = output[0] if isinstance(output, tuple) else output.loss
        if share is None:
            return output
        loss = losses.combined(share, layout, self.loss, self._counted_by_trainer)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output.loss = loss
        return output

    @outside_graphs
    def before_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """This rank's tokens, their positions, and the call for the mixers."""
        given = arguments_by_name(module, args, kwargs)
        if self.decoding.begins(module, given):
            return None
        call = given.pop(CALL, None)
        if call is None and self._head_runs:
            # Some heads hand no keywords on.
            call = self.call
        if call is None:
            call, given = self._begin(given)
        given.pop(inputs.LAYOUT, None)
        _check_cache(given)
        parameters = inspect.signature(type(module).forward).parameters
        takes = frozenset(parameters)
        takes_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if call.split_already:
            given = inputs.without_masks(inputs.with_positions(given, call.layout, takes), takes)
        else:
            given = inputs.local_arguments(given, call.layout, takes)
        self._bind_checkpointing()
        cache = cache_of(given)
        call.recorder = cache if isinstance(cache, Recorder) else None
        self.call = call
        if takes_keywords:
            given[CALL] = call
        elif "position_ids" not in takes:
            # They have said where documents start.
            given.pop("position_ids", None)
        return (), given

    def after_backbone(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Every mixer has taken the layout, or the results would be wrong."""
        if self.decoding.ends(module):
            return
        call = self.call
        if not self._head_runs:
            # The backbone was called by itself.
            self.call = None
        if output is None or call is None:
            return
        self.last_layout = call.layout
        missing = sorted({type(mixer).__name__ for mixer in self.mixers if id(mixer) not in call.taken})
        if missing:
            raise LayoutError(
                f"{len(missing)} kinds of layers of {type(self.head).__name__} did not run with the layout of this call: "
                f"{', '.join(missing)}. {_REPORT}"
            )

    def before_mixer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The mixer that runs now is known to the call, and the call to what it calls."""
        if self.decoding.is_running:
            return
        kind = self.mixers[module]
        call = kwargs.get(CALL) if kind.reaches else self.call
        if call is None:
            raise LayoutError(
                f"{type(module).__name__} of a parallelized model runs without the layout of a call. Call the whole model; "
                f"{_REPORT}"
            )
        call.mixer = module
        if call.segment is not None:
            call.segment.enter(module, kwargs)
        if not kind.hands_on:
            self._set(RUNNING, call)

    def after_mixer(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """All that the table says of the mixer's class happened."""
        if self.decoding.is_running:
            return
        kind = self.mixers[module]
        call = kwargs.get(CALL) if kind.reaches else self.call
        if not kind.hands_on:
            self._reset_one()
        if output is None or call is None:
            return
        call.mixer = None
        missing = [name for name in kind.calls if name not in call.taken.get(id(module), ())]
        if missing:
            raise LayoutError(
                f"{type(module).__name__} did not call {', '.join(missing)} with the layout of this call: each rank would take its "
                f"tokens for a whole sequence. {_REPORT}"
            )

    def before_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Frequencies of the whole sequence's largest position, on every rank."""
        if self.call is None:
            return args, kwargs
        given = arguments_by_name(module, args, kwargs)
        given["position_ids"] = rotary.with_last_position(given["position_ids"], self.call.longest_document)
        return (), given

    def after_rotary(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Without the row of the position that was added."""
        return output if output is None or self.call is None else rotary.without_last_position(output)

    # --------------------------------------------------------------------------------------------- parts of it

    def _begin(self, given: dict[str, Any]) -> tuple[ParallelCall, dict[str, Any]]:
        """The call that a forward's arguments ask for, and the arguments with packed rows one after another."""
        self.check_mode(given)
        layout = given.get(inputs.LAYOUT)
        if layout is not None:
            inputs.check_given_layout(layout, given)
            self._check_group(layout)
            call = ParallelCall(layout, self.options, split_already=True, segment=given.pop(inputs.SEGMENT, None))
        else:
            inputs.check_arguments(given)
            self.compare_over_ranks(given)
            bounds = inputs.document_bounds(given)
            if bounds is not None:
                layout = self.layout_of(given, bounds)
                given = inputs.in_one_row(given)
            else:
                layout = self.layout_of(given, None)
            call = ParallelCall(layout, self.options)
            positions = given.get("position_ids")
            if self.looks_at_largest and positions is not None:
                call.num_positions = int(positions.max()) + 1
        self.num_calls[torch.is_grad_enabled()] += 1
        return call, given

    def check_mode(self, given: dict[str, Any]) -> None:
        """Refuse what would be found out only after something was sent."""
        _check_cache(given)
        config: Any = self.head.config
        wanted = given.get("output_attentions")
        inputs.check_outputs(config.output_attentions if wanted is None else wanted)
        losses.check_z_loss(self.head, given)
        for module in self.mixers:
            dropout = mixers.attention_dropout_of(module) if module.training else 0.0
            if dropout:
                raise InputError(
                    f"{type(module).__name__}: attention dropout {dropout} is not supported over ranks. Set attention_dropout to 0 "
                    "in the config"
                )

    def _check_group(self, layout: SequenceLayout) -> None:
        if layout.num_ranks != self.place.num_ranks or (layout.num_ranks > 1 and layout.group is not self.place.group):
            raise LayoutError(
                f"{inputs.LAYOUT} is of another group, of {layout.num_ranks} ranks, than the model, parallelized over "
                f"{self.place.num_ranks}. Build it with the group that was given to longspan.parallelize()"
            )

    def _local_labels(self, given: dict[str, Any], layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """This rank's shifted labels, contiguous, and how many labels count on all ranks."""
        shifted: Tensor | None = given.get("shift_labels")
        if inputs.LAYOUT in given:
            assert shifted is not None
            num_valid = (shifted != losses.IGNORED).sum()
            return shifted, sum_over_ranks(num_valid, layout) if layout.num_ranks > 1 else num_valid
        if shifted is None:
            shifted = losses.shifted_labels(given["labels"], layout)
        return layout.shard(shifted).contiguous(), (shifted != losses.IGNORED).sum()

    def _check_loss(self) -> None:
        if COMPUTE_LOSS in self.head.__dict__:
            return
        forward = inspect.unwrap(type(self.head).forward)
        try:
            source = inspect.getsource(forward)
        except (OSError, TypeError):
            source = ""
        if not re.search(r"self\.loss_function\([^)]*\*\*", source):
            raise InputError(
                f"{type(self.head).__name__} computes its loss in its own way, from labels that are not split. Call it without "
                "labels, and compute the loss from its logits, which are this rank's, and labels made with "
                "layout_of(model).shard_labels(ids)"
            )

    def _gather_outputs(self, output: Any, layout: SequenceLayout, is_fused: bool) -> None:
        """In evaluation, whole sequences' logits where they are wanted, and what TRL's head returns for each token."""
        names = _OF_FUSED_HEAD if is_fused else ("logits",) if self.gathers_logits else ()
        for name in names:
            local = getattr(output, name, None)
            if layout.num_ranks > 1 and local is not None:
                whole = layout.gather(local)
                setattr(output, name, whole.reshape(self._num_rows, -1, *whole.shape[2:]))

    def _scale_z_loss(self, call: ParallelCall) -> None:
        """A loss that is a mean over the tokens of a call: this rank's part of the mean over all of them."""
        coefficient, num_tokens = getattr(self.head, "z_loss_coefficient", None), call.layout.num_local_tokens
        whole = call.layout.seq_len if call.segment is None else call.segment.num_tokens
        if coefficient and num_tokens < whole:
            self._z_loss_coefficient = coefficient
            self.head.z_loss_coefficient = coefficient * num_tokens / whole

    def compare_over_ranks(self, given: dict[str, Any]) -> None:
        """The same batch on every rank of the group, or an error on all of them; of the first calls alone."""
        if self.num_calls[torch.is_grad_enabled()] < COMPARED_BATCHES:
            inputs.compare_over_ranks(given, self.place)

    def _bind_checkpointing(self) -> None:
        """Layers that are computed again find the call of their own forward, and the states that entered them."""
        for module in self.backbone.modules():
            present = module.__dict__.get("_gradient_checkpointing_func")
            if present is not None and not isinstance(present, BoundCheckpointing):
                module.__dict__["_gradient_checkpointing_func"] = BoundCheckpointing(self, present)

    def _set(self, variable: Any, value: object) -> None:
        self._tokens.append((variable, variable.set(value)))

    def _reset_one(self) -> None:
        if self._tokens:
            variable, token = self._tokens.pop()
            variable.reset(token)

    def _reset(self) -> None:
        while self._tokens:
            self._reset_one()


class BoundCheckpointing:
    """A model's checkpointing function. A recomputation sees the call of the forward that it repeats, and exchanges no states."""

    def __init__(self, model: ParallelModel, checkpoint: Callable[..., Any]) -> None:
        self.model, self.checkpoint = model, checkpoint
        self._keeping = keeping_states(checkpoint)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model, call = self.model, self.model.call

        def with_call(*inner: Any) -> Any:
            before, model.call = model.call, call
            try:
                return function(*inner)
            finally:
                model.call = before

        return self._keeping(with_call, *args, **kwargs)


_REPORT = (
    "This release of Transformers differs from those that longspan was tested with, or the model's code was changed"
)


def state_of(model: nn.Module) -> ParallelModel | None:
    """What longspan keeps for a model, or None where it is not parallelized."""
    return getattr(head_of(model), _STATE, None)


def _check_cache(given: dict[str, Any]) -> None:
    cache = cache_of(given)
    if cache is not None and not isinstance(cache, Recorder):
        raise InputError(
            f"a parallelized model was given a {type(cache).__name__} that longspan.prefill has not filled: decoding goes on one "
            "rank. Take longspan.prefill(model, input_ids), whose cache this model decodes with, or leave the cache out in training"
        )
