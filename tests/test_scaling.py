"""Scaling decisions: what holds for every work, fleet and limit; and whole jobs in virtual time."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.errors import SpecError
from dfdask.fleets import Fleet, Frontier, WorkerClass
from dfdask.fluid import Demand, Group, best_flow
from dfdask.placement import Option, StageWork
from dfdask.scaling import Decision, Limits, State, decide

SHARES = {"encode": 0.1, "denoise": 1.0, "decode": 0.15}


def work(items: float, job: str = "a", batch: int = 1, **seconds: float) -> list[StageWork]:
    """Three stages; ``seconds`` of an item's denoising by class."""
    return [
        StageWork(job, stage, items, {kind: [Option(share * value, batch)] for kind, value in seconds.items()})
        for stage, share in SHARES.items()
    ]


@st.composite
def classes(draw: st.DrawFn, least: int = 1) -> list[WorkerClass]:
    found = []
    for name in ("big", "small")[: draw(st.integers(1, 2))]:
        minimum = draw(st.integers(0, least))
        maximum = draw(st.integers(max(minimum, 1), 5))
        price, startup = draw(st.sampled_from((0.0, 0.5, 3.0))), draw(st.sampled_from((0.0, 20.0, 300.0)))
        found.append(WorkerClass(name, maximum, minimum, price, startup))
    return found


@st.composite
def works(draw: st.DrawFn) -> list[StageWork]:
    seconds = {"big": draw(st.floats(0.1, 3)), "small": draw(st.floats(0.5, 10))}
    jobs = [work(draw(st.sampled_from((1, 30, 1000, 20_000))), "a", draw(st.sampled_from((1, 4))), **seconds)]
    if draw(st.booleans()):
        jobs.append(work(draw(st.integers(1, 500)), "b", **{**seconds, "big": draw(st.floats(0.1, 3))}))
    return [one for job in jobs for one in job]


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    ready = {name: draw(st.integers(0, 4)) for name in ("big", "small")}
    starting = {name: draw(st.lists(st.floats(1, 100), max_size=2)) for name in ("big", "small")}
    return Fleet(ready, starting, {"big": draw(st.integers(0, 1))})


limits = st.builds(
    Limits,
    st.sampled_from((None, 10.0, 500.0, 5000.0, 1e6)),
    st.sampled_from((None, 0.001, 0.5, 5.0, 100.0)),
)


@given(works(), classes(), fleets(), limits)
@settings(max_examples=20, deadline=None)
def test_limits_hold(load: list[StageWork], kinds: list[WorkerClass], fleet: Fleet, limit: Limits) -> None:
    decision, state = decide(load, kinds, fleet, limit, State(), 0.0)
    assert set(decision.counts) == {kind.name for kind in kinds}
    for kind in kinds:
        for counts in (decision.counts, decision.wanted):
            assert 0 <= counts[kind.name] <= kind.maximum
            assert counts[kind.name] >= kind.minimum or decision.reason == "spent"
    if limit.budget is not None:
        assert decision.cost <= limit.budget * (1 + 1e-9)
        if decision.reason not in ("budget", "spent", "probe", "idle"):
            afresh = Frontier(load, kinds, fleet).predict(decision.wanted)
            assert afresh.cost <= limit.budget * (1 + 1e-9)
    assert decision.explain()
    again, _ = decide(load, kinds, fleet, limit, state, 1.0)
    assert again.counts == decision.counts and again.reason == decision.reason, "the same input decides the same"


@given(works(), classes(), st.sampled_from((30.0, 200.0, 1000.0, 8000.0)), st.floats(1.0, 50.0))
@settings(max_examples=20, deadline=None)
def test_more_time_never_costs_more(
    load: list[StageWork], kinds: list[WorkerClass], deadline: float, factor: float
) -> None:
    kinds = [replace(kind, minimum=0) for kind in kinds]
    frontier = Frontier(load, kinds, Fleet())
    soon, _ = decide(load, kinds, Fleet(), Limits(deadline), State(), 0.0)
    late, _ = decide(load, kinds, Fleet(), Limits(deadline * factor), State(), 0.0)
    if soon.reason == "deadline":
        assert soon.seconds <= deadline
        assert late.reason == "deadline" and late.seconds <= deadline * factor
        weights = [frontier.weight(frontier.predict(one.wanted)) for one in (soon, late)]
        assert weights[1] <= weights[0] * (1 + 1e-9)
    else:
        assert soon.reason == "late" and soon.seconds > deadline * 0.89


