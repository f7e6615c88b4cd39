"""When the gate reconsiders roles without being asked: soon after costs moved, seldom where they did not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dfdask import roles
from dfdask.controller import Controller, JobFacts, StageFacts
from dfdask.dispatch import Dispatcher, Seat
from dfdask.events import RolesChanged
from dfdask.ledger import Ledger, WorkerAccount
from dfdask.placement import Device
from dfdask.roles import Roles

KIND = "job", "stage"


@pytest.fixture
def controller() -> Controller:
    """Of a fleet of four, after a decision with costs that are well known."""
    found = Controller()
    for number in range(4):
        found.add_device(Device(f"w{number}"))
    found.add_job(JobFacts("job", "model", (StageFacts("stage"),), 10_000))
    for _ in range(100):
        found.finished(KIND, 1, "w0", 2.0)
    found.decide()
    return found


def test_tasks_that_take_what_they_took_are_no_news(controller: Controller) -> None:
    for number in range(200):
        controller.finished(KIND, 1, f"w{number % 4}", 2.0)
    assert controller.ended_tasks == 200 and not controller.has_drifted


def test_calls_whose_items_failed_teach_no_costs(controller: Controller) -> None:
    for _ in range(200):
        assert math.isnan(controller.finished(KIND, 1, "w1", 1e-5, whole=False))
    assert controller.left(KIND) == 10_000 - 300, "they are done with all the same"
    assert controller.finished(KIND, 1, "w1", 2.0) == pytest.approx(2.0, rel=0.01) and not controller.has_drifted


def test_a_cost_that_moves_is_news_until_the_decision(controller: Controller) -> None:
    ended = 0
    while not controller.has_drifted:
        controller.finished(KIND, 1, f"w{ended % 4}", 2.6)
        ended += 1
        assert ended < 20, "a third more was not seen"
    controller.decide()
    assert controller.ended_tasks == 0 and not controller.has_drifted


def test_a_worker_that_slows_down_is_news(controller: Controller) -> None:
    for _ in range(40):
        for worker in ("w0", "w1", "w2", "w3"):
            controller.finished(KIND, 1, worker, 4.0 if worker == "w3" else 2.0)
    assert controller.has_drifted


def test_the_first_task_on_a_class_of_devices_is_news(controller: Controller) -> None:
    controller.add_device(Device("other", "slow"))
    controller.decide()
    controller.finished(KIND, 1, "other", 30.0)
    assert controller.has_drifted


def test_a_paused_worker_has_no_part_in_a_decision(controller: Controller) -> None:
    assert controller.pause("w0") and not controller.pause("w0")
    assert controller.decide().placement.roles.keys() == {"w1", "w2", "w3"}
    assert controller.seat("w0") is None
    assert controller.pause("w0", False)
    assert "w0" in controller.decide().placement.roles


def test_a_load_that_nobody_knew_of_is_news(controller: Controller) -> None:
    controller.finished(KIND, 1, "w0", 2.0, load_seconds=2.0)
    assert controller.has_drifted
    controller.decide()
    controller.finished(KIND, 1, "w1", 2.0, load_seconds=2.1)
    assert not controller.has_drifted


def test_a_load_counts_by_the_median(controller: Controller) -> None:
    for load in (15.0, 0.5, 0.4, 0.0, 0.6):  # the first from disk, and one task that found all in place
        controller.finished(KIND, 1, "w0", 2.0, load_seconds=load)
    (work,) = controller.work()
    assert work.options[next(iter(work.options))][0].load_seconds == pytest.approx(0.55)


def test_the_end_of_a_stage_is_news(controller: Controller) -> None:
    controller.finished(KIND, 9_899, "w0", 2.0 * 9_899)
    controller.decide()
    controller.finished(KIND, 1, "w0", 2.0)
    assert controller.has_drifted, "who ran it has nothing to do"


def test_the_first_task_of_a_job_is_news(controller: Controller) -> None:
    controller.add_job(JobFacts("other", "model", (StageFacts("stage"),), 100))
    controller.finished(("other", "stage"), 1, "w0", 2.0)
    assert controller.has_drifted, "what its results weigh is not known before"


def test_memory_that_a_stage_is_found_to_take_is_news(controller: Controller) -> None:
    controller.used_memory(KIND, "w0", 1000)
    assert controller.has_drifted
    controller.decide()
    controller.used_memory(KIND, "w1", 1010)
    assert not controller.has_drifted
    controller.used_memory(KIND, "w1", 2000)
    assert controller.has_drifted


class Clock:
    """Stands in for ``time`` where only the clock decides."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(roles, "time", found)
    return found


