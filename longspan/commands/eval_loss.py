"""``longspan eval loss``: the loss of a run's model on text, by position and by document length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.commands.evaluation import EvalOptions, Findings, Subject, check_counts, run_evaluation
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.data.token_source import TokenSource
    from longspan.evaluation.loss import LossTables
    from longspan.train.loss import Evaluation

_DESCRIPTION = """The loss of a run's model on held-out text, by how many tokens it has seen and by the length of the document.

  longspan eval loss --run runs/my-run
  longspan eval loss --run runs/my-run --seq_len 65536 --parallel.sp 4 --plot loss.png
  longspan eval loss --run runs/my-run --text book.txt --json loss.json

Without options it is the run's validation loss, taken apart.
"""


@dataclass(frozen=True)
class EvalLoss(EvalOptions):
    """Which text, in sequences of which length."""

    text: tuple[str, ...] = ()
    """Text files in UTF-8, each of them a document; none takes the text that was held out of the data."""
    seq_len: int | None = None
    """Tokens of a sequence; None is as in the training."""
    sequences: int | None = None
    """At most so many sequences, spread evenly over the text; None is as in the run's validation."""

    def check(self) -> None:
        """See `EvalOptions.check`."""
        super().check()
        for name, value in (("seq_len", self.seq_len), ("sequences", self.sequences)):
            if value is not None:
                check_counts(name, (value,))


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments ask, and return the exit code."""
    return run_evaluation("loss", EvalLoss, _DESCRIPTION, arguments, _evaluate)


def _evaluate(options: EvalLoss, subject: Subject) -> Findings:
    from longspan.evaluation.loss import loss_tables
    from longspan.evaluation.plots import plot_loss

    config, ranks = subject.trained.config, subject.ranks
    source = ranks.together(lambda: _source(options, subject))
    seq_len = options.seq_len or config.train.seq_len
    subject.check_lengths([seq_len], "seq_len")
    tables = loss_tables(
        subject.model,
        source,
        seq_len,
        options.sequences or config.validation.sequences,
        config.data.documents,
        subject.trained.tokenizer.token_bytes,
        subject.layout_of,
        ranks,
    )
    about = {"text": source.name, "documents": config.data.documents}
    return Findings(_table(tables, source.name), about | _values(tables), partial(plot_loss, tables))


def _source(options: EvalLoss, subject: Subject) -> TokenSource:
    from longspan.data.prepared import open_prepared
    from longspan.data.token_source import TokensInMemory
    from longspan.train.data import folder_of_data
    from longspan.train.run_folder import RunFolder

    trained = subject.trained
    tokenizer = trained.tokenizer
    if not options.text:
        folder = folder_of_data(trained.config, RunFolder(Path(options.run)))
        return open_prepared(folder if options.data is None else Path(options.data), verify=False).validation
    documents = [[*tokenizer.encode([_read(name)])[0], tokenizer.end_of_document] for name in options.text]
    return TokensInMemory(", ".join(options.text), documents)


def _read(name: str) -> str:
    try:
        text = Path(name).read_bytes().decode()
    except UnicodeError as error:
        raise ConfigError(f"text {name!r} is not UTF-8: {error}. Give text in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"text {name!r} cannot be read: {error}. Give a file of text") from error
    if not text:
        raise ConfigError(f"text {name!r} is empty. Give some text, or leave it out")
    return text


def _range(power: int) -> tuple[int, int]:
    return 2**power, 2 ** (power + 1) - 1


def _table(tables: LossTables, name: str) -> str:
    from longspan.commands.table import columns

    parts = []
    for heading, table in (
        ("tokens seen", tables.by_context),
        ("tokens of the document", tables.by_document_length),
    ):
        rows = [("-".join(f"{n:,}" for n in dict.fromkeys(_range(power))), found) for power, found in table.items()]
        rows.append(("all", tables.whole))
        parts.append(
            columns(
                [heading, "nats/token", "bits/byte", "tokens"],
                [
                    [label, f"{found.nats_per_token:.4f}", f"{found.bits_per_byte:.4f}", f"{found.num_tokens:,}"]
                    for label, found in rows
                ],
            )
        )
    sequences = f"{tables.num_sequences} sequence{'s' * (tables.num_sequences > 1)} of {tables.seq_len:,} tokens"
    return f"{name}, {sequences}\n\n" + "\n".join(parts)


def _values(tables: LossTables) -> dict[str, Any]:
    def numbers(found: Evaluation) -> dict[str, Any]:
        return {
            "nats_per_token": found.nats_per_token,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.num_tokens,
            "bytes": found.num_bytes,
        }

    def rows(table: dict[int, Evaluation]) -> list[dict[str, Any]]:
        return [
            {"from": least, "to": most} | numbers(found)
            for (least, most), found in ((_range(power), found) for power, found in table.items())
        ]

    return {
        "seq_len": tables.seq_len,
        "sequences": tables.num_sequences,
        "whole": numbers(tables.whole),
        "by_context": rows(tables.by_context),
        "by_document_length": rows(tables.by_document_length),
    }
