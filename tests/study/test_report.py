"""A study's report says what its runs have come to, and where it orders mixers as LASP-2 does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.study.grid import ALL, REFERENCE, Cell, Grid, Group
from longspan.study.paper import TABLES, agreements
from longspan.study.report import write_report
from longspan.study.results import Spread, rows_of, spread
from longspan.study.size import SIZES
from tests.study.fake import write_summary

GRID = Grid(mixers=("linear_attention", "gla", REFERENCE), ratios=("pure", "1/4"), seeds=(0, 1))
LOSSES = {
    ("linear_attention", "pure"): 4.5,
    ("gla", "pure"): 4.2,
    ("linear_attention", "1/4"): 4.3,
    ("gla", "1/4"): 4.1,
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Text is done; of recall one seed of one group."""
    for (mixer, ratio), loss in LOSSES.items():
        for seed in GRID.seeds:
            cell = Cell(Group("text", mixer, ratio), seed)
            write_summary(tmp_path, cell, validation_loss=loss + 0.02 * seed, validation_bits_per_byte=1.5)
    for seed in GRID.seeds:
        write_summary(tmp_path, Cell(Group("text", REFERENCE, ALL), seed), validation_loss=4.15)
    write_summary(tmp_path, Cell(Group("recall", "gla", "1/4"), 0), validation_loss=1.0, validation_accuracy=0.625)
    return tmp_path


def test_means_and_deviations_are_those_of_the_seeds() -> None:
    assert spread([1.0, None, 4.0]) == Spread(2.5, math.sqrt(4.5), 2)
    assert spread([3.0]) == Spread(3.0, None, 1)
    assert spread([None]) is None
    assert str(Spread(2.5, 0.25, 3)) == "2.500 ± 0.250" and str(Spread(2.5, None, 1)) == "2.500"
    assert Spread(1.0, 0.2, 3).differs_from(Spread(1.5, 0.2, 3))
    assert not Spread(1.0, 0.3, 3).differs_from(Spread(1.5, 0.2, 3))
    assert not Spread(1.0, None, 1).differs_from(Spread(9.0, 0.1, 3))


def test_a_row_is_of_the_runs_that_are_done(study: Path) -> None:
    rows = {(row.group.task, row.group.mixer, row.group.ratio): row for row in rows_of(study, GRID)}
    assert len(rows) == len(GRID.groups)
    pure = rows["text", "gla", "pure"]
    assert pure.num_done == 2 and pure.loss is not None
    assert (pure.loss.mean, pure.loss.deviation) == pytest.approx((4.21, 0.02 / math.sqrt(2)))
    assert pure.accuracy is None and pure.bits_per_byte == Spread(1.5, 0.0, 2)
    assert rows["recall", "gla", "1/4"].accuracy == Spread(0.625, None, 1)
    assert rows["recall", "gla", "pure"].num_done == 0 and rows["recall", "gla", "pure"].loss is None


def test_the_report_has_a_table_of_each_task_and_says_what_is_missing(study: Path) -> None:
    markdown, numbers, figure = write_report(study, GRID, SIZES["short"])
    text = markdown.read_text()
    assert "11 of 20 trainings are done" in text and "Not all is done" in text
    assert "| gla | 4.210 ± 0.014 | 4.110 ± 0.014 |  |" in text
    assert "| softmax |  |  | 4.150 ± 0.000 |" in text
    assert "| gla | 0.625 |" in text and "| recall" not in text
    assert "- mixers, pure: 1 of 1 pairs in the same order" in text
    record = json.loads(numbers.read_text())
    assert record["size"]["dim"] == SIZES["short"].dim
    assert len(record["rows"]) == len(GRID.groups)
    assert record["lasp2"]["Table 4"]["gla, 1/8"] == 2.751
    assert figure.read_text().count("<svg") == 1


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    markdown, _, _ = write_report(tmp_path, GRID, SIZES["short"])
    assert "0 of 20 trainings are done" in markdown.read_text()


def test_a_summary_that_cannot_be_read_is_named(study: Path) -> None:
    path = study / "cells" / "text-gla-1-4-seed1" / "summary.json"
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"text-gla-1-4-seed1/summary.json cannot be read: .*\. Remove .*seed1,"):
            rows_of(study, GRID)


def test_pairs_in_the_order_of_the_paper_are_counted() -> None:
    paper = {place: Spread(loss, 0.001, 3) for table in TABLES.values() for place, loss in table.items()}
    for name, found in agreements(paper).items():
        # Where the tables differ, the later one stands.
        assert name == "Table 2" or all(agreement.num_alike == agreement.num_pairs for agreement in found)
    turned = {place: Spread(-loss.mean, 0.001, 3) for place, loss in paper.items()}
    assert all(agreement.num_alike == 0 for agreement in agreements(turned)["Table 4"])
    by_name = {agreement.what: agreement for agreement in agreements(paper)["Table 4"]}
    assert by_name["mixers, pure"].num_pairs == 6
    # Four shares of four mixers, of which none are equal.
    assert by_name["shares of softmax layers"].num_pairs == 24
    assert agreements({}) == {"Table 2": [], "Table 4": []}


def test_pairs_that_the_paper_has_equal_are_left_out_and_close_ones_are_unclear() -> None:
    equal = {("gla", "pure"): Spread(1.0, 0.1, 3), ("rebased", "pure"): Spread(2.0, 0.1, 3)}
    assert agreements(equal)["Table 2"] == []
    close = {("gla", "pure"): Spread(1.1, 0.1, 3), ("lightning", "pure"): Spread(1.0, 0.1, 3)}
    (found,) = agreements(close)["Table 2"]
    assert (found.num_pairs, found.num_alike, found.num_unclear) == (1, 0, 1)
    assert str(found) == "mixers, pure: 0 of 1 pairs in the same order; of the 1 in the other 1 not clearly so"
