"""What ``longspan eval needle`` and ``longspan eval passkey`` have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.commands.evaluation import EvalOptions, Findings, Subject, check_counts
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.evaluation.hidden_keys import HiddenKeyResult, Kind


@dataclass(frozen=True)
class HiddenKeyOptions(EvalOptions):
    """Where the number is hidden, in prompts of which length."""

    lengths: tuple[int, ...] = ()
    """Tokens of a prompt with its answer, several numbers for a row each; none is a quarter of a sequence of the training, a half,
    and all of it."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Share of the text that stands in front of the number, 0 to 1, several for a column each."""
    samples: int = 8
    """Prompts of each length and depth."""
    seed: int = 0
    """Decides numbers and texts."""

    def check(self) -> None:
        """See `EvalOptions.check`."""
        super().check()
        if self.lengths:
            check_counts("lengths", self.lengths)
        check_counts("samples", (self.samples,))
        check_counts("seed", (self.seed,), 0)
        if not self.depths:
            raise ConfigError("depths is empty; give at least one number from 0 to 1")
        for depth in self.depths:
            if not 0.0 <= depth <= 1.0:
                raise ConfigError(f"depths has {depth}; each must be from 0 to 1")


def find_hidden_keys(kind: Kind, options: HiddenKeyOptions, subject: Subject) -> Findings:
    """What the model finds, at each length and depth."""
    from longspan.data.prepared import open_prepared
    from longspan.evaluation.hidden_keys import HiddenKeys, hidden_key_results
    from longspan.evaluation.plots import plot_hidden_keys
    from longspan.train.data import folder_of_data
    from longspan.train.run_folder import RunFolder

    trained, ranks = subject.trained, subject.ranks
    tokenizer, config = trained.tokenizer, trained.config
    whole = config.train.seq_len
    lengths = options.lengths or tuple(dict.fromkeys(max(1, whole // part) for part in (4, 2, 1)))
    subject.check_lengths(lengths, "lengths")
    text = None
    if kind == "needle":
        folder = folder_of_data(config, RunFolder(Path(options.run)))
        folder = folder if options.data is None else Path(options.data)
        text = ranks.together(lambda: open_prepared(folder, verify=False)).validation
    keys = HiddenKeys(kind, tokenizer, config.data.documents, options.seed, text)
    found = list(
        hidden_key_results(subject.model, keys, lengths, options.depths, options.samples, subject.layout_of, ranks)
    )
    values = {
        "seed": options.seed,
        "samples": options.samples,
        "results": [dataclasses.asdict(each) for each in found],
    }
    return Findings(_table(found), values, partial(plot_hidden_keys, found, kind))


def _table(found: list[HiddenKeyResult]) -> str:
    from longspan.commands.table import columns

    lengths = list(dict.fromkeys(each.num_tokens for each in found))
    depths = list(dict.fromkeys(each.depth for each in found))
    by_place = {(each.num_tokens, each.depth): each for each in found}
    parts = []
    for name, shown in (
        ("found", lambda each: f"{each.accuracy:.0%}"),
        ("log probability of the number, nats", lambda each: f"{each.log_probability:.2f}"),
    ):
        rows = [[f"{length:,}", *(shown(by_place[length, depth]) for depth in depths)] for length in lengths]
        parts.append(f"{name}\n" + columns(["tokens", *(f"depth {depth:g}" for depth in depths)], rows))
    return "\n".join(parts)
