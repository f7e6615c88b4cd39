"""Placement: what holds for every fleet and every load."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.capacity import LINK_BYTES_PER_SECOND, fits, load_seconds, usable, ways
from dfdask.fluid import Demand, Group, best_flow
from dfdask.placement import Device, Option, Placement, StageWork, place

STAGES = ("encode", "denoise", "decode", "upscale")
CLASSES = ("fast", "slow")


def options(seconds: float, name: str, size: int, load: float, streams: bool) -> list[Option]:
    resident = Option(seconds, 4, {name: size}, 0, load)
    return [resident, Option(seconds * 1.3, 8, {}, 1, 0.0, streamed=True)] if streams else [resident]


@st.composite
def works(
    draw: st.DrawFn, jobs: int = 2, most: int = 4, load: st.SearchStrategy[float] | None = None
) -> list[StageWork]:
    found = []
    for job in range(draw(st.integers(1, jobs))):
        items, weight = draw(st.integers(1, 2000)), draw(st.sampled_from((0.5, 1.0, 10.0)))
        for stage in STAGES[: draw(st.integers(1, most))]:
            name, size = f"{job}/{stage}", draw(st.integers(1, 3))
            base, streams = draw(st.floats(0.01, 2)), draw(st.booleans())
            seconds = draw(st.floats(0, 5) if load is None else load)
            table = {
                kind: options(base * draw(st.floats(0.5, 4)), name, size, seconds, streams)
                for kind in CLASSES
                if kind == "fast" or draw(st.booleans())
            }
            ahead = draw(st.sampled_from((10.0, 100.0, math.inf)))
            found.append(StageWork(f"job {job}", stage, items, table, weight, ahead))
    return found


@st.composite
def fleets(draw: st.DrawFn, most: int = 6) -> list[Device]:
    kinds = draw(st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(3, 8)), min_size=1, max_size=most))
    return [Device(f"w{number}", kind, memory) for number, (kind, memory) in enumerate(kinds)]


def used_bytes(chosen: list[Option]) -> int:
    weights: dict[str, int] = {}
    for option in chosen:
        weights.update(option.weights)
    return sum(weights.values()) + max((option.working_bytes for option in chosen), default=0)


def present(devices: list[Device], placement: Placement) -> list[Device]:
    """The devices after the placement was carried out and everything was loaded."""
    found = []
    for device in devices:
        own = [role for role in placement.roles[device.name] if role.share > 0]
        holds: set[str] = set()
        for role in own:
            if len(holds | role.option.weights.keys()) <= device.memory_bytes:
                holds |= role.option.weights.keys()
        runs = tuple((role.job, role.stage) for role in own)
        found.append(Device(device.name, device.device_class, device.memory_bytes, frozenset(holds), runs))
    return found


@given(works(), fleets())
@settings(max_examples=60, deadline=None)
def test_memory_time_and_work_are_respected(load: list[StageWork], devices: list[Device]) -> None:
    placement = place(load, devices)
    by_stage: dict[tuple[str, str], float] = defaultdict(float)
    for device in devices:
        roles = placement.roles[device.name]
        own = [role for role in roles if role.share > 0]
        assert all(used_bytes([role.option]) <= device.memory_bytes for role in roles)
        if used_bytes([role.option for role in own]) <= device.memory_bytes:
            assert used_bytes([role.option for role in roles]) <= device.memory_bytes, "help must fit beside it"
        else:
            assert roles == tuple(own), "who takes turns has no room to help"
        assert sum(role.share for role in roles) <= 1 + 1e-6
        for role in own:
            by_stage[role.job, role.stage] += role.share / role.option.seconds_per_item
    kinds = {(device.device_class, device.memory_bytes) for device in devices}
    for work in load:
        able = any(used_bytes([option]) <= memory for kind, memory in kinds for option in work.options.get(kind, ()))
        assert able == ((work.job, work.stage) not in placement.impossible)
        if able:
            assert by_stage[work.job, work.stage] > 0, "a stage with work starves"
            promised = work.items / placement.seconds[work.job]
            assert by_stage[work.job, work.stage] >= promised * (1 - 1e-5)
    for job, seconds in placement.seconds.items():
        assert seconds > 0 and placement.bound_seconds[job] > 0


@given(works(jobs=1, most=3, load=st.just(0.0)), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_never_worse_than_any_split_into_whole_workers(load: list[StageWork], count: int) -> None:
    devices = [Device(f"w{number}", "fast", 8) for number in range(count)]
    best = math.inf
    for split in itertools.product(range(len(load)), repeat=count):
        rates = [0.0] * len(load)
        for stage in split:
            rates[stage] += 1 / min(option.seconds_per_item for option in load[stage].options["fast"])
        best = min(best, max(w.items / rate if rate else math.inf for w, rate in zip(load, rates, strict=True)))
    assert place(load, devices).seconds["job 0"] <= best * (1 + 1e-6)


@given(works(jobs=1, most=3, load=st.just(0.0)), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_whole_models_that_fit_are_never_beaten_by_what_is_chosen(load: list[StageWork], count: int) -> None:
    devices = [Device(f"w{number}", "fast", 100) for number in range(count)]
    item_seconds = sum(min(option.seconds_per_item for option in work.options["fast"]) for work in load)
    placement = place(load, devices)
    assert math.isclose(placement.seconds["job 0"], load[0].items * item_seconds / count, rel_tol=1e-4)


@given(works(jobs=3, most=3, load=st.just(0.0)), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_no_job_is_slower_than_on_its_part_of_the_fleet(load: list[StageWork], count: int) -> None:
    devices = [Device(f"w{number}", "fast", 100) for number in range(count)]
    placement = place(load, devices)
    weights = {work.job: work.weight for work in load}
    for job, weight in weights.items():
        work_seconds = sum(w.items * w.options["fast"][0].seconds_per_item for w in load if w.job == job)
        alone = work_seconds / (count * weight / sum(weights.values()))
        assert placement.seconds[job] <= alone * 1.01


@given(works(jobs=2, most=4), st.integers(1, 2), st.integers(3, 8))
@settings(max_examples=40, deadline=None)
def test_more_stages_than_workers(load: list[StageWork], count: int, memory: int) -> None:
    devices = [Device(f"w{number}", "fast", memory) for number in range(count)]
    placement = place(load, devices)
    served = {(role.job, role.stage) for roles in placement.roles.values() for role in roles if role.share > 0}
    assert served == {(work.job, work.stage) for work in load}
    assert all(math.isfinite(seconds) for seconds in placement.seconds.values())


@given(works(jobs=1, load=st.just(0.0)), fleets(), st.tuples(st.sampled_from(CLASSES), st.integers(3, 8)))
@settings(max_examples=60, deadline=None)
def test_a_worker_more_is_never_slower(load: list[StageWork], devices: list[Device], more: tuple[str, int]) -> None:
    before = place(load, devices)
    after = place(load, [*devices, Device("more", *more)])
    for job, seconds in before.seconds.items():
        if len(after.impossible) == len(before.impossible):
            assert after.seconds[job] <= seconds * 1.001


@given(works(), fleets())
@settings(max_examples=60, deadline=None)
def test_once_placed_nothing_moves(load: list[StageWork], devices: list[Device]) -> None:
    first = place(load, devices)
    again = place(load, present(devices, first))
    if again.policy not in ("as it is", "none"):
        assert again.score > again.stay_score * 1.03
        third = place(load, present(devices, again))
        assert third.policy == "as it is" or third.score > third.stay_score * 1.03
    # What turns take of the time counts until an end that loads put off: a little more of it once they are done.
    assert again.score >= first.score * (1 - 2e-3)


def test_no_workers_no_work_and_nothing_possible() -> None:
    work = StageWork("a", "denoise", 10, {"fast": [Option(1.0, 1, {"dit": 10})]})
    assert place([work], []).roles == {}
    assert place([], [Device("w")]).roles == {"w": ()}
    placement = place([work], [Device("small", "fast", 5)])
    assert placement.impossible == (("a", "denoise"),) and placement.roles == {"small": ()}


def test_a_single_worker_has_every_stage() -> None:
    load = [StageWork("a", stage, 100, {"cpu": [Option(1.0, 1, {stage: 1}, 0, 2.0)]}) for stage in STAGES]
    placement = place(load, [Device("only", "cpu", 1)])
    assert {role.stage for role in placement.roles["only"]} == set(STAGES)
    assert math.isclose(sum(role.share for role in placement.roles["only"]), 1, rel_tol=0.05)


def test_what_fits_nowhere_as_a_whole_is_streamed_and_nothing_beside_it() -> None:
    def roles(memory: int) -> dict[str, bool]:
        load = [
            StageWork("a", stage, 1000, {"gpu": ways(Option(1.0, 4, {stage: size}, 1, 0.5), {stage: 2}, "gpu")})
            for stage, size in (("encode", 3), ("denoise", 9))
        ]
        return {role.stage: role.option.streamed for role in place(load, [Device("gpu", "gpu", memory)]).roles["gpu"]}

    assert roles(13) == roles(10) == {"encode": False, "denoise": False}, "side by side, and in turns"
    assert roles(9) == {"encode": False, "denoise": True}
    assert roles(2) == {}


def test_two_jobs_share_what_is_streamed() -> None:
    def ways_of(name: str) -> list[Option]:
        return ways(Option(1.0, 1, {name: 9}), {name: 2}, "gpu")

    whole, streamed = ways_of("dit")
    assert fits([streamed, streamed], 4) and not fits([streamed, ways_of("other")[0]], 40)
    assert load_seconds([replace(streamed, load_seconds=3.0)], frozenset({"dit"})) == 0, "whole is more than streamed"
    assert load_seconds([replace(whole, load_seconds=3.0)], frozenset({"dit (streamed)"})) == 3.0
    load = [StageWork(job, "denoise", 100, {"gpu": ways_of("dit")}) for job in ("a", "b")]
    assert {role.job for role in place(load, [Device("w", "gpu", 4)]).roles["w"] if role.share > 0} == {"a", "b"}


def test_a_cpu_streams_nothing() -> None:
    whole = Option(1.0, 1, {"dit": 9})
    assert ways(whole, {"dit": 2}, "cpu") == ways(whole, {}, "gpu") == [whole]
    assert [option.streamed for option in ways(whole, {"dit": 2}, "gpu")] == [False, True]
    slow = ways(whole, {"dit": 2}, "gpu", passing_bytes=2 * LINK_BYTES_PER_SECOND)
    assert usable(slow, 9)[0].seconds_per_item == 1.0
    assert usable(slow, 3)[0].seconds_per_item == pytest.approx(2.0 * 6 / 9), "what does not fit has to pass by"
    assert usable(slow, 8)[0].seconds_per_item == 1.0, "beside the computing"
    large, small = (usable(ways(whole, {"dit": 2}, "gpu"), memory) for memory in (9, 8))
    assert [option.streamed for option in large] == [False] and [option.streamed for option in small] == [True]


def test_weights_divide_the_fleet() -> None:
    load = [StageWork(job, "denoise", 1000, {"cpu": [Option(1.0)]}, weight) for job, weight in (("a", 1.0), ("b", 3.0))]
    placement = place(load, [Device(f"w{number}") for number in range(8)])
    shares: dict[str, float] = defaultdict(float)
    for roles in placement.roles.values():
        for role in roles:
            shares[role.job] += role.share
    assert math.isclose(shares["a"], 2, abs_tol=0.1) and math.isclose(shares["b"], 6, abs_tol=0.1)


def test_slow_workers_get_what_they_are_least_slow_at() -> None:
    flow = best_flow([Group(1, {0: 1.0, 1: 1.0}), Group(1, {0: 10.0, 1: 1.5})], [Demand("a", 10), Demand("a", 10)])
    assert flow.shares[1].get(0, 0.0) == 0.0


def test_a_small_gain_moves_nobody() -> None:
    def load(denoise: float) -> list[StageWork]:
        seconds = {"encode": 1.0, "denoise": denoise}
        return [
            StageWork("a", stage, 10_000, {"cpu": [Option(value, 1, {stage: 1}, 0, 1.0)]})
            for stage, value in seconds.items()
        ]

    devices = [Device(f"w{number}", "cpu", 1) for number in range(8)]
    devices = present(devices, place(load(3.0), devices))
    assert place(load(3.05), devices).policy == "as it is"
    assert place(load(1.0), devices).policy != "as it is"


@given(st.integers(1, 400), st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 20))
@settings(max_examples=200, deadline=None)
def test_towards_the_end_nobody_loads_what_ends_before_it_is_there(
    items: int, ready: int, others: int, load: float
) -> None:
    table = {"fast": options(0.15, "decode", 1, load, False)}
    names = ["decode"] * ready + ["denoise"] * others
    devices = [
        Device(f"w{number}", "fast", 1, frozenset({name}), (("job", name),)) for number, name in enumerate(names)
    ]
    work = StageWork("job", "denoise", 0, {"fast": options(0.4, "denoise", 1, load, False)})
    placement = place([work, StageWork("job", "decode", items, table)], devices)
    alone_seconds = items * 0.15 / ready
    if alone_seconds < load:
        assert not any(placement.roles[device.name] for device in devices[ready:]), "neither roles nor help"
    elif alone_seconds > 2 * load + 0.05 * alone_seconds:
        assert all(placement.roles[device.name] for device in devices), "everyone is worth the load"


def test_a_stage_of_next_to_nothing_is_done_too() -> None:
    little = StageWork("job", "encode", 1, {"fast": options(9e-5, "encode", 1, 0.0, False)})
    much = StageWork("job", "denoise", 2000, {"fast": options(1.1, "denoise", 1, 0.0, False)})
    placement = place([little, much], [Device("w0", "fast", 1)])
    assert {role.stage for role in placement.roles["w0"] if role.share > 0} == {"encode", "denoise"}


def test_a_long_load_that_somebody_must_take_is_part_of_the_forecast() -> None:
    loads = {"a": 60.0, "b": 10.0, "c": 10.0}
    work = [StageWork("job", name, 20, {"fast": options(1.0, name, 1, load, False)}) for name, load in loads.items()]
    placement = place(work, [Device(f"w{number}", "fast", 1) for number in range(4)])
    assert 30 < placement.seconds["job"] < 200, "not for ever"
