"""Whole jobs in virtual time: the dispatcher's rules and the controller's decisions together."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest

from dfdask.controller import JobFacts, StageFacts
from dfdask.cost import TaskWork
from dfdask.dispatch import Kind
from dfdask.placement import Device
from dfdask.simulate import Outcome, Simulation

FIRST = {"encode": 0.05, "denoise": 0.4, "decode": 0.15}
SECOND = {"encode": 0.3, "denoise": 0.1, "decode": 0.2}
ITEMS = 600
SPEED = {"fast": 0.5, "slow": 1.0}


def job(load_seconds: float = 0.0, batch: int = 1, ahead: float = math.inf, name: str = "job") -> JobFacts:
    loads = dict.fromkeys(("slow", "fast"), load_seconds)
    stages = tuple(StageFacts(stage, {stage: 1}, 0, loads, ahead) for stage in FIRST)
    return JobFacts(name, "model", stages, ITEMS, batch)


def seconds(kind: Kind, item: int, device_class: str, now: float) -> float:
    return FIRST[kind[1]] * SPEED[device_class]


def shifting(kind: Kind, item: int, device_class: str, now: float) -> float:
    costs: Mapping[str, float] = FIRST if item < ITEMS // 2 else SECOND
    return costs[kind[1]]


def fleet(count: int, memory: int, kind: str = "slow") -> list[Device]:
    return [Device(f"{kind}-{number}-{memory}", kind, memory) for number in range(count)]


def check(outcome: Outcome, jobs: int = 1) -> None:
    assert len(outcome.done) == jobs * ITEMS
    for worker, busy in outcome.busy_seconds.items():
        assert busy + outcome.load_seconds[worker] <= outcome.seconds + 1e-6


@pytest.mark.parametrize(("memory", "least"), [(3, 0.97), (2, 0.95)])
def test_a_steady_mix_keeps_every_worker_busy(memory: int, least: float) -> None:
    outcome = Simulation([job()], fleet(8, memory), seconds).run()
    check(outcome)
    assert 45 / outcome.seconds > least


@pytest.mark.parametrize(("memory", "least"), [(3, 0.97), (2, 0.92)])
def test_roles_follow_a_mix_that_shifts(memory: int, least: float) -> None:
    outcome = Simulation([job()], fleet(8, memory), shifting).run()
    check(outcome)
    assert 45 / outcome.seconds > least


def test_workers_that_hold_one_stage_switch_rarely() -> None:
    simulation = Simulation([job(load_seconds=2.0)], fleet(8, 1), seconds)
    for stage, cost in FIRST.items():
        simulation.controller.costs.observe("model", stage, "slow", TaskWork(1), cost)
    outcome = simulation.run()
    check(outcome)
    # No plan is better than all work and one load each, evenly divided.
    assert (45 + 2) / outcome.seconds > 0.9
    assert outcome.loads <= 20


def test_one_worker_alone_does_one_stage_after_the_other() -> None:
    outcome = Simulation([job(load_seconds=2.0)], fleet(1, 1), seconds, tick_seconds=10).run()
    check(outcome)
    assert outcome.loads == 3
    assert outcome.seconds == pytest.approx(0.6 * ITEMS + 6)


def test_a_turn_ends_early_where_others_run_out_of_work() -> None:
    """Items arrive one by one: seven workers draw, the eighth encodes and decodes for them in between."""
    costs = {"encode": 0.2, "denoise": 25.0, "decode": 0.5}
    stages = tuple(StageFacts(stage, {stage: 1}, 0, {"slow": 2.0}) for stage in costs)
    total = sum(costs.values()) * 400 / 8
    simulation = Simulation(
        [JobFacts("job", "model", stages, 400)],
        fleet(8, 1),
        lambda kind, item, device_class, now: costs[kind[1]],
        tick_seconds=5,
        arrivals={"job": [total * item / 400 for item in range(400)]},
    )
    for stage, cost in costs.items():
        simulation.controller.costs.observe("model", stage, "slow", TaskWork(1), cost)
    outcome = simulation.run()
    assert len(outcome.done) == 400
    assert total / outcome.seconds > 0.9  # seven at denoising alone could not do better than 0.9


@pytest.mark.parametrize("memory", [1, 2])
@pytest.mark.parametrize("shifts", [False, True])
def test_noise_moves_few_and_a_shift_is_followed(memory: int, shifts: bool) -> None:
    """Equal tasks differ by 25%, as where neighbours share the machine."""
    rng = random.Random(1)
    noise = {(stage, item): rng.lognormvariate(-(0.25**2) / 2, 0.25) for stage in FIRST for item in range(ITEMS)}

    def noisy(kind: Kind, item: int, device_class: str, now: float) -> float:
        costs = SECOND if shifts and item >= ITEMS // 2 else FIRST
        return 10 * costs[kind[1]] * noise[kind[1], item]

    simulation = Simulation([job(load_seconds=2.0)], fleet(8, memory), noisy, tick_seconds=2)
    for stage, cost in FIRST.items():
        simulation.controller.costs.observe("model", stage, "slow", TaskWork(1), 10 * cost)
    outcome = simulation.run()
    check(outcome)
    ideal = sum(noisy(("job", stage), item, "slow", 0.0) for stage, item in noise) / 8
    assert ideal / outcome.seconds > 0.92
    # The end, where stages run out of work one after the other, has moves of its own.
    moves = [len(decision.seats) for now, decision in outcome.decisions if 0 < now < 0.8 * outcome.seconds]
    assert (8 if shifts else 0) <= sum(moves) <= (40 if shifts else 8)


def test_what_waits_is_limited() -> None:
    simulation = Simulation([job(load_seconds=2.0, ahead=100)], fleet(1, 1), seconds, tick_seconds=10)
    outcome = simulation.run()
    check(outcome)
    assert outcome.loads == 3 * ITEMS // 100
    assert sorted(outcome.done)[0] < 0.25 * outcome.seconds


def test_a_mixed_fleet_is_near_its_bound() -> None:
    devices = [*fleet(2, 3, "fast"), *fleet(4, 3), *fleet(2, 1)]
    outcome = Simulation([job()], devices, seconds).run()
    check(outcome)
    assert (ITEMS * 0.6 / 10) / outcome.seconds > 0.92


def test_batches_and_two_jobs() -> None:
    outcome = Simulation([job(batch=4, name="a"), job(batch=4, name="b")], fleet(8, 6), seconds).run()
    check(outcome, jobs=2)
    assert 90 / outcome.seconds > 0.9


def test_equal_input_gives_equal_decisions() -> None:
    first, second = (Simulation([job(load_seconds=0.5)], fleet(4, 2), shifting, tick_seconds=2).run() for _ in range(2))
    assert first == second
