"""Tags: what a worker is started with is what the gate reads, whatever else its resources say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask.stage_tasks import kind_of, stage_name
from dfdask.tags import UNKNOWN_CLASS, Tags, read_tags, stage_resource, task_key, worker_resources

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=12)


@given(st.sets(NAMES, max_size=4), st.none() | NAMES, st.none() | st.integers(1, 1 << 50), st.integers(0, 8))
def test_what_is_written_is_read(stages: set[str], device: str | None, memory: int | None, gpus: int) -> None:
    resources = worker_resources(stages, device, memory, gpus)
    assert read_tags(resources) == Tags(device or UNKNOWN_CLASS, memory, frozenset(stages))


def test_a_worker_that_says_nothing_may_do_all_without_a_limit() -> None:
    assert worker_resources() == {}
    assert read_tags({}) == Tags("cpu", None, frozenset())


def test_gpus_are_shown_where_there_are_any() -> None:
    assert worker_resources(gpus=2) == {"GPU": 2} and "GPU" not in worker_resources(gpus=0)


def test_a_role_of_amount_zero_binds_nobody() -> None:
    assert read_tags({"role:encode": 0, "role:denoise": 0.25, "class:l4": 0}) == Tags(
        "cpu", None, frozenset({"denoise"})
    )


def test_no_memory_is_not_the_same_as_no_limit() -> None:
    assert read_tags(worker_resources(memory_bytes=0)).memory_bytes == 0


def test_other_resources_mean_nothing() -> None:
    assert read_tags({"GPU": 1, "licence": 3, "stage:encode": 1}) == Tags()


@given(NAMES)
def test_no_worker_offers_what_a_stage_asks_for(stage: str) -> None:
    assert not stage_resource(stage).keys() & worker_resources([stage], stage, 1, 1).keys()


@given(NAMES, st.text("0123456789abcdef", min_size=8, max_size=8), st.integers(0, 1 << 40), st.integers(1, 64))
def test_a_key_gives_its_run_and_stage_back(stage: str, run: str, shard: int, items: int) -> None:
    key = task_key(stage, run, shard, 3, items)
    assert kind_of(key) == (run, stage) and stage_name(key) == stage and key[1:] == (shard, 3, items)


@pytest.mark.parametrize("classes", [("a100", "h100"), ("h100", "a100")])
def test_of_several_classes_the_choice_does_not_depend_on_their_order(classes: tuple[str, str]) -> None:
    assert read_tags({f"class:{name}": 1 for name in classes}).device_class == "a100"
