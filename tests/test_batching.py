"""Shards cover the rows once; micro-batches cover a shard once and mix nothing that cannot share a call."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask.batching import (
    MAX_SHARD_BYTES,
    MAX_SHARD_ITEMS,
    default_shard_items,
    even_batch,
    is_batchable,
    micro_batches,
    shard_count,
    shard_range,
)
from dfdask.items import Item

arguments = st.fixed_dictionaries(
    {},
    optional={
        "guidance_scale": st.sampled_from([3, 3.0, 4.5]),
        "height": st.sampled_from([64, 128]),
        "negative_prompt": st.sampled_from(["", "blurry", "dark"]),
        "flag": st.sampled_from([True, 1]),
    },
)


def make(index: int, given_arguments: dict[str, Any]) -> Item:
    return Item(index, f"{index:06d}", "a", 0, given_arguments)


@given(st.integers(0, 5000), st.integers(1, 700))
def test_shards_cover_every_row_once(items: int, shard_items: int) -> None:
    shards = [shard_range(s, shard_items, items) for s in range(shard_count(items, shard_items))]
    assert [row for rows in shards for row in rows] == list(range(items))
    assert all(0 < len(rows) <= shard_items for rows in shards)


@given(st.integers(0, 10**7), st.integers(1, 1000), st.integers(0, 10**9))
def test_default_shards(items: int, batch: int, bytes_per_item: int) -> None:
    chosen = default_shard_items(items, batch, bytes_per_item)
    assert chosen % batch == 0 and chosen >= batch
    if chosen > batch:
        assert chosen <= MAX_SHARD_ITEMS and chosen * bytes_per_item <= MAX_SHARD_BYTES
        assert shard_count(items, chosen - batch) > 16  # no larger than early commits allow


@pytest.mark.parametrize(
    ("items", "batch", "bytes_per_item", "expected"),
    [
        (24, 4, 64 * 64 * 3, 4),
        (1632, 16, 64 * 64 * 3, 112),
        (10**6, 8, 1024 * 1024 * 3, 16),
        (10**6, 8, 64 * 64 * 3, 512),
        (3, 8, 100, 8),
    ],
)
def test_default_shard_examples(items: int, batch: int, bytes_per_item: int, expected: int) -> None:
    assert default_shard_items(items, batch, bytes_per_item) == expected


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 64))
def test_even_batches_take_as_few_rounds_and_leave_nobody_without(items: int, workers: int, most: int) -> None:
    batch = even_batch(items, workers, most)
    assert 1 <= batch <= most
    batches = -(-items // batch)
    assert -(-batches // workers) == -(-items // (most * workers)), "as many rounds as the largest batches take"
    assert batch == 1 or -(-items // (batch - 1)) > workers * (-(-batches // workers)), "and no larger than that needs"


@pytest.mark.parametrize(
    ("items", "workers", "batch"), [(6, 2, 3), (24, 2, 6), (32, 2, 8), (3, 8, 1), (0, 4, 1), (100_000, 8, 8)]
)
def test_even_batches(items: int, workers: int, batch: int) -> None:
    assert even_batch(items, workers, most=8) == batch


@given(st.lists(arguments, max_size=30), st.integers(1, 9), st.integers(0, 1000))
def test_micro_batches(arguments_of: list[dict[str, Any]], batch: int, first: int) -> None:
    items = [make(first + n, a) for n, a in enumerate(arguments_of)]
    by_row = {item.index: item for item in items}
    calls = micro_batches(7, items, batch)
    assert calls == micro_batches(7, [make(i.index, dict(i.arguments)) for i in items], batch)
    assert sorted(row for call in calls for row in call.items) == list(by_row)
    assert [call.index for call in calls] == list(range(len(calls)))
    assert [call.items[0] for call in calls] == sorted(call.items[0] for call in calls)
    for call in calls:
        assert call.shard == 7 and 1 <= len(call.items) <= batch
        assert list(call.items) == sorted(call.items)
        together = [by_row[row].arguments for row in call.items]
        assert len({frozenset(a) for a in together}) == 1
        for name in together[0]:
            values = {(type(a[name]) is bool, a[name]) for a in together}
            assert len(values) == 1 or all(is_batchable(name, a[name]) for a in together)


def test_one_kind_of_item_fills_its_batches() -> None:
    items = [make(n, {"negative_prompt": str(n)}) for n in range(10)]
    assert [call.items for call in micro_batches(0, items, 4)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]


def test_only_texts_of_prompts_travel_as_lists() -> None:
    assert is_batchable("negative_prompt", "x") and is_batchable("prompt_2", "x")
    assert not is_batchable("negative_prompt", None) and not is_batchable("guidance_scale", "x")


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="shard 3 is not one of the 3"):
        shard_range(3, 4, 12)
    with pytest.raises(ValueError, match="batch"):
        micro_batches(0, [], 0)
    with pytest.raises(ValueError, match="shard_items"):
        shard_count(3, 0)
    with pytest.raises(ValueError, match="batch"):
        default_shard_items(1, 0, 1)
