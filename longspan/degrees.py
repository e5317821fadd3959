"""The sizes of a mesh of ranks, and which rank stands where: arithmetic, without a process group.

    world = dp_replicate × dp_shard × sp            rank = (replicate · dp_shard + shard) · sp + place

Neighbouring ranks share a sequence: they exchange in every layer, and neighbours have the fastest links. Ranks that
differ in `dp_replicate` or `dp_shard` compute other sequences. Those along `dp_shard` hold shares of the weights, and with
`shard_over_sp` those along `sp`, too: ranks that share a sequence have the same weights otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from longspan.errors import ConfigError, LayoutError

DimensionName = Literal["dp_replicate", "dp_shard", "sp", "data", "shard", "replicate", "world"]
"""A dimension of the mesh, or several of them as one: see `MeshDegrees.dimensions`."""

_DIMENSIONS = ("dp_replicate", "dp_shard", "sp")
_MOST_LISTED = 12


@dataclass(frozen=True)
class MeshDegrees:
    """The sizes of a mesh: arithmetic of ranks, without a process group; checked when it is made.

    dp_replicate: copies of the weights, each trained on other sequences. dp_shard: ranks over which a copy is divided, which
    compute other sequences, too. sp: ranks that share a sequence. shard_over_sp: whether a copy is divided over these as well.

    Raises:
        ConfigError: for a degree that is no positive integer.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    shard_over_sp: bool = False

    def __post_init__(self) -> None:
        for name in _DIMENSIONS:
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; the degree of a dimension is an integer of at least 1")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.sp

    @property
    def data(self) -> int:
        """Number of groups of ranks that compute different sequences at a time."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds a share of the weights, and FSDP2 gathers them."""
        return self.size("shard") > 1

    def dimensions(self, name: DimensionName) -> tuple[str, ...]:
        """The dimensions that a name stands for.

        ``"dp_replicate"``, ``"dp_shard"`` and ``"sp"`` are themselves. ``"data"`` is both of the first: ranks along it compute
        different sequences. ``"shard"`` is what the weights are divided over, and ``"replicate"`` the others: ranks along it hold
        the same weights, over which gradients are summed. ``"world"`` is all three.

        Raises:
            LayoutError: for another name.
        """
        shard = ("dp_shard", "sp") if self.shard_over_sp else ("dp_shard",)
        named: dict[str, tuple[str, ...]] = {
            **{dimension: (dimension,) for dimension in _DIMENSIONS},
            "data": ("dp_replicate", "dp_shard"),
            "shard": shard,
            "replicate": tuple(dimension for dimension in _DIMENSIONS if dimension not in shard),
            "world": _DIMENSIONS,
        }
        if name not in named:
            raise LayoutError(f"a mesh has the dimensions {', '.join(named)}; got {name!r}")
        return named[name]

    def size(self, name: DimensionName) -> int:
        """Number of ranks along a dimension."""
        size = 1
        for dimension in self.dimensions(name):
            size *= getattr(self, dimension)
        return size

    def coordinate(self, rank: int, name: DimensionName) -> int:
        """Where a rank stands along a dimension, from 0.

        Raises:
            LayoutError: for a rank that is not in the mesh.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is not in a mesh of {self.world_size} ranks, 0 to {self.world_size - 1}")
        place, along = rank, {}
        for dimension in reversed(_DIMENSIONS):
            place, along[dimension] = divmod(place, getattr(self, dimension))
        coordinate = 0
        for dimension in self.dimensions(name):
            coordinate = coordinate * getattr(self, dimension) + along[dimension]
        return coordinate

    def groups(self, name: DimensionName) -> list[tuple[int, ...]]:
        """The ranks along a dimension, for each place in the others: every rank stands in one of these groups."""
        names = self.dimensions(name)
        found: dict[tuple[int, ...], list[int]] = {}
        others = [dimension for dimension in _DIMENSIONS if dimension not in names]
        for rank, coordinates in enumerate(product(*(range(getattr(self, d)) for d in _DIMENSIONS))):
            along = dict(zip(_DIMENSIONS, coordinates, strict=True))
            found.setdefault(tuple(along[dimension] for dimension in others), []).append(rank)
        return [tuple(group) for group in found.values()]

    def check_world(self, world_size: int, prefix: str = "") -> None:
        """Raise ConfigError, with the degrees that are possible, unless the mesh has `world_size` ranks.

        prefix: of the degrees' names in the message.
        """
        if self.world_size == world_size:
            return
        asked = " x ".join(f"{prefix}{name} {getattr(self, name)}" for name in _DIMENSIONS)
        degrees = factorings(world_size)
        # First those that are nearest to what was asked for.
        degrees.sort(key=lambda other: -sum(getattr(other, name) == getattr(self, name) for name in _DIMENSIONS))
        listed = ", ".join(f"{other.dp_replicate} x {other.dp_shard} x {other.sp}" for other in degrees[:_MOST_LISTED])
        more = f" and {len(degrees) - _MOST_LISTED} more" if len(degrees) > _MOST_LISTED else ""
        raise ConfigError(
            f"{world_size} ranks are not {asked} = {self.world_size}. {world_size} ranks can be (dp_replicate x dp_shard x sp): "
            f"{listed}{more}. Change the degrees, or start {self.world_size} ranks"
        )

    def summary(self) -> str:
        """The degrees, such as ``"data 2 x sequence 4 (weights in 2 shares)"``."""
        sharded = f" (weights in {self.size('shard')} shares)" if self.shards_weights else ""
        return f"data {self.data} x sequence {self.sp}{sharded}"

    def describe(self) -> str:
        """Which rank sits where, in a few lines for a person."""
        lines = [
            f"{self.world_size} ranks: dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x sp {self.sp}",
            f"sequences: {self._described('sp', 'share one each', 'each rank its own')}",
        ]
        if self.shards_weights:
            lines.append("weights: " + self._described("shard", f"hold 1/{self.size('shard')} each", ""))
        else:
            lines.append("weights: every rank holds all of them")
        return "\n".join(lines)

    def _described(self, name: DimensionName, together: str, alone: str) -> str:
        groups = self.groups(name)
        if len(groups[0]) == 1:
            return alone
        shown = [_ranks(group) for group in groups[:4]]
        return f"ranks {', '.join(shown)}{', ...' if len(groups) > 4 else ''} {together}"


def _ranks(group: tuple[int, ...]) -> str:
    """The ranks of a group, shortened where they are many and evenly spaced, as they are in a mesh."""
    if len(group) <= 4:
        return "+".join(map(str, group))
    return f"{group[0]}+{group[1]}+...+{group[-1]}"


def factorings(world_size: int) -> list[MeshDegrees]:
    """Every mesh of `world_size` ranks, those with the most ranks to a sequence first."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [
        MeshDegrees(world_size // sp // shard, shard, sp)
        for sp in reversed(divisors)
        for shard in divisors
        if (world_size // sp) % shard == 0
    ]
