"""docs/exchange.md: its blocks run as they stand, on ranks, with what the page takes for granted; its options are the classes'."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import longspan
from longspan.exchange import TOPOLOGIES, Auto
from longspan.plan import stated_cluster
from tests.ranks import run_on_ranks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
SEQ_LEN = 24


def blocks() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    # The page's cluster has more ranks than a test.
    return [
        block.replace("num_ranks=16", "num_ranks=2").replace("ranks_per_node=8", "ranks_per_node=2") for block in found
    ]


def run_blocks() -> None:
    layout = longspan.SequenceLayout(SEQ_LEN)
    q, k, v = (torch.randn(1, layout.num_local_tokens, 2, 4) for _ in range(3))
    names: dict[str, Any] = {
        "torch": torch,
        "longspan": longspan,
        "dataclasses": dataclasses,
        "group": dist.group.WORLD,
        "seq_len": SEQ_LEN,
        "layout": layout,
        "cluster": stated_cluster("cpu", layout.num_ranks, layout.num_ranks),
        "q": q,
        "k": k,
        "v": v,
        "g": -torch.rand(q.shape),
        "x": torch.randn(q.shape, requires_grad=True),
        "layer": lambda x, layout: longspan.linear_attention(x, x, x, layout=layout),
    }
    for block in blocks():
        exec(compile(block, "docs/exchange.md", "exec"), names)
    names["y"].sum().backward()
    assert names["o"].shape == q.shape and sorted(names["order"]) == [0, 1]
    assert names["links"].num_ranks == 2 and names["exchange"] == Auto(max_relative_error=0.05)


def test_the_blocks_run() -> None:
    assert len(blocks()) == 5
    run_on_ranks(2, run_blocks)


def test_every_option_is_one_of_the_classes_that_the_page_names() -> None:
    table = PAGE[PAGE.index("| option | of |") : PAGE.index("## Bytes")]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, flags=re.MULTILINE)
    every: list[Any] = [*TOPOLOGIES.values(), Auto]
    kinds = {kind.__name__: kind for kind in every}
    said = {name: set(re.findall(r"`(\w+)`", of)) if "all" not in of else set(kinds) for name, of in rows}
    known = {kind: {field.name for field in dataclasses.fields(kinds[kind])} for kind in kinds}
    assert set(said) == set().union(*known.values())
    for name, owners in said.items():
        assert owners <= {kind for kind in kinds if name in known[kind]}, name
    # Every topology has these two, and most of them refuse them.
    assert said["codec_inside"] == {kind.__name__ for kind in TOPOLOGIES.values() if kind.tells_links_apart}
    assert said["codec_of_hops"] == {kind.__name__ for kind in TOPOLOGIES.values() if kind.is_chain}
