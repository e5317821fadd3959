"""Weights on disk: one file or shards by an index; pickles and damage are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longspan.errors import CheckpointError
from longspan.models.weights import (
    INDEX,
    check_shapes,
    listed_differences,
    open_weights,
    refuse_pickle,
    refuse_pickled_folder,
    shapes_of,
)
from tests.models.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    save_file({"a": torch.arange(6).view(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(())}, tmp_path / "two.safetensors")
    placed = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tmp_path


def test_shards_are_one_set_of_weights(folder: Path) -> None:
    with open_weights(folder) as weights:
        assert weights.shapes == {"a": (2, 3), "b": (2,), "c": ()} and weights.metadata == {}
        assert torch.equal(weights.read("a"), torch.arange(6).view(2, 3)) and weights.read("b").dtype == torch.bfloat16


def test_a_single_file_has_its_metadata(folder: Path) -> None:
    save_file({"d": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    for path in (folder, folder / "model.safetensors"):
        with open_weights(path) as weights:
            assert weights.shapes == {"d": (1,)} and weights.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of weights: JSONDecodeError"),
        ('{"weight_map": 3}', "is no index of weights: AttributeError"),
        ('{"weight_map": {"a": "three.safetensors"}}', f"lacks three.safetensors, which {INDEX} names"),
        ('{"weight_map": {"a": "two.safetensors"}}', "does not hold what .* says of it; 3 differ: a, b, c"),
        ('{"weight_map": {"a": "../one.safetensors", "b": "one.safetensors"}}', "1 differ: b"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder: Path, index: str, message: str) -> None:
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message), open_weights(folder):
        pass


def test_what_is_not_there_or_damaged_is_named(folder: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="nowhere cannot be read as safetensors"),
        open_weights(folder / "nowhere"),
    ):
        pass
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: neither model.safetensors nor"), open_weights(folder):
        pass


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickles_are_refused_wherever_they_are(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} alone, which are pickles.*save_file\("):
        refuse_pickled_folder(tmp_path)
    with pytest.raises(CheckpointError, match="which are pickles"), open_weights(tmp_path):
        pass
    for modern in (True, False):
        torch.save({"a": torch.ones(1)}, tmp_path / name, _use_new_zipfile_serialization=modern)
        with pytest.raises(CheckpointError, match=r"is a pickle, as torch.save writes it"):
            refuse_pickle(tmp_path / name)
    # Beside safetensors they are not looked at.
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    refuse_pickled_folder(tmp_path)
    refuse_pickled_folder("no/folder")


def test_every_difference_is_listed() -> None:
    found = {f"extra.{i}": (1,) for i in range(30)} | {"same": (2,), "other": (3, 4)}
    wanted = {f"missing.{i}": (1,) for i in range(30)} | {"same": (2,), "other": (4, 3)}
    lines = listed_differences(found, wanted)
    assert len(lines) == 61 and "other: (3, 4) there, (4, 3) here" in lines
    with pytest.raises(
        CheckpointError, match=r"the weights are not those of this model, 61 differ:\n(.*\n){61}Mend it"
    ):
        check_shapes("the weights", found, wanted, "Mend it")
    check_shapes("the weights", wanted, wanted, "Mend it")


def test_a_matrix_that_is_used_twice_counts_once() -> None:
    assert "head.weight" in shapes_of(tiny_model()) and "head.weight" not in shapes_of(tiny_model(tie_embeddings=True))
