"""What a run measured to choose its exchange: said, written into checkpoints, and taken again when the run goes on.

Topologies sum in different orders. A run that measured anew after it was stopped could choose otherwise, and would then differ from
the run that was not stopped, in its last digits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from longspan.errors import CheckpointError, InputError
from longspan.exchange import Auto
from longspan.exchange.auto.figures import Figures, known_figures, take_figures
from longspan.layout import SequenceLayout
from longspan.train.config import Config, ParallelConfig
from longspan.train.loading import SavedCheckpoint
from longspan.train.ranks import Ranks


def measures(config: Config, ranks: Ranks) -> bool:
    """Whether the ranks measure which exchange is the fastest."""
    exchange = config.parallel.build_exchange(measure=not config.train.deterministic)
    return ranks.sp > 1 and isinstance(exchange, Auto) and exchange.measure


def sends_exactly(config: Config) -> Config:
    """The config with states that travel as they are: for a comparison with one process, in which nothing travels.

    What rounding costs would hide what the comparison looks for.
    """
    defaults = ParallelConfig()
    names = ("exchange_dtype", "exchange_top_k", "exchange_error_feedback", "exchange_max_relative_error")
    plain = {name: getattr(defaults, name) for name in names}
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **plain))


def figures_to_save(layout: SequenceLayout, ranks: Ranks) -> dict[str, Any]:
    """The figures of each group of ranks that share a sequence, for a checkpoint; every rank calls this."""
    own = known_figures(layout, ranks.device)
    everyone = ranks.gather_json(None if own is None else own.as_json())
    return {"sp": ranks.sp, "device": ranks.device.type, "groups": everyone[:: ranks.sp]}


def take_saved_figures(saved: SavedCheckpoint, layout: SequenceLayout, ranks: Ranks) -> bool:
    """Take the figures of a checkpoint if it has some of as many ranks, on such nodes and the same kind of device; say whether.

    Raises:
        CheckpointError: for figures of another form.
    """
    record = saved.state.get("exchange")
    if record is None:
        return False
    try:
        if (record["sp"], record["device"], len(record["groups"])) != (ranks.sp, ranks.device.type, ranks.dp):
            return False
        own = record["groups"][ranks.dp_rank]
        figures = None if own is None else Figures.from_json(own)
    except (InputError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"the checkpoint of step {saved.step} has no figures of an exchange that this version knows: {error}. "
            "Give a topology by name (parallel.exchange), or start a new run"
        ) from error
    if figures is None or not figures.fit(layout):
        return False
    take_figures(layout, ranks.device, figures)
    return True


def forget_taken(layout: SequenceLayout, ranks: Ranks) -> None:
    """Forget what was taken so far, for the check of another model than the run's; what was measured stays."""
    figures = known_figures(layout, ranks.device)
    if figures is not None:
        figures.taken.clear()


def describe(layout: SequenceLayout, ranks: Ranks, from_checkpoint: bool) -> str:
    """What the first group of ranks takes, in a line. from_checkpoint: as `take_saved_figures` said."""
    figures = known_figures(layout, ranks.device)
    if figures is None or not figures.taken:
        return "no state passes between ranks in the first batch"
    taken = ", ".join(
        f"{name} for {sizes.transition.__name__} states of {sizes.num_rows} x {sizes.key_size} x {sizes.value_size}"
        for (sizes, _), name in figures.taken.items()
    )
    return f"{taken}; as measured {'before' if from_checkpoint else 'now'}, and kept in the checkpoints"
