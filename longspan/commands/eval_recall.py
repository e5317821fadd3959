"""``longspan eval recall``: multi-query associative recall of a run's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from longspan.commands.evaluation import EvalOptions, Findings, Subject, check_counts, run_evaluation
from longspan.errors import ConfigError

_DESCRIPTION = """Multi-query associative recall (Zoology, arXiv 2312.04927) of a run's model, by pairs and length.

  longspan eval recall --run runs/recall --pairs 4 8 16 --lengths 64 256 1024
  longspan eval recall --run runs/my-run --pairs 8 --lengths 65536 --parallel.sp 4

Sequences are made on the spot: pairs of a key and a value, then as many times one of the keys, behind which its value is asked for.
A model of text is given tokens of its vocabulary; one that was trained with data.task recall its own words, in sequences that it
has not seen.
"""


@dataclass(frozen=True)
class EvalRecall(EvalOptions):
    """Which sequences, and how many."""

    pairs: tuple[int, ...] = ()
    """Pairs of a key and a value in a sequence, several numbers for a row each; none is recall.pairs of the run."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence, several numbers for a row each; none is as in the training."""
    vocab_size: int | None = None
    """Words that keys and values are drawn from; None is all that the model has."""
    power: float | None = None
    """The further behind the pairs the rarer a query, as n^(power - 1); None is recall.power of the run."""
    sequences: int = 64
    """Sequences of each number of pairs and length."""
    seed: int | None = None
    """Decides the sequences; None is that of the training."""

    def check(self) -> None:
        """See `EvalOptions.check`."""
        super().check()
        for name, numbers in (("pairs", self.pairs), ("lengths", self.lengths)):
            if numbers:
                check_counts(name, numbers)
        for name, value, least in (
            ("sequences", self.sequences, 1),
            ("vocab_size", self.vocab_size, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None:
                check_counts(name, (value,), least)


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments ask, and return the exit code."""
    return run_evaluation("recall", EvalRecall, _DESCRIPTION, arguments, _evaluate)


def _evaluate(options: EvalRecall, subject: Subject) -> Findings:
    from longspan.commands.table import columns
    from longspan.evaluation.plots import plot_recall
    from longspan.evaluation.recall import recall_results, recall_tasks, words_of_text

    trained = subject.trained
    config, tokenizer = trained.config, trained.text_tokenizer
    words = None if tokenizer is None else words_of_text(tokenizer)
    available = trained.model.config.vocab_size if words is None else len(words)
    vocab_size = available if options.vocab_size is None else options.vocab_size
    if vocab_size > available:
        raise ConfigError(f"vocab_size is {vocab_size}, and the model has {available} words. Take as many at most")
    lengths = options.lengths or (config.train.seq_len,)
    subject.check_lengths(lengths, "lengths")
    seed = config.train.seed if options.seed is None else options.seed
    power = config.recall.power if options.power is None else options.power
    tasks = recall_tasks(lengths, options.pairs or (config.recall.pairs,), vocab_size, seed, power)
    found = list(recall_results(subject.model, tasks, options.sequences, words, subject.layout_of, subject.ranks))
    table = columns(
        ["tokens", "pairs", "accuracy", "by chance", "nats/answer", "queries"],
        [
            [
                f"{each.seq_len:,}",
                f"{each.num_pairs:,}",
                f"{each.accuracy:.1%}",
                f"{each.chance:.1%}",
                f"{each.nats:.3f}",
                f"{each.num_queries:,}",
            ]
            for each in found
        ],
    )
    values = {"vocab_size": vocab_size, "power": power, "seed": seed, "sequences": options.sequences}
    return Findings(
        table, values | {"results": [dataclasses.asdict(each) for each in found]}, partial(plot_recall, found)
    )
