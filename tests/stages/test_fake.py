"""Fake stages have the cost, the handoffs and the failures that a job asks for."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask.items import Item
from dfdask.spec import FakeStages
from dfdask.stages.batch import Batch, nbytes, run_batch
from dfdask.stages.fake import FakeStage, fake_pixels


def make_items(count: int) -> list[Item]:
    return [Item(row, f"item-{row}", "a cat", 100 + row, {}) for row in range(count)]


def run(settings: FakeStages, count: int) -> Batch:
    batch = Batch.start(make_items(count))
    for name in settings.stages:
        batch = run_batch(name, FakeStage(name, settings), batch)
    return batch


def test_every_stage_takes_its_time_for_each_item() -> None:
    batch = run(FakeStages(stages={"encode": 0.0, "denoise": 0.04, "decode": 0.01}), 3)
    assert batch.seconds["encode"] < 0.02
    assert 0.12 <= batch.seconds["denoise"] < 0.2
    assert 0.03 <= batch.seconds["decode"] < 0.1


def test_handoffs_have_the_size_that_is_asked_for() -> None:
    settings = FakeStages(handoff_bytes=1000)
    for name in ("encode", "denoise"):
        assert nbytes(FakeStage(name, settings).run(make_items(3), None)) == 3000


def test_pixels_depend_on_the_seed_alone() -> None:
    settings = FakeStages(height=5, width=7)
    (group,) = run(settings, 3).groups
    assert [picture.shape for picture in group.state] == [(5, 7, 3)] * 3
    for item, picture in zip(group.items, group.state, strict=True):
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, fake_pixels(item.seed, 5, 7))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_other_seeds_draw_other_pixels(one: int, other: int) -> None:
    same = np.array_equal(fake_pixels(one, 8, 8), fake_pixels(other, 8, 8))
    assert same == (one == other)
    assert fake_pixels(one, 8, 8).std() > 30


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_the_named_items_fail_in_the_named_stage(stage: str) -> None:
    batch = run(FakeStages(fail=["item-1", "item-4", "item-99"], fail_stage=stage), 6)
    assert batch.failures == {row: f"{stage}: RuntimeError: fake failure of item-{row}" for row in (1, 4)}
    assert [item.index for group in batch.groups for item in group.items] == [0, 2, 3, 5]


def test_one_stage_may_be_all() -> None:
    batch = run(FakeStages(stages={"generate": 0.0}), 2)
    assert len(batch.groups[0].state) == 2


def test_it_sleeps_and_does_not_compute() -> None:
    settings = FakeStages(stages={"denoise": 0.05, "decode": 0.0})
    before = time.process_time()
    FakeStage("denoise", settings).run(make_items(4), None)
    assert time.process_time() - before < 0.1
