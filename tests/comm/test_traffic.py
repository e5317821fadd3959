"""Recorders of traffic nest, and each is told apart."""

from __future__ import annotations

from longspan.comm.traffic import Traffic, note_collective, record_traffic, waiting


def test_recorders_nest_and_count_messages_and_waiting() -> None:
    with record_traffic() as outer:
        note_collective("all_gather", "forward", 12, 3)
        with record_traffic() as inner:
            note_collective("ring", "backward", 5)
        # Both have seen the same waiting, and the inner one is no longer told.
        with waiting():
            pass
    note_collective("ring", "backward", 7)
    assert (outer.num_collectives, outer.num_messages, outer.bytes_sent) == (2, 4, 17)
    assert (inner.num_collectives, inner.num_messages, inner.bytes_sent) == (1, 1, 5)
    assert (outer.count("forward"), outer.of_phase("backward").bytes_sent) == (1, 5)
    assert outer.wait_seconds > 0 and inner.wait_seconds == 0


def test_two_recorders_that_saw_the_same_are_told_apart() -> None:
    with record_traffic() as outer:
        with record_traffic():
            pass
        note_collective("ring", "forward", 5)
    assert outer.bytes_sent == 5


def test_time_under_way_counts_once_where_exchanges_overlap() -> None:
    traffic = Traffic(flights=[(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (0.6, 0.7)])
    assert traffic.exchange_seconds == 3.0
    assert Traffic().exchange_seconds == 0.0
    with record_traffic() as recorded, waiting():
        pass
    assert recorded.exchange_seconds == recorded.wait_seconds
