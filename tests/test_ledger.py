"""The books: averages, idle time by its cause, and events whose numbers grow whatever is dropped."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask import ledger as module
from dfdask.events import JobEnded, ShardWritten, TaskDone, WorkerLeft
from dfdask.ledger import JobAccount, Ledger, StageAccount, WorkerAccount


def left(number: int) -> WorkerLeft:
    return WorkerLeft(float(number), f"w{number}", 0)


def worker(joined: float = 0.0) -> WorkerAccount:
    return WorkerAccount("w", "cpu", 0, 0, joined, joined)


def test_the_first_task_sets_the_averages_and_later_ones_move_them_a_little() -> None:
    account = StageAccount()
    account.finish(4, 8.0, 400, 8.0)
    assert (account.recent_seconds, account.bytes_per_item, account.error) == (2.0, 100.0, 0.0)
    account.finish(4, 12.0, 800, 6.0)
    assert account.recent_seconds == pytest.approx(2.1) and account.bytes_per_item == pytest.approx(110)
    assert account.error == pytest.approx(0.05 * 0.5)


def test_a_task_without_items_costs_time_and_teaches_nothing() -> None:
    account = StageAccount()
    account.finish(0, 3.0, 100, 1.0)
    assert account.device_seconds == 3.0
    assert (account.recent_seconds, account.bytes_per_item, account.error) == (None, 0.0, None)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e4), st.integers(0, 1 << 40), st.floats(0, 1e4)), max_size=30)
)
def test_averages_stay_among_what_was_seen(tasks: list[tuple[int, float, int, float]]) -> None:
    account = StageAccount()
    for task in tasks:
        account.finish(*task)
    each = [seconds / items for items, seconds, *_ in tasks if items]
    assert account.device_seconds == pytest.approx(sum(seconds for _, seconds, *_ in tasks))
    assert account.error is None or 0 <= account.error <= 1
    if each:
        assert account.recent_seconds is not None
        assert min(each) - 1e-9 <= account.recent_seconds <= max(each) + 1e-9
    else:
        assert account.recent_seconds is None


def test_a_job_makes_the_books_of_its_stages_once() -> None:
    job = JobAccount("demo", "out", 8, 0, 0, 0.0, set())
    job.stage("encode").done_items = 3
    assert job.stage("encode").done_items == 3 and list(job.stages) == ["encode"]


def test_idle_time_is_put_down_to_its_cause() -> None:
    account = worker(10.0)
    account.set_busy(12.0)
    account.set_idle(20.0, True)
    account.set_busy(25.0)
    assert (account.starving_seconds, account.blocked_seconds, account.idle_since) == (2.0, 5.0, None)


def test_the_cause_is_the_one_at_which_it_became_idle() -> None:
    account = worker()
    account.set_busy(0.0)
    account.set_idle(1.0, True)
    account.set_idle(3.0, False)
    account.settle(5.0)
    assert (account.starving_seconds, account.blocked_seconds) == (0.0, 4.0)


def test_settling_twice_counts_once() -> None:
    account = worker()
    for _ in range(3):
        account.settle(4.0)
    account.settle(6.0)
    assert account.starving_seconds == 6.0


WORDS = st.lists(st.tuples(st.sampled_from(("idle", "blocked", "busy", "settle")), st.floats(0, 10)), max_size=40)


@given(WORDS)
def test_idle_time_is_never_more_than_there_was(words: list[tuple[str, float]]) -> None:
    account, now = worker(), 0.0
    for word, step in words:
        now += step
        if word == "busy":
            account.set_busy(now)
        elif word == "settle":
            account.settle(now)
        else:
            account.set_idle(now, word == "blocked")
        assert account.starving_seconds >= 0 and account.blocked_seconds >= 0
        assert account.starving_seconds + account.blocked_seconds <= now + 1e-6


def test_a_clock_that_is_set_back_takes_no_time_away() -> None:
    account = worker(100.0)
    account.settle(50.0)
    assert account.starving_seconds == 0.0
    account.settle(51.0)
    assert account.starving_seconds == 1.0


@given(st.lists(st.integers(-5, 60), max_size=60), st.integers(1, 20))
def test_numbers_grow_and_none_that_is_kept_is_left_out(asked: list[int], kept: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EVENTS_KEPT", kept)
        ledger = Ledger()
        for count, number in enumerate(asked):
            assert ledger.next_number == count
            ledger.note(left(count))
            found = [at for at, _ in ledger.since(number)]
            assert found == list(range(max(number, count + 1 - kept, 0), count + 1))
            assert all(event == left(at) for at, event in ledger.since(number))
    assert len(ledger.events) <= kept


@given(st.lists(st.integers(0, 5), max_size=20))
def test_who_asks_from_the_next_number_on_hears_everything_once(bursts: list[int]) -> None:
    ledger, heard, next_number = Ledger(), [], 0
    for burst in bursts:
        for _ in range(burst):
            ledger.note(left(ledger.next_number))
        heard += [entry["when"] for entry in ledger.told_since(next_number, None)]
        next_number = ledger.next_number
    assert heard == [float(number) for number in range(sum(bursts))]


def test_a_run_hears_of_itself_and_of_the_fleet() -> None:
    ledger = Ledger()
    for event in (JobEnded(1.0, "a", "finished"), JobEnded(2.0, "b", "finished"), left(3)):
        ledger.note(event)
    assert [entry["when"] for entry in ledger.told_since(0, "a")] == [1.0, 3.0]
    assert [entry["when"] for entry in ledger.told_since(0, None)] == [1.0, 2.0, 3.0]
    assert [entry["when"] for entry in ledger.told_since(0, "c")] == [3.0]


def test_what_is_told_is_json_without_pictures() -> None:
    ledger = Ledger()
    ledger.note(ShardWritten(1.0, "a", 0, 8, 0, (), {3: b"jpeg"}))
    ledger.note(TaskDone(2.0, "a", "denoise", "w", 4, 1.0, 1.0, 0.0, float("nan"), 10))
    shard, task = json.loads(json.dumps(ledger.told_since(0, "a"), allow_nan=False))
    assert (shard["event"], task["event"]) == ("ShardWritten", "TaskDone")
    assert "thumbnails" not in shard and task["predicted_seconds"] is None
    assert ledger.events[0][1].thumbnails == {3: b"jpeg"}, "the gate's own page still shows them"
