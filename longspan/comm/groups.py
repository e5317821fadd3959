"""What is made once per process group and kept as long as the group: groups and threads beside it, host names, measurements."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha1
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from longspan.modes import built_for_every_mode

T = TypeVar("T")
_log = logging.getLogger("longspan")

# Process groups are registered for a whole process, by torch too, and their objects take no attributes. An entry goes with
# its group, so that nothing of a destroyed group is found by a later one.
_kept: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def kept(group: dist.ProcessGroup, key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returns, built once for this group and `key`, as in training (`built_for_every_mode`).

    It must not hold on to `group` itself.
    """
    entries = _kept.setdefault(group, {})
    if key not in entries:
        entries[key] = built_for_every_mode(build)
    value: T = entries[key]
    return value


def peek(group: dist.ProcessGroup, key: Hashable) -> Any:
    """What `kept` has for this group and `key`; None where it has nothing."""
    return _kept.get(group, {}).get(key)


def keep(group: dist.ProcessGroup, key: Hashable, value: object) -> None:
    """Make `value` what `kept` has for this group and `key`."""
    _kept.setdefault(group, {})[key] = value


def forget(group: dist.ProcessGroup, which: Callable[[Any], bool]) -> list[Any]:
    """Drop what is kept under keys that `which` picks, and return it."""
    entries = _kept.setdefault(group, {})
    return [entries.pop(key) for key in list(entries) if which(key)]


def group_of_ranks(ranks: Sequence[int]) -> dist.ProcessGroup:
    """The process group of some ranks of the default group, this one among them; made once, and all of them make it.

    Its name says whose it is, and is the same when the default group is left and joined anew: torch keeps what it knows of meshes
    by their ranks, and looks for their groups by name.
    """
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == world.size():
        return world
    name = f"longspan ranks {list(ranks)}"
    return kept(world, ("group of ranks", tuple(ranks)), lambda: new_group_beside(world, ranks, name, name=name))


def new_group_beside(
    group: dist.ProcessGroup,
    members: Sequence[int] | None = None,
    description: str | None = None,
    *,
    name: str | None = None,
) -> dist.ProcessGroup:
    """A process group of its own with `members` of `group`, and its backend and timeout.

    Args:
        group: the group that it stands beside.
        members: ranks in `group`, this rank among them; None is all of them. Their order is their order in the new group.
        description: for torch's own messages.
        name: under which the members look for each other; None is a new one at each call.

    Every member calls this, and no other rank; in the same order where several groups have the same members.
    """
    ranks = dist.get_process_group_ranks(group)
    if members is not None:
        ranks = [ranks[member] for member in members]
    number = next(kept(group, ("made beside", tuple(ranks)), count))
    epoch = kept(group, "epochs", lambda: [0])[0]
    _log.info("rank %d makes a process group beside %s: %s", group.rank(), group.group_name, description or "longspan")
    # Only torch releases with this option have groups whose ranks do not ascend.
    order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    with _naming_groups(name or f"longspan {epoch}.{number} of {ranks} beside {group.group_name}"):
        made = dist.new_group(
            ranks,
            timeout=_timeout(group),
            backend=dist.get_backend_config(group),
            use_local_synchronization=True,
            group_desc=description,
            **order,
        )
    assert isinstance(made, dist.ProcessGroup)
    return made


@contextmanager
def _naming_groups(text: str) -> Iterator[None]:
    """Let torch name groups that it makes with local synchronization after `text`, which the members have in common.

    By itself (2.13) it takes the number of groups that the process is in, which may differ between members. A name is where members
    look for each other: they would wait for ever.
    """
    original = getattr(distributed_c10d, "_hash_ranks_to_str", None)
    if original is None:
        yield
        return
    name = sha1(text.encode(), usedforsecurity=False).hexdigest()
    distributed_c10d._hash_ranks_to_str = lambda ranks: name
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str = original


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """The group's own timeout, torch's default where its backend does not tell."""
    return _timeout(group) or distributed_c10d.default_pg_timeout


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The group's own timeout where its backend tells; None is torch's default for the backend."""
    options = getattr(group._get_backend(_device_of(group)), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None


def _device_of(group: dist.ProcessGroup) -> torch.device:
    devices = group._device_types
    return torch.device("cpu") if torch.device("cpu") in devices else devices[0]
