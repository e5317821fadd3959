"""The check that a run makes before its first step, by itself: random tokens, no data, no run folder."""

from __future__ import annotations

import torch

from longspan.data.packing import Sequences
from longspan.launch import num_cores
from longspan.parallel import gathered
from longspan.train.config import Config
from longspan.train.config_checks import check_degrees
from longspan.train.exchange import sends_exactly
from longspan.train.model import build_model, build_parallel, checked_dtype, copy_weights
from longspan.train.ranks import Ranks
from longspan.train.segments import Segmentation
from longspan.train.selfcheck import SelfCheck, self_check
from longspan.train.step_batch import layouts_over

_DOCUMENT_TOKENS = 700


def verify_config(config: Config, ranks: Ranks) -> SelfCheck:
    """Compare one batch of the config's model on these ranks with one process; the same result on every rank.

    The batch has a sequence for each data-parallel group, of the config's length, shortened to `train.check_tokens` in all, and
    documents of about 700 tokens where the config resets at documents. Weights and tokens are drawn from `train.seed`; the
    vocabulary is `data.vocab_size`. Shares of ranks are those that the config says; nothing is measured. It computes in float32, or
    with experts in float64, and sends states as they are, as a run's own check does.

    Raises:
        ConfigError: if the mesh does not fit the ranks.
    """
    ranks.arrange(check_degrees(config, ranks.world_size))
    sequences = random_sequences(config, ranks.dp, ranks.sp)
    dtype = checked_dtype(config)
    model = build_parallel(sends_exactly(config), config.data.vocab_size, ranks, weights=dtype)
    weights = gathered(model.named_parameters(), ranks.is_first)

    return self_check(
        model,
        lambda: copy_weights(weights, build_model(config, config.data.vocab_size, ranks.device).to(dtype)),
        sequences,
        layouts_over(ranks, config.parallel.order, config.parallel.weights, config.parallel.given_rank_order),
        ranks,
        threads_alone=num_cores(),
        segments=Segmentation.of(config.train),
    )


def random_sequences(config: Config, num_sequences: int, least_tokens: int) -> Sequences:
    """Random tokens, the same on every rank, of the config's length and vocabulary."""
    wanted = max(config.train.check_tokens // num_sequences, least_tokens)
    length = min(config.train.seq_len, wanted)
    random = torch.Generator().manual_seed(config.train.seed)
    tokens = torch.randint(config.data.vocab_size, (num_sequences, length + 1), generator=random)
    if config.data.documents != "reset":
        return Sequences(tokens)
    starts = [
        tuple(sorted({*torch.randint(1, length + 1, (length // _DOCUMENT_TOKENS,), generator=random).tolist()}))
        for _ in range(num_sequences)
    ]
    return Sequences(tokens, tuple(starts))
