"""The items as a table: rows, columns and the digest say the same, whatever the items set themselves."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.item_table import ArgumentColumn, ItemTable, TextColumn
from dfdask.prompts import read_items
from dfdask.spec import JobSpec
from dfdask.store import Layout, RunStore
from dfdask.targets import Location

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**63 - 1, -(2**63), 2**63, 2**70, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS.filter(lambda text: "\0" not in text),
    st.lists(st.integers(), max_size=2),
)


def text_column(texts: list[str]) -> TextColumn:
    column = TextColumn()
    for text in texts:
        column.append(text)
    return column


def table(
    prompts: list[str], ids: list[str] | None = None, copies: int = 1, seed: int = 0, **arguments: Any
) -> ItemTable:
    seeds = (np.arange(len(prompts), dtype=np.int64) * 10 + seed).astype(np.uint32)
    return ItemTable(text_column(prompts), text_column(ids) if ids else None, seeds, copies, arguments)


def read(values: list[dict[str, Any]], copies: int = 1, **arguments: Any) -> ItemTable:
    """A table as a job's prompts make it."""
    rows = [{"prompt": f"p{place}", **value} for place, value in enumerate(values)]
    return read_items(JobSpec(model="bundled", prompts=rows, images_per_prompt=copies, arguments=arguments))


@given(st.lists(TEXTS, max_size=20))
@settings(deadline=None)
def test_texts_are_what_was_appended(texts: list[str]) -> None:
    column = text_column(texts)
    assert len(column) == len(texts)
    assert [column[row] for row in range(len(column))] == texts
    again: TextColumn = pickle.loads(pickle.dumps(column))
    again.append("more")
    assert again[len(texts)] == "more" and [again[row] for row in range(len(texts))] == texts


def test_rows() -> None:
    made = table(["a", "b"], copies=3, seed=5, height=64)
    assert len(made) == 6 and [item.index for item in made] == list(range(6))
    assert [item.id for item in made] == [f"00000{row}-{image}" for row in range(2) for image in range(3)]
    assert [item.prompt for item in made] == list("aaabbb")
    assert [item.seed for item in made] == [5, 6, 7, 15, 16, 17]
    assert all(item.arguments == {"height": 64} for item in made)
    assert made[-1] == made[5] == list(made)[5]
    assert made.items(2, 4) == list(made)[2:4] and made.items(4, 99) == list(made)[4:] and made.items(6, 9) == []
    for index in (6, -7):
        with pytest.raises(IndexError):
            made[index]


def test_ids_of_their_own() -> None:
    assert [item.id for item in table(["a", "b"], ids=["cat", "猫"])] == ["cat", "猫"]
    assert [item.id for item in table(["a", "b"], ids=["cat", "cat-1"], copies=2)] == [
        "cat-0",
        "cat-1",
        "cat-1-0",
        "cat-1-1",
    ]


def test_seeds_wrap_around_alike_in_rows_and_columns() -> None:
    made = table(["a", "b"], copies=4, seed=2**32 - 2)
    assert [item.seed for item in made][:4] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert made.columns()["seed"].tolist() == [item.seed for item in made]


@given(
    st.lists(st.dictionaries(st.sampled_from(["x", "y"]), VALUES), min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(["x", "z"]), VALUES),
    st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_columns_say_what_the_rows_say(own: list[dict[str, Any]], job: dict[str, Any], copies: int) -> None:
    made = read(own, copies, **job)
    rows, columns = list(made), made.columns()
    for item, values in zip(rows[::copies], own, strict=True):
        assert dict(item.arguments) == {**job, **values}
        assert {name: type(value) for name, value in item.arguments.items()} == {
            name: type(value) for name, value in {**job, **values}.items()
        }
    assert set(columns) == {"id", "prompt", "seed", "image_index"} | {name for values in own for name in values}
    assert [columns["id"][item.index] for item in rows] == [item.id for item in rows]
    assert columns["image_index"].tolist() == [item.index % copies for item in rows]
    for name in set(columns) - {"id", "prompt", "seed", "image_index"}:
        wanted = [item.arguments.get(name) for item in rows]
        for stored, value in zip(columns[name].tolist(), wanted, strict=True):
            assert says(stored, value, {type(value) for value in wanted}), (columns[name], wanted)


def says(stored: Any, value: Any, kinds: set[type]) -> bool:
    """Whether a stored column's entry says what an item's argument is, in a column of these kinds."""
    if isinstance(stored, float):
        return math.isnan(stored) if value is None else stored == float(value)
    if isinstance(stored, str) and kinds <= {str, type(None)}:
        return stored == (value or "")
    if isinstance(stored, str):
        return bool(json.loads(stored) == value)
    return type(stored) is type(value) and bool(stored == value)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2**63 - 1], "int64"),
        ([1, 2**63], "float64"),
        ([1, 2.5], "float64"),
        ([1, None], "float64"),
        ([None, None], "StringDType()"),
        ([True, False], "bool"),
        ([True, 1], "StringDType()"),
        (["a", None], "StringDType()"),
        ([1, "a"], "StringDType()"),
        ([0.5, 10**400], "StringDType()"),
        ([10**400], "StringDType()"),
    ],
)
def test_types_of_columns(values: list[Any], dtype: str) -> None:
    assert str(read([{"x": value} for value in values]).columns()["x"].dtype) == dtype


