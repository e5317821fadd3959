"""Initial weights that are those of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.data.tokenizer import Tokenizer
from longspan.errors import DataError
from longspan.models import LinearLlama3
from longspan.train.trained import open_saved, open_tokenizer_of_run


def start_from(model: LinearLlama3, path: Path, tokenizer: Tokenizer | None) -> str:
    """Give a model the newest weights of a run; where they are, in words.

    Args:
        model: on this rank; it may be divided over ranks.
        path: the run folder.
        tokenizer: of the data that the model is going to be trained on; None where its tokens are no text.

    Raises:
        ConfigError, CheckpointError: as `open_saved`, and for weights of another model.
        DataError: where the run's tokenizer is another one, or one of the two has none.
    """
    saved = open_saved(path)
    theirs = open_tokenizer_of_run(saved.run, saved.config)
    if theirs is None or tokenizer is None:
        if theirs is not tokenizer:
            raise DataError(
                f"{path} was trained with data.task {saved.config.data.task!r}, and its tokens mean something else in this run. "
                "Take a run of the same data.task"
            )
    elif not same_meaning(theirs, tokenizer):
        raise DataError(
            f"the data was prepared with another tokenizer than that of {path}: its tokens would mean other text to these weights. "
            "Prepare it with the run's own: data.tokenizer and data.end_of_document as in its config.toml, or the path of its "
            "tokenizer.json"
        )
    saved.read_into(model, f"Give the [model] section of {saved.run.config}")
    return saved.source


def same_meaning(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers make the same tokens of a document."""
    return _meaning(one) == _meaning(other)


def _meaning(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer without what stands around a text, which training leaves out."""
    values: dict[str, Any] = json.loads(tokenizer.to_json())
    return {key: value for key, value in values.items() if key not in ("post_processor", "truncation", "padding")}
