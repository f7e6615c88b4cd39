"""Stragglers: slow and fast workers are told from their peers, one outlier or a change of all is nobody's fault."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask.stragglers import Stragglers

POOL = ("model", "denoise", "h100")
LOWEST, HIGHEST = 1.25**-4, 1.25**8


def feed(stragglers: Stragglers, speeds: dict[str, float], rounds: int, noise: float = 0.0, seed: int = 0) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        for worker, seconds in speeds.items():
            stragglers.observe(POOL, worker, seconds * math.exp(chance.gauss(0, noise)))


@pytest.mark.parametrize("slow", [1.6, 2.0, 3.0])
def test_a_slow_worker_is_known_to_within_a_step(slow: float) -> None:
    stragglers = Stragglers()
    feed(stragglers, {"a": 1.0, "b": 1.0, "c": 1.0, "slow": slow}, 30)
    assert slow / 1.25 < stragglers.factor("slow") < slow * 1.25
    assert [stragglers.factor(name) for name in "abc"] == [1.0] * 3


def test_a_fast_worker_is_known_too() -> None:
    stragglers = Stragglers()
    feed(stragglers, {"a": 1.0, "b": 1.0, "c": 1.0, "fast": 0.5}, 30)
    assert stragglers.level("fast") < 0 and 0.4 < stragglers.factor("fast") < 0.65


def test_noise_alone_makes_no_straggler() -> None:
    stragglers = Stragglers()
    feed(stragglers, dict.fromkeys("abcdef", 1.0), 200, noise=0.1)
    assert {stragglers.level(name) for name in "abcdef"} == {0}


def test_one_outlier_makes_no_straggler() -> None:
    stragglers = Stragglers()
    feed(stragglers, dict.fromkeys("abc", 1.0), 10)
    stragglers.observe(POOL, "a", 100.0)
    feed(stragglers, dict.fromkeys("abc", 1.0), 10)
    assert stragglers.level("a") == 0


def test_tasks_that_disagree_make_no_straggler() -> None:
    stragglers = Stragglers()
    for number in range(60):
        feed(stragglers, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.5 if number % 3 else 2.0}, 1)
        assert stragglers.level("d") == 0


def test_a_change_of_all_costs_at_once_makes_no_straggler() -> None:
    stragglers = Stragglers()
    feed(stragglers, dict.fromkeys("abcd", 1.0), 20)
    feed(stragglers, dict.fromkeys("abcd", 5.0), 20)
    assert {stragglers.level(name) for name in "abcd"} == {0}


@pytest.mark.parametrize("peers_every", [0, 10, 5])
def test_a_change_of_costs_that_one_worker_sees_first_is_not_its_fault(peers_every: int) -> None:
    stragglers = Stragglers()
    feed(stragglers, dict.fromkeys("abcw", 1.0), 20)
    for number in range(60):  # it alone has the role by now; others help out now and then
        stragglers.observe(POOL, "w", 6.0)
        if peers_every and number % peers_every == peers_every - 1:
            stragglers.observe(POOL, "abc"[number % 3], 6.0)
        assert stragglers.level("w") == 0


def test_two_workers_are_too_few_to_say_who_is_slow() -> None:
    stragglers = Stragglers()
    feed(stragglers, {"a": 1.0, "b": 4.0}, 50)
    assert stragglers.factor("a") == stragglers.factor("b") == 1.0


def test_pools_are_not_compared() -> None:
    stragglers = Stragglers()
    for _ in range(30):
        for worker in "abc":
            stragglers.observe("quick", worker, 0.1)
        for worker in "def":
            stragglers.observe("long", worker, 9.0)
    assert {stragglers.level(worker) for worker in "abcdef"} == {0}


def test_a_worker_that_is_mended_is_like_the_others_again() -> None:
    stragglers = Stragglers()
    feed(stragglers, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.5}, 30)
    assert stragglers.level("d") > 0
    feed(stragglers, dict.fromkeys("abcd", 1.0), 30)
    assert stragglers.factor("d") == 1.0


def test_a_worker_that_left_is_forgotten() -> None:
    stragglers = Stragglers()
    feed(stragglers, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.0}, 30)
    stragglers.forget("d")
    assert stragglers.factor("d") == 1.0
    stragglers.observe(POOL, "d", 3.0)
    assert stragglers.factor("d") == 1.0, "one task of a new worker at that address is no proof"


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_what_is_no_duration_is_ignored(seconds: float) -> None:
    stragglers = Stragglers()
    for _ in range(20):
        for worker in "abcd":
            stragglers.observe(POOL, worker, seconds if worker == "d" else 1.0)
    assert {stragglers.level(worker) for worker in "abcd"} == {0}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xy"), st.floats(1e-6, 1e6)), max_size=300))
def test_the_factor_stays_within_its_bounds(observed: list[tuple[str, str, float]]) -> None:
    stragglers = Stragglers()
    for worker, pool, seconds in observed:
        stragglers.observe(pool, worker, seconds)
        assert LOWEST * 0.999 < stragglers.factor(worker) < HIGHEST * 1.001
    assert stragglers.factor("nobody") == 1.0


@pytest.mark.parametrize(("slow", "factor"), [(1e4, HIGHEST), (1e-4, LOWEST)])
def test_the_worst_is_told_as_the_bound(slow: float, factor: float) -> None:
    stragglers = Stragglers()
    feed(stragglers, {"a": 1.0, "b": 1.0, "c": 1.0, "d": slow}, 20)
    assert stragglers.factor("d") == pytest.approx(factor)


@given(st.floats(0.01, 100.0), st.floats(0.1, 10.0))
def test_the_unit_does_not_matter(unit: float, slow: float) -> None:
    one, other = Stragglers(), Stragglers()
    feed(one, {"a": 1.0, "b": 1.0, "c": 1.0, "d": slow}, 15, noise=0.05)
    feed(other, {"a": unit, "b": unit, "c": unit, "d": slow * unit}, 15, noise=0.05)
    assert abs(one.level("d") - other.level("d")) <= 1  # where rounding decides