def test_a_column_that_some_items_set_takes_the_others_from_the_job() -> None:
    assert read([{"x": 3}, {}], x=7).columns()["x"].tolist() == [3, 7]
    assert read([{"x": 3}, {}], x=7.5).columns()["x"].tolist() == [3.0, 7.5]
    assert read([{"x": "a"}, {}]).columns()["x"].tolist() == ["a", ""]
    assert np.isnan(read([{"x": 3}, {}]).columns()["x"][1])


CHANGES: list[Callable[[ItemTable], ItemTable]] = [
    lambda made: replace(made, prompts=text_column(["a", "c"])),
    lambda made: replace(made, prompts=text_column(["ab", ""])),
    lambda made: replace(made, prompts=text_column(["a", "b", "c"]), seeds=np.arange(3, dtype=np.uint32)),
    lambda made: replace(made, ids=text_column(["000000", "000001"])),
    lambda made: replace(made, seeds=made.seeds + np.uint32(1)),
    lambda made: replace(made, images_per_prompt=2),
    lambda made: replace(made, arguments={"height": 65}),
    lambda made: replace(made, arguments={}),
    lambda made: replace(made, own={"x": ArgumentColumn("int", np.array([1, 2]), np.array([True, True]))}),
    lambda made: replace(made, own={"x": ArgumentColumn("int", np.array([1, 0]), np.array([True, False]))}),
    lambda made: replace(made, own={"x": ArgumentColumn("int", np.array([1, 0]), np.array([True, True]))}),
    lambda made: replace(made, own={"y": ArgumentColumn("int", np.array([1, 0]), np.array([True, True]))}),
    lambda made: replace(made, own={"x": ArgumentColumn("str", text_column(["1", "0"]), np.array([True, True]))}),
    lambda made: replace(made, own={"x": ArgumentColumn("json", text_column(["1", "0"]), np.array([True, True]))}),
]


def test_the_digest_is_of_everything_and_stays() -> None:
    made = table(["a", "b"], height=64)
    digests = [made.digest(), *(change(made).digest() for change in CHANGES)]
    assert len(set(digests)) == len(digests)
    # Stored in runs: another digest for the same items would keep every one of them from being resumed.
    assert made.digest() == "1df4155e01bb4fd4f0d9d8e6f5959ecdcbf891cb59d2ab41c96f79cdfde496cc"
    assert pickle.loads(pickle.dumps(made)).digest() == made.digest()


def test_it_becomes_the_columns_of_a_run(local: Location) -> None:
    made = read([{"x": 1, "note": "ä"}, {"x": 2.5}, {"ys": [1, {"k": None}]}], copies=2)
    store = RunStore.create(local, Layout("image", (2, 2, 3), len(made), 4), made.columns(), {"dfdask": {}})
    assert store.verify() == []
    found = store.dataset().load()
    for name, values in made.columns().items():
        assert np.array_equal(found[name].values, values, equal_nan=values.dtype.kind == "f")


def test_many_items_are_small() -> None:
    prompts = [f"prompt {row}" for row in range(50_000)]
    made = table(prompts, copies=4)
    characters = sum(map(len, prompts))
    assert len(pickle.dumps(made)) < characters + 12 * len(prompts) + 10_000
    assert made[199_999].prompt == "prompt 49999" and made[199_999].id == "049999-3"
