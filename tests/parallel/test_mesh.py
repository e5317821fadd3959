"""The mesh: arithmetic of ranks, sub-meshes by name, and what is refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from longspan.comm.groups import timeout_of
from longspan.degrees import factorings
from longspan.errors import ConfigError, LayoutError
from longspan.parallel import MeshDegrees, ParallelMesh
from tests.ranks import raised, run_on_ranks

NAMES: tuple[Any, ...] = ("dp_replicate", "dp_shard", "sp", "data", "shard", "replicate", "world")


def test_neighbours_share_a_sequence_and_the_others_hold_shares_or_copies() -> None:
    degrees = MeshDegrees(dp_replicate=2, dp_shard=2, sp=2)
    assert degrees.groups("sp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert degrees.groups("data") == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert degrees.groups("shard") == degrees.groups("dp_shard") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert degrees.groups("replicate") == [(0, 1, 4, 5), (2, 3, 6, 7)]
    over_sp = MeshDegrees(2, 2, 2, shard_over_sp=True)
    assert over_sp.groups("shard") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert over_sp.groups("replicate") == over_sp.groups("dp_replicate") == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize("shard_over_sp", [False, True])
def test_coordinates_are_places_in_groups_and_sizes_their_lengths(shard_over_sp: bool) -> None:
    for degrees in factorings(12):
        degrees = MeshDegrees(degrees.dp_replicate, degrees.dp_shard, degrees.sp, shard_over_sp)
        for name in NAMES:
            groups = degrees.groups(name)
            assert sorted(rank for group in groups for rank in group) == list(range(12))
            for group in groups:
                assert len(group) == degrees.size(name)
                assert [degrees.coordinate(rank, name) for rank in group] == list(range(len(group)))
        # Each rank holds one share of one copy.
        assert degrees.size("shard") * degrees.size("replicate") == 12
        assert degrees.shards_weights == (degrees.dp_shard > 1 or (shard_over_sp and degrees.sp > 1))


def test_the_error_of_a_wrong_product_lists_the_meshes_that_are_possible() -> None:
    with pytest.raises(ConfigError) as caught:
        MeshDegrees(dp_shard=2, sp=4).check_world(6)
    text = str(caught.value)
    assert text.startswith("6 ranks are not dp_replicate 1 x dp_shard 2 x sp 4 = 8. 6 ranks can be")
    assert "1 x 2 x 3" in text and text.endswith("Change the degrees, or start 8 ranks")
    with pytest.raises(ConfigError, match=r"can be \(dp_replicate x dp_shard x sp\): 1 x 1 x 1024, .* and 54 more"):
        MeshDegrees().check_world(1024)


def test_degrees_and_names_that_do_not_exist_are_refused() -> None:
    wrong: Any = 2.0
    with pytest.raises(ConfigError, match=r"sp is 2.0; the degree of a dimension is an integer of at least 1"):
        MeshDegrees(sp=wrong)
    with pytest.raises(ConfigError, match="dp_shard is 0"):
        MeshDegrees(dp_shard=0)
    name: Any = "tp"
    with pytest.raises(LayoutError, match=r"a mesh has the dimensions dp_replicate, .*; got 'tp'"):
        MeshDegrees().size(name)
    with pytest.raises(LayoutError, match="rank 4 is not in a mesh of 4 ranks, 0 to 3"):
        MeshDegrees(sp=4).coordinate(4, "sp")
    with pytest.raises(LayoutError, match=r"there is none. Call torch.distributed.init_process_group"):
        ParallelMesh(MeshDegrees())


def test_a_person_can_read_where_ranks_sit() -> None:
    assert MeshDegrees(2, 2, 2).describe().splitlines() == [
        "8 ranks: dp_replicate 2 x dp_shard 2 x sp 2",
        "sequences: ranks 0+1, 2+3, 4+5, 6+7 share one each",
        "weights: ranks 0+2, 1+3, 4+6, 5+7 hold 1/2 each",
    ]
    assert MeshDegrees(2, 1, 8, shard_over_sp=True).describe().splitlines()[1:] == [
        "sequences: ranks 0+1+...+7, 8+9+...+15 share one each",
        "weights: ranks 0+1+...+7, 8+9+...+15 hold 1/8 each",
    ]
    assert MeshDegrees(2).describe().splitlines()[1:] == [
        "sequences: each rank its own",
        "weights: every rank holds all of them",
    ]


def ranks_by_name(degrees: MeshDegrees) -> dict[str, tuple[list[int], int, int]]:
    mesh = ParallelMesh(degrees)
    found = {}
    for name in NAMES:
        sub_mesh = mesh[name]
        assert sub_mesh is mesh[name] and sub_mesh.mesh_dim_names == (name,)
        group = sub_mesh.get_group()
        found[name] = (dist.get_process_group_ranks(group), group.rank(), mesh.coordinate(name))
    return found


@pytest.mark.parametrize(
    "degrees", [MeshDegrees(1, 2, 2), MeshDegrees(2, 1, 2, shard_over_sp=True), MeshDegrees(1, 1, 4)]
)
def test_sub_meshes_are_the_groups_of_the_arithmetic(degrees: MeshDegrees) -> None:
    for rank, found in enumerate(run_on_ranks(4, ranks_by_name, degrees)):
        for name in NAMES:
            (group,) = (group for group in degrees.groups(name) if rank in group)
            assert found[name] == (list(group), group.index(rank), group.index(rank)), name


def test_a_mesh_of_another_world_is_refused_on_every_rank() -> None:
    for kind, text in run_on_ranks(2, raised, ParallelMesh, MeshDegrees(sp=4)):
        assert kind == "ConfigError" and "2 ranks are not dp_replicate 1 x dp_shard 1 x sp 4 = 4" in text


def timeouts() -> list[float]:
    world: Any = dist.group.WORLD
    before = timeout_of(world)
    distributed_c10d._set_pg_timeout(timedelta(seconds=77), world)
    try:
        mesh = ParallelMesh(MeshDegrees(1, 2, 1))
        names: tuple[Any, ...] = ("sp", "dp_shard")
        return [timeout_of(mesh[name].get_group()).total_seconds() for name in names]
    finally:
        distributed_c10d._set_pg_timeout(before, world)


def test_groups_of_a_mesh_wait_no_longer_than_the_default_one() -> None:
    assert run_on_ranks(2, timeouts, checked=False) == [[77.0, 77.0]] * 2
