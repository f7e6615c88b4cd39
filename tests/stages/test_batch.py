"""A micro-batch on its way: one bad item costs one item, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutput

from dfdask.errors import ModelError
from dfdask.items import Item
from dfdask.stages.batch import MAX_ERROR_CHARACTERS, Batch, Rows, describe, map_entries, nbytes, run_batch


def make_items(count: int, first: int = 0) -> list[Item]:
    return [Item(row, f"item-{row}", f"prompt {row}", row, {}) for row in range(first, first + count)]


@dataclass
class Doubling:
    """Doubles what each item has; the items in ``bad`` cannot be done. ``calls`` are the rows of each call."""

    bad: frozenset[int] = frozenset()
    error: type[BaseException] = ValueError
    calls: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, items: Sequence[Item], state: Any) -> Any:
        rows = tuple(item.index for item in items)
        self.calls.append(rows)
        if state is None:
            state = {"value": Rows(np.array(rows)), "shared": [torch.arange(len(rows)), "text", 5, None]}
        assert state["value"].value.tolist() == [row * 2 ** (len(state["shared"]) - 4) for row in rows]
        wrong = self.bad.intersection(rows)
        if wrong:
            raise self.error(f"cannot do {sorted(wrong)}")
        return {"value": Rows(state["value"].value * 2), "shared": [*state["shared"], None]}


def rows(batch: Batch) -> list[int]:
    return [item.index for group in batch.groups for item in group.items]


@given(st.integers(1, 17), st.sets(st.integers(0, 16)), st.sets(st.integers(0, 16)), st.integers(0, 99))
def test_an_item_that_raises_costs_one_item(count: int, early: set[int], late: set[int], first: int) -> None:
    items = make_items(count, first)
    early, late = ({row + first for row in bad if row < count} for bad in (early, late))
    batch = run_batch("encode", Doubling(frozenset(early)), Batch.start(items))
    batch = run_batch("denoise", Doubling(frozenset(late)), batch)
    assert rows(batch) == [row for row in range(first, first + count) if row not in early | late]
    assert batch.failures == {
        **{row: f"encode: ValueError: cannot do [{row}]" for row in early},
        **{row: f"denoise: ValueError: cannot do [{row}]" for row in late - early},
    }
    for group in batch.groups:
        assert group.state["value"].value.tolist() == [item.index * 4 for item in group.items]
    assert set(batch.seconds) == {"encode", "denoise"} and all(spent >= 0 for spent in batch.seconds.values())


def test_the_good_ones_stay_together() -> None:
    stage = Doubling(frozenset({5}))
    batch = run_batch("encode", stage, Batch.start(make_items(8)))
    assert stage.calls == [tuple(range(8)), (0, 1, 2, 3), (4, 5, 6, 7), (4, 5), (4,), (5,), (6, 7)]
    later = Doubling()
    run_batch("denoise", later, batch)
    assert later.calls == [(0, 1, 2, 3), (4,), (6, 7)]


def test_an_item_that_failed_is_not_run_again() -> None:
    batch = run_batch("encode", Doubling(frozenset({0, 1, 2})), Batch.start(make_items(3)))
    assert batch.groups == ()
    later = Doubling()
    done = run_batch("denoise", later, batch)
    assert later.calls == [] and len(done.failures) == 3


def test_a_state_that_cannot_be_divided_costs_the_whole_call() -> None:
    class Mixing:
        def run(self, items: Sequence[Item], state: Any) -> Any:
            if state is None:
                return torch.zeros(3)  # of all three together
            raise ValueError("no")

    batch = run_batch("encode", Mixing(), Batch.start(make_items(3)))
    batch = run_batch("denoise", Mixing(), batch)
    assert batch.groups == () and set(batch.failures) == {0, 1, 2}


class Pair(NamedTuple):
    one: Any
    two: Any


def test_a_state_is_divided_and_keeps_its_kind() -> None:
    class Passing:
        def run(self, items: Sequence[Item], state: Any) -> Any:
            if state is None:
                output = BaseModelOutput(last_hidden_state=Rows(torch.arange(4)))
                return Pair([Rows(["a", "b", "c", "d"])], (output, torch.arange(4), torch.Size([4, 2])))
            if len(items) > 1:
                raise ValueError("one by one")
            return state

    batch = run_batch("encode", Passing(), Batch.start(make_items(4)))
    batch = run_batch("denoise", Passing(), batch)
    assert not batch.failures
    for row, group in enumerate(batch.groups):
        assert isinstance(group.state, Pair)
        assert group.state.one == [Rows(["abcd"[row]])]
        output, shared, shape = group.state.two
        assert output.last_hidden_state.value.tolist() == [row]
        assert shared.tolist() == [0, 1, 2, 3] and shape == torch.Size([4, 2])


def test_entries_are_mapped_one_level_deep() -> None:
    assert map_entries(str, {"a": 1, "b": [2]}) == {"a": "1", "b": "[2]"}
    assert map_entries(str, (1, 2)) == ("1", "2") and map_entries(str, Pair(1, 2)) == Pair("1", "2")
    assert map_entries(str, Rows([1])) == Rows("[1]")


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    "error", [MemoryError, OutOfMemoryError, torch.OutOfMemoryError, ModelError, KeyboardInterrupt, SystemExit]
)
def test_what_concerns_the_worker_is_no_items_fault(error: type[BaseException]) -> None:
    stage = Doubling(frozenset({1}), error)
    with pytest.raises(error):
        run_batch("denoise", stage, Batch.start(make_items(3)))
    assert len(stage.calls) == 1


def test_a_batch_is_not_changed_by_what_happens_to_it() -> None:
    first = run_batch("encode", Doubling(frozenset({0})), Batch.start(make_items(3)))
    before = (first.groups, dict(first.failures), dict(first.seconds))
    second = run_batch("denoise", Doubling(frozenset({1})), first)
    assert (first.groups, first.failures, first.seconds) == before
    assert set(second.failures) == {0, 1}


def test_the_error_is_one_line_of_bounded_length() -> None:
    assert describe(ValueError("a\n  b\t\tc")) == "ValueError: a b c"
    assert describe(KeyError()) == "KeyError:"
    assert len(describe(ValueError("x" * 10_000))) == MAX_ERROR_CHARACTERS


def test_bytes_are_counted_wherever_they_are() -> None:
    batch = Batch.start(make_items(2))
    state = {"a": [torch.zeros(10, dtype=torch.bfloat16), np.zeros(3)], "b": (b"12345", "text", None, 5), "c": batch}
    texts = sum(len(item.id) + len(item.prompt) for item in batch.groups[0].items)
    assert nbytes(state) == 20 + 24 + 5 + 4 + texts
