"""How fast a fleet can finish its jobs when work flows like water: one linear program.

Time is shared without limit between the stages that a group of workers may run; rounding to real workers is
``dfdask.placement``'s part. The programme is max-min: no job can finish a larger part of its fair share without
another one finishing less of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfdask.linear import Entry, minimum

_LEFTOVER = 1e-3


@dataclass(frozen=True, slots=True)
class Demand:
    """What is left of one stage of one job; ``weight`` is the job's, the same for all its stages."""

    job: str
    items: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Group:
    """Workers that may run the same demands equally fast: ``seconds`` an item, by the demand's place."""

    workers: float
    seconds: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Flow:
    """``shares[group][demand]`` is worker time a second; ``seconds`` until each job ends, if nothing changes.

    ``score`` is what was maximised: it compares flows of the same demands.
    """

    shares: tuple[dict[int, float], ...]
    seconds: dict[str, float]
    score: float


def best_flow(groups: Sequence[Group], demands: Sequence[Demand], fastest: Mapping[int, float] | None = None) -> Flow:
    """The max-min flow; a demand of no items is left out, and so is one that no group can run.

    A job's fair share is worker time by its weight; its work is counted in the ``fastest`` seconds an item that
    there are for each stage. Given, these may name demands that no group runs: such jobs do not advance. All
    stages of a job advance at the rate of the slowest, so none gets more than it needs.
    """
    if fastest is None:
        fastest = fastest_seconds(groups, demands)
    work: dict[str, float] = {}
    for place, seconds in fastest.items():
        job = demands[place].job
        work[job] = work.get(job, 0.0) + demands[place].items * seconds
    jobs = {job: column for column, job in enumerate(work)}
    edges = [
        (number, place, fastest[place] / seconds)
        for number, group in enumerate(groups)
        if group.workers > 0
        for place, seconds in group.seconds.items()
        if place in fastest
    ]
    if not edges:
        return Flow(tuple({} for _ in groups), {}, 0.0)
    solution = _solve(groups, demands, fastest, work, jobs, edges)
    shares: tuple[dict[int, float], ...] = tuple({} for _ in groups)
    for (number, place, _), amount in zip(edges, solution, strict=False):
        if amount > 1e-9:
            shares[number][place] = float(amount)
    speeds = solution[len(edges) : -1]
    ends = {job: _quotient(work[job], float(speeds[column])) for job, column in jobs.items()}
    return Flow(shares, ends, float(solution[-1] + _LEFTOVER * speeds.sum()))


def fastest_seconds(groups: Sequence[Group], demands: Sequence[Demand]) -> dict[int, float]:
    """Of every demand that has items and a group to run it, in the demands' order."""
    fastest: dict[int, float] = {}
    for group in groups:
        if group.workers > 0:
            for place, seconds in group.seconds.items():
                if demands[place].items > 0:
                    fastest[place] = min(seconds, fastest.get(place, seconds))
    return dict(sorted(fastest.items()))


def _solve(
    groups: Sequence[Group],
    demands: Sequence[Demand],
    fastest: Mapping[int, float],
    work: Mapping[str, float],
    jobs: Mapping[str, int],
    edges: Sequence[tuple[int, int, float]],
) -> NDArray[np.float64]:
    """Columns: worker time on each edge, each job's speed (worker time of the fastest a second), the least share."""
    stage_rows = {place: len(groups) + number for number, place in enumerate(fastest)}
    job_rows = {job: len(groups) + len(stage_rows) + column for job, column in jobs.items()}
    least = len(edges) + len(jobs)
    entries: list[Entry] = []
    for column, (number, place, speed) in enumerate(edges):
        entries += [(number, column, 1.0), (stage_rows[place], column, -speed)]
    for place, row in stage_rows.items():
        demand = demands[place]
        part = demand.items * fastest[place] / work[demand.job]
        entries.append((row, len(edges) + jobs[demand.job], part))
    weights = {demand.job: demand.weight for demand in demands}
    for job, row in job_rows.items():
        entries += [(row, len(edges) + jobs[job], -1.0), (row, least, weights[job])]
    limits = np.zeros(len(groups) + len(stage_rows) + len(job_rows))
    limits[: len(groups)] = [group.workers for group in groups]
    gain = np.zeros(least + 1)
    gain[len(edges) : least] = -_LEFTOVER
    gain[least] = -1
    solution = minimum(gain, entries, limits)
    if solution is None:
        raise RuntimeError("nothing at all is a flow, and none was found")
    return solution


def _quotient(work: float, speed: float) -> float:
    return work / speed if speed > 0 else float("inf")
