"""Generate text token by token: linear layers carry a state of constant size."""

from __future__ import annotations

from typing import Any

import torch

from longspan.data.tokenizer import Tokenizer


@torch.no_grad()
def generate(model: Any, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float, seed: int) -> str:
    """Text of `num_tokens` tokens that follows `prompt`, which opens a document; less where logits are no longer numbers.

    Args:
        model: has ``init_cache(batch_size)`` and ``step(tokens [1, 1], cache) -> logits [1, 1, vocab_size]``.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the random choices.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    cache = model.init_cache(1)
    tokens = [tokenizer.end_of_document, *tokenizer.encode([prompt])[0]]
    num_given = len(tokens)
    for position in range(num_given + num_tokens - 1):
        logits = model.step(torch.tensor([[tokens[position]]], device=device), cache)[0, 0].float().cpu()
        if position + 1 < num_given:
            continue
        if not logits.isfinite().all():
            break
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            # From the largest down, so that no quotient overflows, however low the temperature.
            weights = ((logits - logits.amax()).double() / temperature).softmax(-1)
            chosen = int(torch.multinomial(weights, 1, generator=random))
        tokens.append(chosen)
    return tokenizer.decode(tokens[num_given:])
