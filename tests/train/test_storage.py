"""Each rank writes a share of a checkpoint, and any other ranks read it."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from longspan.errors import CheckpointError
from longspan.launch import Place
from longspan.train.checkpoint import folder_name, newest_checkpoint, verify_checkpoint
from longspan.train.loading import open_checkpoint
from longspan.train.ranks import Ranks
from longspan.train.saving import CheckpointSaver
from longspan.train.storage import own_share
from tests.ranks import raised, run_on_ranks
from tests.train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

# One that the ranks do not divide evenly, one with fewer rows than ranks, two dtypes, a scalar.
WHOLE = {
    "a": torch.arange(35.0).view(7, 5),
    "b": torch.arange(3, dtype=torch.bfloat16),
    "c": torch.arange(24.0).view(4, 6),
    "n": torch.tensor(3.0),
}


def divided(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """`WHOLE` as FSDP2 holds it on a mesh of (copies, shares); scalars are whole."""
    if not shape:
        return {name: x.clone() for name, x in WHOLE.items()}
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(shape), mesh_dim_names=("replicate", "shard"))
    return {
        name: distribute_tensor(x.clone(), mesh, [Replicate(), Shard(0)], src_data_rank=None) if x.dim() else x.clone()
        for name, x in WHOLE.items()
    }


def ranks_here() -> Ranks:
    return Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))


def save(folder: Path, shape: tuple[int, ...], asynchronous: bool) -> list[str]:
    """Save and change the tensors at once; the names of the tensors that this rank wrote."""
    tensors = {f"model/{name}": x for name, x in divided(shape).items()}
    saver = CheckpointSaver(folder, ranks_here(), keep=2, asynchronous=asynchronous)
    saver.start(4, tensors, {"step": 4})
    assert saver.is_pending == asynchronous
    for x in tensors.values():
        x.zero_()
    while asynchronous and saver.is_pending:
        saver.advance()
    saver.finish()
    index = newest_checkpoint(folder) / f"index-{dist.get_rank():05d}.json"
    return list(json.loads(index.read_text()))


def load(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether each rank finds its part of what was saved."""
    wanted, found = divided(shape), divided(shape)
    for x in found.values():
        x.zero_()
    open_checkpoint(path).read("model", found)
    return all(torch.equal(_local(found[name]), _local(wanted[name])) for name in wanted)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^4-shape2-True$")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("num_ranks", "shape"),
    [(2, ()), (2, (1, 2)), (4, (2, 2)), pytest.param(4, (1, 4), marks=pytest.mark.slow)],
)
def test_what_any_ranks_save_others_load(
    tmp_path: Path, num_ranks: int, shape: tuple[int, ...], asynchronous: bool
) -> None:
    written = run_on_ranks(num_ranks, save, tmp_path, shape, asynchronous)
    path = newest_checkpoint(tmp_path)
    assert path.name == folder_name(4)
    loaded = load_checkpoint(path).tensors["model"]
    assert loaded.keys() == WHOLE.keys() and all(torch.equal(loaded[name], WHOLE[name]) for name in WHOLE)
    assert len(verify_checkpoint(path)) == len(list(path.iterdir()))
    if not shape:
        # Of tensors that all ranks have, each is written once.
        assert sorted(name for names in written for name in names) == [f"model/{name}" for name in WHOLE]
        assert all(written)
    for others, other_shape in ((2, (1, 2)), (4, (2, 2)), (2, ())):
        assert all(run_on_ranks(others, load, path, other_shape))


def test_copies_are_written_once_and_by_all_ranks_alike() -> None:
    tensors = {f"model/{n}": torch.zeros(100 + n) for n in range(40)}
    shares = [own_share(tensors, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(x.numel() for x in share.values()) for share in shares]
    assert max(sizes) - min(sizes) < 140


def test_torch_reads_the_files_as_it_reads_those_of_hugging_face(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run_on_ranks(2, save, tmp_path, (1, 2), False)
    found = {f"model/{name}": torch.zeros_like(x) for name, x in WHOLE.items()}
    reader = dcp.HuggingFaceStorageReader(str(newest_checkpoint(tmp_path)))
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[f"model/{name}"], x) for name, x in WHOLE.items())


def save_where_rank_1_fails(folder: Path, point: str, asynchronous: bool) -> None:
    def fails(name: str, step: int) -> None:
        if (name, step, dist.get_rank()) == (point, 4, 1):
            raise OSError(28, "No space left on device")

    with mock.patch("longspan.train.storage.writing.reached", fails):
        saver = CheckpointSaver(folder, ranks_here(), keep=1, asynchronous=asynchronous)
        for step in (3, 4):
            saver.start(step, {"model/w": torch.ones(2), "model/v": torch.ones(3)}, {})
            saver.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("point", ["checkpoint.file", "checkpoint.writing"])
def test_a_disk_that_is_full_for_one_rank_is_an_error_of_all(tmp_path: Path, point: str, asynchronous: bool) -> None:
    for kind, text in run_on_ranks(2, raised, save_where_rank_1_fails, tmp_path, point, asynchronous):
        assert kind == "CheckpointError"
        assert "step 4 could not be written" in text and "rank 1: [Errno 28] No space left on device" in text
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(3)]
    assert load_checkpoint(newest_checkpoint(tmp_path)).step == 3


def test_a_part_that_is_missing_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(3, {"model": {"w": torch.ones(4, 2)}}, {}), keep=1)
    saved = open_checkpoint(path)
    for targets in ({"w": torch.ones(4, 3)}, {"v": torch.ones(4, 2)}):
        with pytest.raises(CheckpointError, match=r"has not what is read: .*Remove the folder step-00000003 to go on"):
            saved.read("model", targets)
    index = path / "index-00000.json"
    entries = json.loads(index.read_text())
    entries["model/w"]["sizes"] = [3, 2]
    from longspan.train import checkpoint as module

    files = dict(saved.files)
    index.unlink()
    files[index.name] = module.write_synced(index, json.dumps(entries).encode())
    (path / "manifest.json").write_bytes(module._manifest(3, files))
    with pytest.raises(CheckpointError, match="do not make up model/w once"):
        open_checkpoint(path)
