"""Bounds that judge schedules: never above what a schedule reaches, and near the best where that is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.controller import Controller, Decision, JobFacts, StageFacts
from dfdask.cost import TaskWork
from dfdask.evaluate import best_offline_seconds, lp_bound_seconds
from dfdask.fluid import Group
from dfdask.placement import Device, Placement
from dfdask.simulate import Outcome, Simulation

COSTS = (0.05, 0.4, 0.15)


def simulated(
    costs: tuple[float, ...], items: int, workers: int, switch: float, memory: int, roles: bool = True
) -> Outcome:
    def everything(controller: Controller, now: float) -> Decision:
        return Decision({}, {}, Placement({}, "everything", {}, {}, (), 0.0, 0.0))

    names = [f"stage {number}" for number in range(len(costs))]
    stages = tuple(StageFacts(name, {name: 1}, 0, {"cpu": switch}) for name in names)
    simulation = Simulation(
        [JobFacts("job", "model", stages, items)],
        [Device(f"worker {number}", "cpu", memory) for number in range(workers)],
        lambda kind, item, device_class, now: costs[names.index(kind[1])],
        None if roles else everything,
    )
    for name, cost in zip(names, costs, strict=True):
        simulation.controller.costs.observe("model", name, "cpu", TaskWork(1), cost)
    return simulation.run()


@given(
    st.lists(st.floats(0.02, 1), min_size=1, max_size=3).map(tuple),
    st.integers(1, 30),
    st.integers(1, 4),
    st.floats(0, 2),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_no_schedule_beats_the_bounds(
    costs: tuple[float, ...], items: int, workers: int, switch: float, memory: int, roles: bool
) -> None:
    seconds = simulated(costs, items, workers, switch, memory, roles).seconds
    assert best_offline_seconds(costs, items, workers, switch, memory) <= seconds * (1 + 1e-3)
    assert lp_bound_seconds(items, [Group(workers, dict(enumerate(costs)))]) <= seconds * (1 + 1e-6)


def test_the_instance_of_the_live_benchmark() -> None:
    bound = best_offline_seconds(COSTS, 600, 8, 2.0, 1)
    assert 45 + 2 <= bound <= 45 + 2 + 2  # all work, one load each; at most one more each
    assert bound / simulated(COSTS, 600, 8, 2.0, 1).seconds > 0.9


@pytest.mark.parametrize(("loaded", "loads"), [(False, 3), (True, 2)])
def test_one_worker_alone(loaded: bool, loads: int) -> None:
    assert best_offline_seconds(COSTS, 600, 1, 2.0, 1, loaded) == pytest.approx(360 + 2 * loads, rel=1e-3)


def test_where_the_best_is_known() -> None:
    # Two workers, two equal stages: one each, the second starts and the first ends one item's time apart.
    assert best_offline_seconds((1.0, 1.0), 50, 2, 100.0, 1, loaded=True) == pytest.approx(51, rel=1e-3)
    # With room for both stages and nothing to load there are only the work and, if shared unevenly, nothing lost.
    assert best_offline_seconds((1.0, 3.0), 10, 2, 0.0, 2) == pytest.approx(20, rel=1e-3)
    assert best_offline_seconds((1.0, 3.0), 0, 2, 5.0, 2) == 0


def test_mixed_fleet() -> None:
    fast, slow = {0: 0.025, 1: 0.2, 2: 0.075}, dict(enumerate(COSTS))
    assert lp_bound_seconds(600, [Group(2, fast), Group(6, slow)]) == pytest.approx(600 * 0.6 / 10)
    # Two that cannot denoise are no loss here: there is enough else to do.
    small = {0: 0.05, 2: 0.15}
    assert lp_bound_seconds(600, [Group(2, fast), Group(4, slow), Group(2, small)]) == pytest.approx(36)
    # Alone with one that can, they wait for it.
    assert lp_bound_seconds(600, [Group(1, {1: 0.4}), Group(2, small)]) == pytest.approx(240)
    assert lp_bound_seconds(600, [Group(2, small)]) == math.inf


@pytest.mark.parametrize("wrong", [{"costs": ()}, {"workers": 0}, {"memory_stages": 0}, {"switch_seconds": -1.0}])
def test_what_is_no_instance_is_refused(wrong: dict[str, object]) -> None:
    instance = {"costs": COSTS, "items": 1, "workers": 1, "switch_seconds": 1.0, "memory_stages": 1}
    with pytest.raises(ValueError, match="a bound needs"):
        best_offline_seconds(**{**instance, **wrong})  # type: ignore[arg-type]
