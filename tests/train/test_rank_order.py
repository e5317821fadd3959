"""The order of ranks in a run: given, by links measured before the first step, kept in checkpoints; the same training in any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longspan.comm.groups import forget
from longspan.commands.train import parse_train
from longspan.errors import CheckpointError, ConfigError
from longspan.exchange.auto import order as measuring
from longspan.exchange.auto.calibration import known_links, take_links
from longspan.launch import EXIT_DONE, Place
from longspan.layout import SequenceLayout, group_of
from longspan.models.counts import on_meta
from longspan.parallel import MeshDegrees
from longspan.plan import LinkMatrix
from longspan.train.balance import Speed, measured_balance
from longspan.train.checkpoint import newest_checkpoint
from longspan.train.config import Config, from_mapping, read_toml, to_toml
from longspan.train.config_checks import check
from longspan.train.loading import SavedCheckpoint
from longspan.train.order import RankOrder, bytes_of_states, describe, order_of_checkpoint
from longspan.train.ranks import Ranks
from tests.ranks import run_on_ranks
from tests.train.checkpoints import load_checkpoint
from tests.train.tiny import metrics, tiny_config, train_here

CPU = torch.device("cpu")


def links_with(slow: tuple[int, int], num_ranks: int = 3) -> LinkMatrix:
    rows = [[1e6 if {one, other} == {*slow} else 1e8 for other in range(num_ranks)] for one in range(num_ranks)]
    return LinkMatrix(((1e-4,) * num_ranks,) * num_ranks, tuple(map(tuple, rows)))


def train_in_order(config: Config, resume: bool, slow: tuple[int, int] | None) -> tuple[int, set[tuple[int, ...]], Any]:
    """Train; the exit code, the orders that layouts had, and the group's links.

    slow: the two ranks whose link is measured as slow; None is nothing measured.
    """
    seen: set[tuple[int, ...]] = set()
    found: list[LinkMatrix | None] = []
    original = SequenceLayout.shard

    def shard(layout: SequenceLayout, *arguments: Any) -> torch.Tensor:
        if layout.num_ranks > 1:
            seen.add(layout.rank_order)
            found.append(known_links(layout, CPU))
        return original(layout, *arguments)

    def measure(layout: SequenceLayout, device: torch.device) -> LinkMatrix:
        if slow is None:
            raise AssertionError("measured")
        links = links_with(slow)
        take_links(layout, device, links)
        return links

    with mock.patch.object(SequenceLayout, "shard", shard), mock.patch.object(measuring, "measured_links", measure):
        code = train_here(config, resume)
    # The ranks of tests keep their group.
    forget(group_of(SequenceLayout(dist.get_world_size())), lambda key: key == ("links", "cpu"))
    return code, seen, found[-1]


def short(corpus: Path, run: Path, steps: int, **values: Any) -> Config:
    given = {"validation__every": 0, "sample__tokens": 0, "train__batch_tokens": 122, "train__steps": steps}
    return tiny_config(corpus, run, **given, parallel__sp=3, **values)


def order_kept(run: Path) -> Any:
    return load_checkpoint(newest_checkpoint(run / "checkpoints")).state["rank_order"]


def test_a_run_takes_the_order_of_its_links_and_goes_on_in_it(corpus: Path, tmp_path: Path) -> None:
    # Before its first step a run compares itself with one process, in the order that it trains in.
    given, measured = tmp_path / "given", tmp_path / "measured"
    found = run_on_ranks(3, train_in_order, short(corpus, given, 2, parallel__rank_order=[0, 2, 1]), False, None)
    assert [code for code, _, _ in found] == [EXIT_DONE] * 3
    assert all(seen == {(0, 2, 1)} and links is None for _, seen, links in found)
    assert order_kept(given) is None
    assert json.loads((given / "summary.json").read_text())["rank_order"] == {"groups": [[0, 2, 1]], "links": []}

    config = short(corpus, measured, 2, parallel__rank_order="measured")
    found = run_on_ranks(3, train_in_order, config, False, (0, 1))
    assert all(seen == {(0, 2, 1)} and links == links_with((0, 1)) for _, seen, links in found)
    assert order_kept(measured) == {"groups": [[0, 2, 1]], "links": [links_with((0, 1)).as_json()]}
    for ours, theirs in zip(metrics(measured, "loss"), metrics(given, "loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    # It goes on in what was measured, and knows the links by which an exchange is chosen, unless it is told to measure again.
    config = short(corpus, measured, 3, parallel__rank_order="measured")
    found = run_on_ranks(3, train_in_order, config, True, None)
    assert all(seen == {(0, 2, 1)} and links == links_with((0, 1)) for _, seen, links in found)
    config = short(corpus, measured, 4, parallel__rank_order="remeasured")
    found = run_on_ranks(3, train_in_order, config, True, (1, 2))
    assert all(seen == {(1, 0, 2)} for _, seen, _ in found)
    assert order_kept(measured)["groups"] == [[1, 0, 2]]


def shares(orders: list[tuple[int, ...] | None] | None) -> tuple[float, ...]:
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), CPU)
    ranks.arrange(MeshDegrees(sp=2))
    config = from_mapping(
        {
            "model": {"dim": 16, "hidden_dim": 24},
            "train": {"seq_len": 4096},
            "data": {"documents": "concatenate"},
            "parallel": {"order": "contiguous"},
        }
    )
    with mock.patch("longspan.train.balance.measured_speed", lambda *_: Speed(1e9, 1e9)):
        (weights,) = measured_balance(config, 300, ranks, None, orders).groups
    assert weights is not None
    return weights


def test_who_holds_the_end_of_a_sequence_has_most_to_attend_to_and_holds_less() -> None:
    (first, second), *_ = run_on_ranks(2, shares, None)
    assert first > second
    assert run_on_ranks(2, shares, [(1, 0)]) == [(second, first)] * 2


def test_an_order_is_an_option(tmp_path: Path) -> None:
    for given, kept in ((["measured"], ("measured",)), (["2", "0", "1"], (2, 0, 1))):
        config = parse_train(["--parallel.sp", "3", "--parallel.rank_order", *given])[0]
        assert config.parallel.rank_order == kept
        (tmp_path / "c.toml").write_text(to_toml(config))
        assert read_toml(tmp_path / "c.toml").parallel == config.parallel
    (tmp_path / "c.toml").write_text("[parallel]\nsp = 2\nrank_order = [1, 0]\n")
    assert read_toml(tmp_path / "c.toml").parallel.given_rank_order == (1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rank_order": [0, 0]},
            r"parallel.rank_order: rank_order must hold each of the ranks 0 to 1 once.* got \(0, 0\)",
        ),
        ({"rank_order": [0, 1, 2]}, r"parallel.rank_order: rank_order must hold each of the ranks 0 to 1 once"),
        (
            {"rank_order": "fast"},
            r"parallel.rank_order has 'fast'; it must be one of 'given', 'measured', 'remeasured', or a list of whole numbers",
        ),
        ({"rank_order": [0, 1.0]}, r"parallel.rank_order has 1.0; it must be one of"),
        ({"rank_order": [True, 0]}, r"parallel.rank_order has True"),
        (
            {"rank_order": ["given", 1]},
            r"parallel.rank_order is \['given', 1\]; it must be 'given', 'measured', 'remeasured', or",
        ),
        ({"rank_order": []}, r"parallel.rank_order is \[\]; it must be"),
    ],
)
def test_an_order_that_is_none_is_refused_before_any_rank_starts(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(from_mapping({"parallel": values}))


def test_what_is_measured_is_not_deterministic() -> None:
    with pytest.raises(
        ConfigError, match=r"train.deterministic is True and parallel.rank_order 'measured'.*as numbers"
    ):
        check(from_mapping({"parallel": {"rank_order": "measured"}, "train": {"deterministic": True}}))
    check(from_mapping({"parallel": {"rank_order": [1, 0]}, "train": {"deterministic": True}}))


def test_an_order_of_other_ranks_is_not_taken_and_one_of_another_form_refused() -> None:
    ranks = Ranks(Place(0, 3), CPU)
    layout = SequenceLayout.local(8)
    for groups in ([[0, 1]], [[0, 1, 2], [0, 1, 2]], [[0, 1, 1]], [None]):
        record = {"groups": groups, "links": [links_with((0, 1)).as_json()]}
        assert order_of_checkpoint(SavedCheckpoint(Path(), 3, {"rank_order": record}, {}, {}), layout, ranks) is None
    assert order_of_checkpoint(SavedCheckpoint(Path(), 3, {}, {}, {}), layout, ranks) is None
    for wrong in (3, {}, {"groups": [["x", 1]], "links": []}, {"groups": [[0, 1, 2]], "links": [3]}):
        with pytest.raises(CheckpointError, match="step 3 has no order of ranks that this version knows"):
            order_of_checkpoint(SavedCheckpoint(Path(), 3, {"rank_order": wrong}, {}, {}), layout, ranks)


def test_a_report_says_who_holds_what_and_why() -> None:
    ranks = Ranks(Place(0, 3), CPU)
    measured = RankOrder(((0, 2, 1),), (links_with((0, 1)),))
    assert describe(measured, ranks, False) == (
        "ranks 0 2 1; by links of 1.0 MB/s and more, measured now, and kept in the checkpoints"
    )
    assert "measured before" in describe(measured, ranks, True)
    assert describe(RankOrder(((2, 0, 1),)), ranks, False) == "ranks 2 0 1; as parallel.rank_order says"
    of_two = describe(RankOrder((None,)), Ranks(Place(0, 2), CPU), False)
    assert of_two == "ranks as numbered: nothing was measured, as of 2 ranks either order is as fast"


def test_links_that_differ_by_what_measuring_does_leave_the_order_as_it_is() -> None:
    nearly = LinkMatrix(((1e-4,) * 3,) * 3, ((1e8, 0.97e8, 1e8), (0.97e8, 1e8, 1e8), (1e8, 1e8, 1e8)))
    assert measuring.order_by(nearly, 1, 1e6) == (0, 1, 2)
    assert measuring.order_by(links_with((0, 1)), 1, 1e6) == (0, 2, 1)
    # One node of all ranks is none.
    assert measuring.order_by(links_with((0, 1)), 3, 1e6) == (0, 2, 1)


def test_states_are_as_large_as_those_of_the_largest_layer() -> None:
    model = from_mapping({"model": {"dim": 16, "num_heads": 2, "pattern": "LN"}}).model.build(300)
    # Two heads of 8 x 8 numbers.
    assert bytes_of_states(on_meta(model)) == 4 * 2 * 8 * 8
    softmax = from_mapping({"model": {"dim": 16, "num_heads": 2, "pattern": "N"}}).model.build(300)
    assert bytes_of_states(on_meta(softmax)) == measuring.STATE_BYTES
