"""Generate text token by token: linear layers carry a state of constant size."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from longspan.data.tokenizer import Tokenizer
from longspan.models import ModelMemory


class Decodable(Protocol):
    """A language model that can be given what it remembers of the tokens before."""

    def __call__(
        self, tokens: Tensor, *, memory: ModelMemory | None, output_memory: bool
    ) -> tuple[Tensor, ModelMemory]:
        """Logits [B, T, vocab_size] of tokens [B, T], and what is remembered afterwards."""
        ...


@torch.no_grad()
def generate(
    model: Decodable,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device | None = None,
) -> str:
    """Text of `num_tokens` tokens that follows `prompt`, which opens a document; less where logits are no longer numbers.

    Args:
        model: of one process.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the random choices.
        device: of the model; None is the CPU.
    """
    random = torch.Generator().manual_seed(seed)
    memory: ModelMemory | None = None
    given = [tokenizer.end_of_document, *tokenizer.encode([prompt])[0]]
    made: list[int] = []
    while len(made) < num_tokens:
        all_logits, memory = model(torch.tensor([given], device=device), memory=memory, output_memory=True)
        logits = all_logits[0, -1].float().cpu()
        if not logits.isfinite().all():
            break
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            # From the largest down, so that no quotient overflows, however low the temperature.
            weights = ((logits - logits.amax()).double() / temperature).softmax(-1)
            chosen = int(torch.multinomial(weights, 1, generator=random))
        made.append(chosen)
        given = [chosen]
    return tokenizer.decode(made)
