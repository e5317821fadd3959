"""Linear-Llama3 as a causal language model of Transformers.

Shapes: B rows, N tokens of a row, padding included; T tokens of a call of the model inside, V tokens of the vocabulary.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from longspan.checks import described
from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.layout import Order, SequenceLayout
from longspan.models.hf.arguments import check_arguments, check_counted, check_labels, tokens_of
from longspan.models.hf.backbone import Backbone
from longspan.models.hf.batches import IGNORED, Arranged, arrange, check_mask
from longspan.models.hf.cache import LinearLlamaCache
from longspan.models.hf.configuration import LinearLlamaConfig
from longspan.models.hf.generation import StatefulGenerationMixin
from longspan.models.hf.pretrained import LinearLlamaPreTrainedModel
from longspan.models.hf.rows import advance, prefill_over_ranks
from longspan.models.hf.watching import watching
from longspan.models.linear_llama3 import LinearLlama3
from longspan.models.mixers.softmax import SoftmaxMixer
from longspan.models.routing import Routing

Model = TypeVar("Model", bound="LinearLlamaForCausalLM")

ORDER: Order = "zigzag"
"""Which tokens of a sequence a rank takes: those that balance softmax layers."""


class LinearLlamaForCausalLM(LinearLlamaPreTrainedModel, StatefulGenerationMixin):
    """`longspan.models.LinearLlama3` for Transformers: `generate`, `Trainer`, PEFT, `save_pretrained` and `from_pretrained`.

    The model itself is `model`, a `LinearLlama3` of ``config.core()``. Its initial weights are drawn from PyTorch's random state.
    """

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config)
        self.model = LinearLlama3(config.core())
        if not self.model.norm.weight.is_meta:
            self.model.init_weights(int(torch.randint(2**63 - 1, ())))
        for part in self.model.modules():
            # Transformers draws no other ones then.
            part._is_hf_initialized = True  # type: ignore[assignment]
        self.gradient_checkpointing = False
        self.last_layout: SequenceLayout | None = None
        """Of the last call over ranks: which tokens its logits are of."""
        self._has_warned_of_length = False
        self.post_init()

    @classmethod
    def of(cls: type[Model], model: LinearLlama3, **config: Any) -> Model:
        """A model of this library as one of Transformers, with these very weights; `config` is as in `LinearLlamaConfig.of`."""
        with torch.device("meta"):
            made = cls(LinearLlamaConfig.of(model.config, **config))
        made.model = model
        return made.eval()

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, for those who compute a loss from what the head would read."""
        return Backbone(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinearLlamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each one, and with labels the loss.

        Args:
            input_ids: int64 ``[B, N]``.
            attention_mask: ``[B, N]``, 0 for padding on the left or the right of rows, which then has no part in anything: its
                logits are 0. With a cache it may have the columns of earlier tokens in front, which say nothing new.
            position_ids: ``[B, N]`` or ``[1, N]``. Where they restart, packed documents start, which see nothing of each other.
            past_key_values: what earlier calls remembered; filled in place with these tokens.
            inputs_embeds: refused: the model takes token ids.
            labels: ``[B, N]``, as `input_ids` (they are shifted inside), -100 where none counts. In training mode logits are then
                None, unless ``config.logits_in_training``; the loss is computed without those of all tokens.
            use_cache: whether to return what is remembered; None is ``config.use_cache`` in evaluation mode without labels.
            logits_to_keep: of how many of the last tokens logits are wanted, 0 for all, or int64 of which ones.
            kwargs: ``num_items_in_batch``, what the sum of the losses is divided by, the labels that count here if not said;
                ``shift_labels``, labels that were shifted; ``cu_seq_lens_q``, where packed documents start.

        Raises:
            InputError: for arguments that do not fit, or are not known.

        Over ranks (`longspan.parallelize`) sequences are whole and the same on every rank; logits are those of this rank's tokens
        (`last_layout`), and the loss its share: `longspan.sum_gradients` makes the gradients. Without gradients it is the whole
        loss.
        """
        tokens = tokens_of(input_ids, inputs_embeds)
        check_arguments(kwargs, position_ids is not None)
        place = self.model.sequence_parallel
        over_ranks = place is not None and place.num_ranks > 1
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not has_labels and not over_ranks
        if use_cache or past_key_values is not None:
            if has_labels:
                raise InputError(
                    "labels were given with a cache, which is for what comes behind these tokens. Pass use_cache=False, or no "
                    "labels"
                )
            if kwargs.get("cu_seq_lens_q") is not None:
                raise InputError("packed documents (cu_seq_lens_q) have no cache together. Pass use_cache=False")
            return self._go_on(tokens, attention_mask, position_ids, past_key_values, logits_to_keep, wants_hidden)
        if over_ranks and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise InputError(
                f"logits_to_keep={described(logits_to_keep)}: the last tokens of a sequence are on one rank. Leave it out, and "
                "take them from the logits of the rank that holds them (last_layout.positions)"
            )
        mask = check_mask(attention_mask, tokens)
        arranged = arrange(tokens, mask, position_ids, kwargs.get("cu_seq_lens_q"), place, ORDER)
        self.warn_of_length(arranged.longest)
        self.last_layout = arranged.layout if over_ranks else None
        if not has_labels:
            return self._read(arranged, tokens, logits_to_keep, wants_hidden)
        self._check_experts()
        num_valid = kwargs.get("num_items_in_batch")
        targets = kwargs.get("shift_labels")
        if targets is None:
            assert labels is not None
            check_labels(labels, tokens)
            targets = arranged.targets(labels, mask)
            if num_valid is not None:
                check_counted(labels, targets)
        routing = self._routing(arranged, targets, num_valid)
        if num_valid is None:
            num_valid = (targets != IGNORED).sum()
        return self._learn(arranged, tokens, targets, num_valid, routing, logits_to_keep, wants_hidden)

    def _routing(self, arranged: Arranged, targets: Tensor, num_valid: int | Tensor | None) -> Routing | None:
        """What the routers' losses of a batch are divided by, where it is one of several of a step."""
        if not self.config.num_experts or num_valid is None:
            return None
        # The number of tokens of the step, were there as many for each label in all of it.
        here = max(1, int((targets != IGNORED).sum()))
        return Routing(max(1, round(arranged.num_tokens * int(num_valid) / here)))

    def _check_experts(self) -> None:
        """Refuse to train routers whose losses would be left out."""
        core = self.model.config
        has_losses = core.num_experts and (core.balance_loss_weight or core.z_loss_weight)
        if not (has_losses and self.training and torch.is_grad_enabled()):
            return
        if not isinstance(self.model.head, nn.Linear):
            raise InputError(
                f"the head is a {type(self.model.head).__name__}, and the model has experts, whose losses come with that of a "
                "plain head. Leave the head as it is, or set balance_loss_weight and z_loss_weight to 0"
            )

    def _read(
        self, arranged: Arranged, tokens: Tensor, logits_to_keep: int | Tensor, wants_hidden: bool
    ) -> CausalLMOutputWithPast:
        """Logits of a batch."""
        # Of fewer tokens where that is the end of the call's own rows.
        fewer = isinstance(logits_to_keep, int) and logits_to_keep and arranged.layout is None and not wants_hidden
        with watching(self._watched(wants_hidden)) as found:
            logits = self.model(
                arranged.call(tokens),
                arranged.layout,
                logits_to_keep=min(int(logits_to_keep), tokens.shape[1]) if fewer else None,
            )
        logits = logits if fewer else slice_logits_to_keep(arranged.batch(logits), logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, hidden_states=self._hidden(found, arranged, wants_hidden))

    def _learn(
        self,
        arranged: Arranged,
        tokens: Tensor,
        targets: Tensor,
        num_valid: int | Tensor,
        routing: Routing | None,
        logits_to_keep: int | Tensor,
        wants_hidden: bool,
    ) -> CausalLMOutputWithPast:
        """The loss of a batch, and in evaluation its logits; targets: of each token, ``[B, N]``."""
        given, target = arranged.call(tokens), arranged.call(targets)
        if isinstance(num_valid, Tensor):
            num_valid = num_valid.detach().to(tokens.device).reshape(())
        head: nn.Module = self.model.head
        logits: Tensor | None = None
        with watching([*self._watched(wants_hidden), *([] if wants_hidden else [self.model.norm])]) as found:
            if isinstance(head, nn.Linear):
                loss = self.model(given, arranged.layout, labels=target, num_valid=num_valid, routing=routing)
                if self.config.logits_in_training or not self.training:
                    logits = at_least_float32(head(found[-1]))
            else:
                # An adapter in place of the head has no matrix of its own.
                logits = self.model(given, arranged.layout)
                total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
                loss = total / (num_valid.clamp(min=1) if isinstance(num_valid, Tensor) else max(1, num_valid))
        layout = arranged.layout
        if layout is not None and layout.num_ranks > 1 and not torch.is_grad_enabled():
            loss = sum_over_ranks(loss, layout)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if logits is None else slice_logits_to_keep(arranged.batch(logits), logits_to_keep),
            hidden_states=self._hidden(found, arranged, wants_hidden),
        )

    def _go_on(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LinearLlamaCache | None,
        logits_to_keep: int | Tensor,
        wants_hidden: bool,
    ) -> CausalLMOutputWithPast:
        """Logits of tokens behind what a cache holds, which then holds them too."""
        if cache is None:
            cache = LinearLlamaCache()
        elif not isinstance(cache, LinearLlamaCache):
            raise InputError(
                f"past_key_values must be a LinearLlamaCache, as an earlier call returned it; got {described(cache)}. Leave it out "
                "where a sequence starts"
            )
        mask = check_mask(attention_mask, tokens, cache.num_columns)
        length = tokens.shape[1]
        self.warn_of_length(cache.num_columns + length)
        num_logits = min(logits_to_keep, length) if isinstance(logits_to_keep, int) and logits_to_keep else length
        place = self.model.sequence_parallel
        if place is not None and place.num_ranks > 1 and not cache.groups:
            if mask is not None or num_logits != 1 or wants_hidden:
                raise InputError(
                    "a prompt over ranks has rows of one length, and gives the logits of its last token: pass logits_to_keep=1, as "
                    "generate does, and neither padding nor output_hidden_states"
                )
            logits = prefill_over_ranks(self.model, tokens, cache, ORDER)
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        if wants_hidden and (mask is not None or len(cache.groups) > 1):
            raise InputError(
                "output_hidden_states with a cache is for rows of one length. Pass them without padding, or use_cache=False"
            )
        with watching(self._watched(wants_hidden)) as found:
            logits = advance(self.model, tokens, mask, position_ids, cache, length if wants_hidden else num_logits)
        if isinstance(logits_to_keep, Tensor) or wants_hidden:
            logits = slice_logits_to_keep(logits, logits_to_keep)
        return CausalLMOutputWithPast(
            logits=logits, past_key_values=cache, hidden_states=tuple(found) if wants_hidden else None
        )

    def _watched(self, wants_hidden: bool) -> list[nn.Module]:
        """Modules whose outputs are the hidden states, the first to the last."""
        return [self.model.embedding, *list(self.model.blocks)[:-1], self.model.norm] if wants_hidden else []

    def _hidden(self, found: list[Tensor], arranged: Arranged, wants_hidden: bool) -> tuple[Tensor, ...] | None:
        return tuple(arranged.batch(x) for x in found) if wants_hidden else None

    def warn_of_length(self, num_tokens: int) -> None:
        """Softmax layers without a window see positions that they were not trained for; linear ones have none."""
        trained = self.config.max_position_embeddings
        if self._has_warned_of_length or trained is None or num_tokens <= trained:
            return
        if any(isinstance(part, SoftmaxMixer) and part.window is None for part in self.model.modules()):
            self._has_warned_of_length = True
            warnings.warn(
                f"{num_tokens:,} tokens are more than the {trained:,} of a sequence that softmax layers were trained for "
                "(config.max_position_embeddings): what comes behind may be poor",
                stacklevel=5,
            )
