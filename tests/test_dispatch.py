"""The gate's rules: order, own work before help, turns, limits, fair shares, and accounts that always add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.dispatch import Dispatcher, Kind, Seat

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


def kind_of(job: str) -> Kind:
    return job, "denoise"


class Shop:
    """One worker that has one task at a time, and jobs that always have more to do."""

    def __init__(self, **costs: float) -> None:
        self.dispatcher = Dispatcher(depth=1)
        self.dispatcher.join("w", Seat())
        self.numbers: Counter[str] = Counter()
        for job, cost in costs.items():
            self.dispatcher.weigh(kind_of(job), cost)

    def push(self, job: str, count: int, items: int = 1) -> None:
        for _ in range(count):
            self.numbers[job] += 1
            self.dispatcher.push(kind_of(job), self.numbers[job], (job, self.numbers[job], items), items)

    def served(self, count: int) -> str:
        """The jobs of the next tasks, in their order."""
        found = ""
        for _ in range(count):
            ((key, _),) = placed(self.dispatcher)
            self.dispatcher.done(key, finished=False)
            found += key[0]
        return found


def test_equal_jobs_take_turns() -> None:
    shop = Shop()
    shop.push("a", 20)
    shop.push("b", 20)
    assert shop.served(20) == "ab" * 10


def test_a_job_of_three_times_the_weight_gets_three_times_the_work() -> None:
    shop = Shop(a=1 / 3, b=1.0)
    shop.push("a", 90)
    shop.push("b", 90)
    assert Counter(shop.served(80)) == {"a": 60, "b": 20}


def test_jobs_share_seconds_and_not_items() -> None:
    shop = Shop(a=4.0, b=1.0)
    shop.push("a", 90)
    shop.push("b", 90, items=2)
    served = Counter(shop.served(60))
    assert served["a"] * 4.0 == served["b"] * 2


def test_a_job_that_comes_late_has_no_claim_on_the_past() -> None:
    shop = Shop()
    shop.push("a", 200)
    shop.served(100)
    shop.push("b", 100)
    assert Counter(shop.served(20)) == {"a": 10, "b": 10}


def test_a_job_that_paused_has_saved_up_nothing() -> None:
    shop = Shop()
    shop.push("a", 300)
    shop.push("b", 1)
    shop.served(100)
    shop.push("b", 100)
    assert Counter(shop.served(20)) == {"a": 10, "b": 10}


def test_a_job_that_was_forgotten_begins_anew() -> None:
    shop = Shop()
    shop.push("a", 50)
    shop.served(50)
    shop.dispatcher.forget("a")
    assert not shop.dispatcher.has_work("a")
    shop.push("b", 20)
    shop.push("a", 20)
    assert Counter(shop.served(20)) == {"a": 10, "b": 10}


def test_a_job_that_nobody_can_serve_holds_no_other_back() -> None:
    dispatcher = Dispatcher()
    dispatcher.join("w", Seat((kind_of("b"),)))
    for job in ("a", "b"):
        for number in range(2):
            dispatcher.push(kind_of(job), number, (job, number), 1)
    assert placed(dispatcher) == [(("b", 0), "w"), (("b", 1), "w")]


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 8)), min_size=2, max_size=4), st.integers(1, 80))
def test_no_job_with_work_falls_behind_by_more_than_a_task(jobs: list[tuple[float, int]], count: int) -> None:
    shop = Shop(**{"abcd"[number]: cost for number, (cost, _) in enumerate(jobs)})
    for number, (_, items) in enumerate(jobs):
        shop.push("abcd"[number], count, items)
    served = Counter(shop.served(count))
    got = [served["abcd"[number]] * cost * items for number, (cost, items) in enumerate(jobs)]
    assert max(got) - min(got) <= max(cost * items for cost, items in jobs) + 1e-6


def busy(*workers: str) -> Dispatcher:
    """Each worker has one task, named after it, and room for another."""
    dispatcher = Dispatcher()
    for worker in workers:
        dispatcher.join(worker, Seat())
        dispatcher.push(DENOISE, 0, f"of {worker}", 1)
        assert placed(dispatcher) == [(f"of {worker}", worker)]
    return dispatcher


def test_a_suspected_task_has_its_worker_for_itself() -> None:
    dispatcher = busy("w")
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    dispatcher.push(DENOISE, 2, "next", 1)
    assert placed(dispatcher) == []
    dispatcher.done("of w", finished=True)
    assert placed(dispatcher) == [("suspect", "w")]
    assert placed(dispatcher) == []
    dispatcher.done("suspect", finished=True)
    assert placed(dispatcher) == [("next", "w")]


def test_a_worker_that_is_kept_free_gets_nothing_more() -> None:
    dispatcher = busy("w")
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    assert placed(dispatcher) == []
    for number in range(3):
        dispatcher.push(DECODE, -number, number, 1)
    assert placed(dispatcher) == []


def test_a_suspected_task_that_is_dropped_gives_its_worker_back() -> None:
    dispatcher = busy("w")
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    assert placed(dispatcher) == []
    dispatcher.drop("suspect")
    dispatcher.push(DENOISE, 2, "next", 1)
    assert placed(dispatcher) == [("next", "w")]


def test_a_suspected_task_that_killed_its_worker_goes_to_another() -> None:
    dispatcher = busy("w")
    dispatcher.done("of w", finished=True)
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    assert placed(dispatcher) == [("suspect", "w")]
    assert dispatcher.leave("w") == ["suspect"]
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    dispatcher.join("v", Seat())
    assert placed(dispatcher) == [("suspect", "v")]


def test_a_worker_that_was_kept_and_is_paused_gets_nothing() -> None:
    dispatcher = busy("w", "v")
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    assert placed(dispatcher) == []
    kept, other = ("w", "v") if "w" in dispatcher._kept_for else ("v", "w")
    dispatcher.pause(kept)
    dispatcher.done(f"of {kept}", finished=True)
    assert placed(dispatcher) == []
    dispatcher.done(f"of {other}", finished=True)
    assert placed(dispatcher) == [("suspect", other)]


def test_a_worker_that_was_kept_and_has_another_role_is_not_given_the_task() -> None:
    dispatcher = busy("w", "v")
    dispatcher.push(DENOISE, 1, "suspect", 1, alone=True)
    assert placed(dispatcher) == []
    kept, other = ("w", "v") if "w" in dispatcher._kept_for else ("v", "w")
    dispatcher.seat(kept, Seat((DECODE,)))
    dispatcher.done(f"of {kept}", finished=True)
    dispatcher.done(f"of {other}", finished=True)
    assert placed(dispatcher) == [("suspect", other)]


def test_a_suspect_that_comes_later_and_goes_first_blocks_nobody() -> None:
    dispatcher = busy("w")
    dispatcher.push(DENOISE, 2, "later", 1, alone=True)
    assert placed(dispatcher) == []
    dispatcher.push(DENOISE, 1, "first", 1, alone=True)
    order = []
    for key in ("of w", "first", "later"):
        dispatcher.done(key, finished=True)
        order += placed(dispatcher)
    assert order == [("first", "w"), ("later", "w")]


def test_a_suspect_that_may_not_start_keeps_no_worker() -> None:
    dispatcher = busy("w")
    dispatcher.follow(DENOISE, DECODE, limit_items=4)
    dispatcher.push(DENOISE, 1, "suspect", 2, alone=True)
    assert placed(dispatcher) == []
    dispatcher.follow(DENOISE, DECODE, limit_items=1)
    dispatcher.done("of w", finished=True)
    dispatcher.push(DECODE, 0, "decode", 1)
    assert placed(dispatcher) == [("decode", "w")]
    dispatcher.done("decode", finished=True)
    dispatcher.used(DENOISE, 1)
    assert placed(dispatcher) == [("suspect", "w")]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("push", "suspect", "assign", "assign", "done", "leave", "join", "seat", "pause", "drop")),
            st.integers(0, 11),
        ),
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_suspects_are_always_alone_and_all_get_done(steps: list[tuple[str, int]]) -> None:
    dispatcher = Dispatcher()
    workers: dict[str, None] = {"w0": None}
    dispatcher.join("w0", Seat())
    todo: dict[Hashable, tuple[Kind, bool]] = {}

    def push(key: Hashable) -> None:
        kind, alone = todo[key]
        dispatcher.push(kind, (hash(key) % 7, key), key, 1, alone)

    for step, number in steps:
        worker = f"w{number % 3}"
        held = [key for name in workers for key in dispatcher.held(name)]
        if step in ("push", "suspect"):
            todo[len(todo)] = (ENCODE, DENOISE)[number % 2], step == "suspect"
            push(len(todo) - 1)
        elif step == "assign":
            dispatcher.assign(nowhere)
        elif step == "done" and held:
            todo[held[number % len(held)]] = todo[held[number % len(held)]][0], False
            dispatcher.done(held[number % len(held)], finished=False)
            push(held[number % len(held)])  # computed again
        elif step == "leave" and len(workers) > 1 and worker in workers:
            del workers[worker]
            for key in dispatcher.leave(worker):
                todo[key] = todo[key][0], True
                push(key)
        elif step == "join" and worker not in workers:
            workers[worker] = None
            dispatcher.join(worker, SEATS[number % 4])
        elif step == "seat" and worker in workers:
            dispatcher.seat(worker, SEATS[number % 4])
        elif step == "pause" and worker in workers:
            dispatcher.pause(worker, paused=number % 2 == 0)
        elif step == "drop" and todo and (key := number % len(todo)) not in held:
            dispatcher.drop(key)
            push(key)
        for name in workers:
            held = list(dispatcher.held(name))
            assert len(held) <= 2
            assert len(held) == 1 or not any(todo[key][1] for key in held)
    for name in workers:
        dispatcher.pause(name, paused=False)
        dispatcher.seat(name, Seat())
    done: set[Hashable] = set()
    for _ in range(3 * len(todo) + 3):
        for name in workers:
            for key in dispatcher.held(name):
                dispatcher.done(key, finished=False)
                done.add(key)
        dispatcher.assign(nowhere)
    assert done == set(todo)
