"""The gate's rules: order, own work before help, turns, limits, and accounts that always add up."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.dispatch import Dispatcher, Seat

ENCODE, DENOISE, DECODE = ("job", "encode"), ("job", "denoise"), ("job", "decode")


def nowhere(key: Hashable) -> Mapping[str, int]:
    return {}


def placed(dispatcher: Dispatcher) -> list[tuple[Hashable, str]]:
    return [(one.key, one.worker) for one in dispatcher.assign(nowhere)]


def test_two_a_worker_later_stages_first_and_the_least_loaded_first() -> None:
    dispatcher = Dispatcher()
    for worker in ("a", "b"):
        dispatcher.join(worker, Seat())
    for number in range(4):
        dispatcher.push(ENCODE, (0, number), f"e{number}", 1)
    dispatcher.push(DECODE, (-2, 0), "d0", 1)
    assert placed(dispatcher) == [("d0", "a"), ("e0", "b"), ("e1", "a"), ("e2", "b")]
    assert placed(dispatcher) == []
    dispatcher.done("e0", finished=True)
    assert placed(dispatcher) == [("e3", "b")]


def test_own_stages_come_before_help_and_specialists_first() -> None:
    dispatcher = Dispatcher()
    dispatcher.join("any", Seat())
    dispatcher.join("encoder", Seat((ENCODE,), (DENOISE,)))
    dispatcher.push(ENCODE, (0, 0), "e0", 1)
    assert placed(dispatcher) == [("e0", "encoder")]
    for number in range(4):
        dispatcher.push(DENOISE, (-1, number), f"n{number}", 1)
    assert placed(dispatcher) == [("n0", "any"), ("n1", "any"), ("n2", "encoder")]


def test_the_one_that_holds_the_inputs_is_preferred_among_equals() -> None:
    dispatcher = Dispatcher()
    for worker in ("a", "b", "c"):
        dispatcher.join(worker, Seat())
    dispatcher.push(DECODE, (0, 0), "d", 1)
    (found,) = dispatcher.assign(lambda key: {"b": 10, "c": 20})
    assert found.worker == "c"


def test_a_turn_ends_when_nothing_is_left_to_do() -> None:
    dispatcher = Dispatcher(depth=1)
    dispatcher.join("w", Seat((ENCODE, DENOISE), (), turns=True))
    dispatcher.follow(ENCODE, DENOISE)
    for number in range(3):
        dispatcher.push(ENCODE, (0, number), ("e", number), 1)
    order = []
    for _ in range(6):
        ((key, _),) = placed(dispatcher)
        order.append(key)
        dispatcher.done(key, finished=True)
        if key[0] == "e":
            dispatcher.push(DENOISE, (-1, key[1]), ("n", key[1]), 1)
        else:
            dispatcher.used(ENCODE, 1)
    assert order == [("e", 0), ("e", 1), ("e", 2), ("n", 0), ("n", 1), ("n", 2)]


def test_results_that_wait_hold_their_stage_back() -> None:
    dispatcher = Dispatcher(depth=8)
    dispatcher.join("w", Seat())
    dispatcher.follow(ENCODE, DENOISE, limit_items=4)
    for number in range(4):
        dispatcher.push(ENCODE, (0, number), f"e{number}", 2)
    assert [key for key, _ in placed(dispatcher)] == ["e0", "e1"]
    dispatcher.done("e0", finished=True)
    assert placed(dispatcher) == []
    dispatcher.used(ENCODE, 2)
    assert [key for key, _ in placed(dispatcher)] == ["e2"]


def test_a_batch_above_the_limit_runs_alone() -> None:
    dispatcher = Dispatcher()
    dispatcher.join("w", Seat())
    dispatcher.follow(ENCODE, DENOISE, limit_items=1)
    dispatcher.push(ENCODE, (0, 0), "e0", 8)
    dispatcher.push(ENCODE, (0, 1), "e1", 8)
    assert [key for key, _ in placed(dispatcher)] == ["e0"]


def test_paused_workers_get_nothing_and_lost_ones_return_their_tasks() -> None:
    dispatcher = Dispatcher()
    dispatcher.join("w", Seat())
    dispatcher.pause("w")
    dispatcher.push(ENCODE, (0, 0), "e0", 1)
    assert placed(dispatcher) == []
    dispatcher.pause("w", paused=False)
    assert placed(dispatcher) == [("e0", "w")]
    assert dispatcher.leave("w") == ["e0"]
    dispatcher.push(ENCODE, (0, 0), "e0", 1)
    assert placed(dispatcher) == []
    dispatcher.join("v", Seat((ENCODE,)))
    assert placed(dispatcher) == [("e0", "v")]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("push", "assign", "done", "drop", "leave", "join", "seat", "pause")), st.integers(0, 11)
    ),
    max_size=80,
)
SEATS = (Seat(), Seat((ENCODE,)), Seat((DENOISE,), (ENCODE,)), Seat((ENCODE, DENOISE), (), turns=True))


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_doubled_or_overloaded_whatever_happens(steps: list[tuple[str, int]]) -> None:
    dispatcher = Dispatcher()
    waiting: dict[Hashable, None] = {}
    running: dict[Hashable, str] = {}
    workers: set[str] = set()
    made = 0
    for step, number in steps:
        worker = f"w{number % 3}"
        if step == "push":
            key: Hashable = (number % 2, made)
            made += 1
            waiting[key] = None
            dispatcher.push((ENCODE, DENOISE)[number % 2], (-(number % 2), made), key, 1)
        elif step == "assign":
            for one in dispatcher.assign(nowhere):
                assert one.worker in workers and one.key in waiting and one.key not in running
                del waiting[one.key]
                running[one.key] = one.worker
        elif step == "done" and running:
            key = list(running)[number % len(running)]
            del running[key]
            dispatcher.done(key, finished=True)
        elif step == "drop" and waiting:
            key = list(waiting)[number % len(waiting)]
            del waiting[key]
            dispatcher.drop(key)
        elif step == "leave":
            lost = dispatcher.leave(worker)
            assert set(lost) == {key for key, where in running.items() if where == worker}
            running = {key: where for key, where in running.items() if where != worker}
            workers.discard(worker)
        elif step == "join" and worker not in workers:
            dispatcher.join(worker, SEATS[number % 4])
            workers.add(worker)
        elif step == "seat" and worker in workers:
            dispatcher.seat(worker, SEATS[number % 4])
        elif step == "pause":
            dispatcher.pause(worker, paused=number % 2 == 0)
        assert all(list(running.values()).count(name) <= dispatcher.depth for name in workers)
        assert dispatcher.ready_items(ENCODE) + dispatcher.ready_items(DENOISE) == len(waiting)
    for name in workers:
        dispatcher.pause(name, paused=False)
        dispatcher.seat(name, Seat())
    while workers and (waiting or running):
        for key in list(running):
            dispatcher.done(key, finished=True)
            del running[key]
        for one in dispatcher.assign(nowhere):
            del waiting[one.key]
            running[one.key] = one.worker
