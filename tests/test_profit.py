"""The search for the batch that makes an item fastest."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from dfdask.profit import PROFIT, BatchSearch


def search(most: int, item_seconds: dict[int, float], calls: int = 40) -> tuple[BatchSearch, list[int]]:
    found, tried = BatchSearch(), []
    for _ in range(calls):
        size = found.next_items(most)
        found.observe(size, size * item_seconds[size])
        tried.append(size)
    return found, tried


@given(st.integers(1, 64), st.lists(st.floats(0.1, 10), min_size=65, max_size=65))
def test_it_ends_where_half_gains_nothing(most: int, costs: list[float]) -> None:
    found, tried = search(most, dict(enumerate(costs)))
    size = found.next_items(most)
    assert 1 <= size <= most and tried[-1] == size
    assert costs[size] <= costs[most]
    assert size == 1 or costs[(size + 1) // 2] > costs[size] * (1 - PROFIT)


def test_each_size_is_tried_twice_and_no_more_than_it_must_be() -> None:
    _, tried = search(8, {8: 1.0, 4: 0.9, 2: 0.95, 1: 0.1})
    assert tried[:6] == [8, 8, 4, 4, 2, 2] and set(tried[6:]) == {4}


def test_the_first_call_of_a_size_does_not_count_nor_one_without_a_clock() -> None:
    found = BatchSearch()
    found.observe(4, 100.0)
    found.observe(4, 0.0)
    assert found.next_items(4) == 4, "not yet measured"
    found.observe(4, 1.0)
    assert found.next_items(4) == 2


def test_a_lower_limit_begins_a_search_of_its_own() -> None:
    found, _ = search(8, {8: 1.0, 4: 0.9, 2: 1.0})
    assert found.next_items(3) == 3
    assert found.next_items(8) == 4