@pytest.fixture
def decided(controller: Controller, clock: Clock) -> Roles:
    found = Roles(Dispatcher(), controller, Ledger())
    found._decided, found._took_seconds = clock.now, 0.01
    return found


def test_costs_that_moved_are_due_after_half_a_second(decided: Roles, controller: Controller, clock: Clock) -> None:
    controller.has_drifted = True
    clock.now += 0.4
    assert not decided.are_due()
    clock.now += 0.2
    assert decided.are_due()


@pytest.mark.parametrize(("ended", "seconds", "due"), [(199, 19.0, False), (201, 19.0, True), (1, 21.0, True)])
def test_without_news_tasks_or_time_must_pass(
    decided: Roles, controller: Controller, clock: Clock, ended: int, seconds: float, due: bool
) -> None:
    controller.ended_tasks = ended
    clock.now += seconds
    assert decided.are_due() is due


def test_decisions_take_a_small_part_of_the_time(decided: Roles, controller: Controller, clock: Clock) -> None:
    controller.has_drifted, decided._took_seconds = True, 0.5
    clock.now += 9.0
    assert not decided.are_due()
    clock.now += 2.0
    assert decided.are_due()


def test_a_forecast_ages(decided: Roles, clock: Clock) -> None:
    decided._seconds.update({"job": 10.0, "never": math.inf})
    clock.now += 4.0
    assert decided.forecast_seconds == {"job": 6.0, "never": math.inf}
    clock.now += 40.0
    assert decided.forecast_seconds["job"] == 0.0


class Scheduler:
    """One that has no workers to show the roles of."""

    workers: dict[str, Any] = {}


def test_roles_without_a_worker_for_some_work_have_no_end_to_compare_with() -> None:
    controller, dispatcher, ledger = Controller(), Dispatcher(), Ledger()
    found = Roles(dispatcher, controller, ledger)
    for name in ("w0", "w1"):
        controller.add_device(Device(name))
        dispatcher.join(name, Seat(()))
        ledger.workers[name] = WorkerAccount(name, "", 0, 0, 0.0, None)

    def decided() -> list[float]:
        ledger.events.clear()
        found.decide(Scheduler(), "test")  # type: ignore[arg-type]
        return [event.stay_seconds for _, event in ledger.events if isinstance(event, RolesChanged)]

    controller.add_job(JobFacts("job", "model", (StageFacts("stage"),), 10_000))
    decided()
    controller.add_job(JobFacts("other", "else", (StageFacts("one"), StageFacts("two")), 100))
    stays = decided()
    assert stays and all(map(math.isnan, stays)), "nobody would ever run the new job"
    for kind, seconds in ((("other", "one"), 2.0), (("other", "two"), 9.0), (KIND, 0.1)):
        for _ in range(50):
            controller.finished(kind, 1, "w0", seconds)
    controller.add_device(Device("w2"))
    dispatcher.join("w2", Seat(()))
    ledger.workers["w2"] = WorkerAccount("w2", "", 0, 0, 0.0, None)
    stays = decided()
    assert stays and all(map(math.isfinite, stays)), "every stage has a worker"


def test_a_stage_that_does_not_fit_is_streamed_in_turns_with_the_others() -> None:
    stages = (
        StageFacts("encode", {"text": 10}, load_seconds={"*": 1.0}, streamed={"text": 2}),
        StageFacts("denoise", {"dit": 24}, load_seconds={"*": 2.0}, streamed={"dit": 3}),
        StageFacts("decode", {"vae": 1}, load_seconds={"*": 0.1}, streamed={"vae": 1}),
    )

    def roles_on(memory: int, device_class: str = "gpu") -> tuple[Controller, dict[str, bool]]:
        controller = Controller()
        controller.add_device(Device("w", device_class, memory))
        controller.add_job(JobFacts("job", "model", stages, 1000, batch=4))
        placement = controller.decide().placement
        return controller, {role.stage: role.option.streamed for role in placement.roles["w"]}

    whole, streamed = roles_on(40), roles_on(16)
    assert whole[1] == dict.fromkeys(("encode", "denoise", "decode"), False)
    assert streamed[1] == {"encode": False, "denoise": True, "decode": False}
    seats = [one.seat("w") for one, _ in (whole, streamed)]
    assert [seat.turns for seat in seats if seat] == [False, True], "what is streamed takes what room there is"
    assert "denoise" not in roles_on(16, "cpu")[1], "a CPU has nothing to stream from"
    assert streamed[0].works_ahead and not whole[0].works_ahead
    assert streamed[0].weight_bytes(("job", "denoise")) == (24, 3)