@given(works(), classes(), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_the_prediction_is_the_fluid_optimum(
    load: list[StageWork], kinds: list[WorkerClass], big: int, small: int
) -> None:
    counts = {"big": big, "small": small}
    frontier = Frontier([replace(one, job="a") for one in load], kinds, Fleet(counts))
    groups = [Group(counts[kind.name], frontier.seconds[kind.name]) for kind in kinds]
    fluid = best_flow(groups, [Demand("all", one.items) for one in load]).seconds["all"]
    found = frontier.predict(counts).seconds
    assert found >= fluid * (1 - 1e-6)
    # A batch passes one stage after the other, at the worst each on the slowest worker.
    options = [[one.options[kind.name][0] for kind in kinds] for one in load]
    slowest = sum(max(option.seconds_per_item * option.batch for option in of_stage) for of_stage in options)
    assert found <= max(fluid, slowest) * (1 + 1e-6)
    late = Frontier(load, kinds, Fleet({}, {name: [50.0] * count for name, count in counts.items()}))
    assert fluid + 50 - 1e-6 <= late.predict(counts).seconds <= found + 50 + 1e-6


@given(classes(least=3), fleets(), limits)
@settings(max_examples=20, deadline=None)
def test_without_work_there_is_the_minimum(kinds: list[WorkerClass], fleet: Fleet, limit: Limits) -> None:
    for load in ([], work(0, big=1.0, small=1.0)):
        decision, state = decide(load, kinds, fleet, limit, State(), 0.0)
        if decision.reason == "spent":
            assert not any(decision.counts.values())
            continue
        assert decision.reason == "idle"
        decision, _ = decide(load, kinds, fleet, limit, state, 1000.0)
        assert decision.counts == {kind.name: kind.minimum for kind in kinds}


@given(works(), classes(), st.sampled_from((None, 500.0, 5000.0)))
@settings(max_examples=15, deadline=None)
def test_what_was_decided_stays(load: list[StageWork], kinds: list[WorkerClass], deadline: float | None) -> None:
    """Once asked for, nobody is sent away; who pays off only beside those that were asked for may still come."""
    decision, state = decide(load, kinds, Fleet(), Limits(deadline), State(), 0.0)
    seen = [decision.counts]
    for look in range(1, 4):
        fleet = Fleet({}, {kind.name: [kind.startup_seconds] * decision.counts[kind.name] for kind in kinds})
        decision, state = decide(load, kinds, fleet, Limits(deadline), state, float(look))
        assert all(decision.counts[name] >= count for name, count in seen[-1].items())
        seen.append(decision.counts)
    assert seen[-1] == seen[-2]


@pytest.mark.parametrize("deadline", [300.0, 900.0, 4000.0])
def test_one_class_gets_the_fewest_workers_that_meet_the_deadline(deadline: float) -> None:
    kinds = [WorkerClass("big", 30, 0, 2.0, 20.0)]
    decision, _ = decide(work(1000, big=1.0), kinds, Fleet(), Limits(deadline), State(), 0.0)
    needed = [count for count in range(1, 31) if 20 + 1000 * sum(SHARES.values()) / count <= deadline * 0.9]
    assert decision.reason == "deadline"
    assert min(needed) <= decision.counts["big"] <= math.ceil(min(needed) * 1.15), "within a step of the frontier"


def test_the_cheaper_class_is_chosen_and_the_dearer_one_only_in_haste() -> None:
    kinds = [WorkerClass("big", 8, 0, 4.0, 10.0), WorkerClass("small", 8, 0, 0.5, 10.0)]
    load = work(1000, big=1.0, small=4.0)
    relaxed, _ = decide(load, kinds, Fleet(), Limits(3600.0), State(), 0.0)
    hasty, _ = decide(load, kinds, Fleet(), Limits(260.0), State(), 0.0)
    assert relaxed.counts["big"] == 0 < relaxed.counts["small"]
    assert hasty.counts["big"] > 0 and hasty.cost > relaxed.cost


def test_nobody_is_started_for_work_that_is_over_before() -> None:
    kinds = [WorkerClass("big", 8, 0, 4.0, startup_seconds=60.0)]
    short, _ = decide(work(60, big=1.0), kinds, Fleet({"big": 1}), Limits(), State(), 0.0)
    long, _ = decide(work(6000, big=1.0), kinds, Fleet({"big": 1}), Limits(), State(), 0.0)
    assert short.counts["big"] == 1 and long.counts["big"] == 8


def test_somebody_does_even_the_shortest_work() -> None:
    kinds = [WorkerClass("big", 8, 0, 4.0, startup_seconds=60.0)]
    decision, _ = decide(work(3, big=1.0), kinds, Fleet(), Limits(), State(), 0.0)
    assert decision.counts["big"] == 1
    assert decide(work(3, big=1.0), kinds, Fleet(), Limits(budget=1.0), State(), 0.0)[0].counts["big"] == 1


def test_no_more_workers_than_there_are_batches() -> None:
    kinds = [WorkerClass("big", 200, 0, startup_seconds=0.0)]
    decision, _ = decide(work(16, batch=4, big=1.0), kinds, Fleet(), Limits(), State(), 0.0)
    assert 3 <= decision.counts["big"] <= 6


def test_unknown_stages_are_tried_on_one_class_after_the_other() -> None:
    kinds = [WorkerClass("big", 8, 0, 4.0), WorkerClass("small", 8, 0, 0.5)]
    first, state = decide(work(100), kinds, Fleet(), Limits(), State(), 0.0)
    assert (first.reason, first.counts) == ("probe", {"big": 0, "small": 1})
    waiting, state = decide(work(100), kinds, Fleet({}, {"small": [10.0]}), Limits(), state, 1.0)
    assert waiting.counts == first.counts, "what is coming may know it"
    second, state = decide(work(100), kinds, Fleet({"small": 1}), Limits(), state, 2.0)
    assert second.counts == {"big": 1, "small": 1}
    nobody, _ = decide(work(100), [replace(kinds[0], maximum=0)], Fleet(), Limits(), State(), 0.0)
    assert nobody.reason == "impossible"


def test_an_unknown_class_is_tried_where_the_known_ones_are_late() -> None:
    kinds = [WorkerClass("small", 1, 0, 0.1), WorkerClass("big", 4, 0, 1.0), WorkerClass("huge", 4, 0, 9.0)]
    limit, fleet = Limits(20.0, 1.0), Fleet({"small": 1})
    first, state = decide(work(400, small=1.0), kinds, fleet, limit, State(), 0.0)
    assert (first.reason, first.counts) == ("trial", {"small": 1, "big": 1, "huge": 0})
    assert "1 small, 1 big: the deadline will be missed with the classes that are known" in first.explain()
    coming = Fleet({"small": 1}, {"big": [10.0]})
    waiting, state = decide(work(395, small=1.0), kinds, coming, limit, state, 100.0)
    assert (waiting.reason, waiting.wanted) == ("trial", first.counts), "one at a time, and it is waited for"
    known = work(390, small=1.0, big=0.2)
    next_one, _ = decide(known, kinds, Fleet({"small": 1, "big": 1}), limit, State(), 110.0)
    assert next_one.reason == "trial" and next_one.counts == {"small": 1, "big": 4, "huge": 1}
    assert decide(known, kinds[:2], Fleet({"small": 1, "big": 1}), limit, State(), 110.0)[0].reason == "late"


@pytest.mark.parametrize(
    ("items", "change", "budget"),
    [
        (400, {"maximum": 0}, 1.0),
        (400, {"price_per_hour": 50.0}, 1.0),
        (400, {"startup_seconds": 900.0}, 1.0),
        (400, {"memory_bytes": 24}, 1.0),
        (30_000, {}, 1.05),
    ],
)
def test_an_unknown_class_is_not_tried_in_vain(items: int, change: dict[str, Any], budget: float) -> None:
    big = replace(WorkerClass("big", 4, 0, 9.0), **change)
    option = Option(1.0, 1, {"transformer": 40})
    load = [StageWork("a", "denoise", items, {"small": [option]})]
    kinds, fleet = [WorkerClass("small", 1, 0, 0.1), big], Fleet({"small": 1})
    decision, _ = decide(load, kinds, fleet, Limits(20.0, budget), State(), 0.0)
    assert (decision.reason, decision.counts) == ("late", {"small": 1, "big": 0})
    assert decide(load, kinds, Fleet({"small": 1, "big": 1}), Limits(20.0), State(), 0.0)[0].reason == "late"
    plain = [kinds[0], WorkerClass("big", 4)]
    assert decide(load, plain, fleet, Limits(20.0, budget), State(), 0.0)[0].reason == "trial"


@given(works(), classes(), fleets(), limits, st.sets(st.sampled_from(("big", "small")), max_size=1))
@settings(max_examples=30, deadline=None)
def test_a_trial_keeps_the_limits(
    load: list[StageWork], kinds: list[WorkerClass], fleet: Fleet, limit: Limits, unknown: set[str]
) -> None:
    load = [replace(one, options={name: one.options[name] for name in {*one.options} - unknown}) for one in load]
    decision, _ = decide(load, kinds, fleet, limit, State(), 0.0)
    for kind in kinds:
        assert decision.wanted[kind.name] <= kind.maximum
    if decision.reason == "trial":
        assert len(kinds) == 2 and limit.deadline_seconds is not None
        assert all(decision.wanted[name] >= 1 for name in unknown)
        assert limit.budget is None or decision.cost <= limit.budget
    assert decision.explain()


def test_a_class_with_too_little_memory_is_not_asked_for() -> None:
    heavy = Option(1.0, 1, {"transformer": 40})
    load = [StageWork("a", "denoise", 100, {"big": [heavy], "small": [heavy]})]
    kinds = [WorkerClass("big", 4, 0, 4.0, memory_bytes=80), WorkerClass("small", 4, 0, 0.1, memory_bytes=24)]
    decision, _ = decide(load, kinds, Fleet(), Limits(1e5), State(), 0.0)
    assert decision.counts["small"] == 0 < decision.counts["big"]


def test_noise_moves_nobody() -> None:
    """Beliefs that are wrong by up to 15% at each look, for an hour of looks: the fleet settles and stays."""
    kinds, noise = [WorkerClass("big", 40, 0, 2.0, 30.0)], random.Random(1)
    state, have, changes = State(), 0, []
    for tick in range(120):
        load = work(50_000, big=1.0 * noise.uniform(0.85, 1.15))
        decision, state = decide(load, kinds, Fleet({"big": have}), Limits(6000.0), state, tick * 30.0, 300.0)
        if decision.counts["big"] != have:
            changes.append((tick, decision.counts["big"]))
            have = decision.counts["big"]
    assert len(changes) <= 4 and all(tick < 40 for tick, _ in changes), changes


@dataclass
class Trace:
    seconds: float = 0.0
    spent: float = 0.0
    done: bool = False
    most: Counter[str] = field(default_factory=Counter)
    ups: int = 0
    downs: int = 0
    last: Decision | None = None


def play(
    items: float,
    kinds: list[WorkerClass],
    believed: dict[str, float],
    truth: float,
    deadline: float | None = None,
    budget: float | None = None,
    losses: float = 0.0,
    tick: float = 40.0,
) -> Trace:
    """A job in virtual time: workers are ``truth`` times as slow as believed, and each look loses some of them."""
    trace, state, chance = Trace(), State(), random.Random(3)
    workers: list[list[float | str]] = []  # class, seconds until ready
    left = items
    per_item = sum(SHARES.values())
    while trace.seconds < 1e5:
        ready = Counter(str(kind) for kind, delay in workers if float(delay) <= 0)
        starting: dict[str, list[float]] = {
            kind.name: [float(delay) for name, delay in workers if name == kind.name and float(delay) > 0]
            for kind in kinds
        }
        limit = Limits(
            None if deadline is None else deadline - trace.seconds,
            None if budget is None else budget - trace.spent,
            tick,
        )
        load = work(left, **believed)
        decision, state = decide(load, kinds, Fleet(dict(ready), starting), limit, state, trace.seconds, 60.0)
        trace.last = decision
        for kind in kinds:
            own = sorted((one for one in workers if one[0] == kind.name), key=lambda one: float(one[1]))
            extra = decision.counts[kind.name] - len(own)
            trace.ups, trace.downs = trace.ups + (extra > 0), trace.downs + (extra < 0)
            workers += [[kind.name, kind.startup_seconds] for _ in range(extra)]
            for one in own[decision.counts[kind.name] :]:
                workers.remove(one)
        trace.most |= Counter(str(kind) for kind, _ in workers)
        if not workers and (left <= 0 or decision.reason in ("spent", "impossible")):
            break
        for one in workers:
            price = next(kind.price_per_hour for kind in kinds if kind.name == one[0])
            trace.spent += price * tick / 3600
            working = min(max(tick - float(one[1]), 0.0), tick)
            left = max(left - working / (believed[str(one[0])] * per_item * truth), 0.0)
            one[1] = float(one[1]) - tick
        workers = [one for one in workers if chance.random() >= losses]
        trace.done = trace.done or left <= 0
        trace.seconds += tick
    return trace


FLEET = [WorkerClass("big", 8, 0, 4.0, 40.0), WorkerClass("small", 12, 0, 0.8, 90.0)]


@pytest.mark.parametrize("truth", [0.7, 1.0, 1.4])
def test_a_budget_is_never_exceeded_even_where_beliefs_are_wrong(truth: float) -> None:
    rich = play(4000, FLEET[:1], {"big": 1.0}, truth, budget=12.0)
    assert rich.done and rich.spent <= 12
    poor = play(4000, FLEET[:1], {"big": 1.0}, truth, budget=2.0)
    assert not poor.done and 1.7 <= poor.spent <= 2.0, "what there is, is used"
    assert poor.last is not None and poor.last.reason == "spent"


def test_a_deadline_is_met_when_workers_are_slower_than_believed_and_get_lost() -> None:
    trace = play(4000, FLEET, {"big": 1.0, "small": 4.0}, 1.25, deadline=3000.0, losses=0.01, tick=60.0)
    assert trace.done and trace.seconds <= 3000 + 200  # the seconds after the work was done were patience
    assert trace.downs <= 4, "it does not flap"


def test_classes_say_what_is_wrong_with_them() -> None:
    with pytest.raises(SpecError, match="big: needs 0 <= min <= max, got min 3 and max 2"):
        WorkerClass("big", 2, 3)
    with pytest.raises(SpecError, match="big: price must be a number of at least 0, got nan"):
        WorkerClass("big", 2, price_per_hour=math.nan)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a", "2"), "scale: a: max must be a whole number, got '2'; write e.g. 2"),
        (("a", 2.5), "scale: a: max must be a whole number, got 2.5"),
        (("a", True), "scale: a: max must be a whole number, got True"),
        (("a", 2, None), "scale: a: min must be a whole number, got None"),
        (("a", 2, 0, "1"), "scale: a: price must be a number of at least 0, got '1'"),
        (("a", 2, 0, 1.0, None), "scale: a: startup must be a number of at least 0, got None"),
        (("a", 2, 0, 1.0, 1.0, "80 GB"), "scale: a: memory must be a whole number, got '80 GB'"),
        ((3, 2), "scale: the name of a class must be text, got 3"),
    ],
)
def test_classes_take_numbers_only(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        WorkerClass(*values)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    assert WorkerClass("a", np.int64(2), np.int32(1), np.float32(0.5)).maximum == 2
