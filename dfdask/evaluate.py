"""How good a run could have been: bounds that no schedule beats, to judge real and simulated ones by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from dfdask.fluid import Demand, Group, best_flow
from dfdask.linear import Entry, minimum

_ACCURACY = 1e-4


def lp_bound_seconds(items: int, groups: Sequence[Group]) -> float:
    """No schedule of ``items`` through all stages is faster: time is shared without loss, nothing waits or loads.

    ``groups`` are workers and their seconds an item by stage, numbered from 0; a stage that a group's workers
    cannot run is not in its table. Infinite where nobody can run one of the stages.
    """
    stages = {stage for group in groups for stage in group.seconds}
    demands = [Demand("job", items) for _ in range(max(stages, default=-1) + 1)]
    flow = best_flow(groups, demands)
    able = {stage for group in groups if group.workers > 0 for stage in group.seconds}
    return flow.seconds.get("job", 0.0) if able == set(range(len(demands))) else math.inf


def best_offline_seconds(
    costs: Sequence[float],
    items: int,
    workers: int,
    switch_seconds: float,
    memory_stages: int,
    loaded: bool = False,
) -> float:
    """A sound lower bound of the best schedule's seconds on equal workers, with all known in advance.

    ``costs`` are seconds an item by stage; a worker holds ``memory_stages`` of them, and bringing one there takes
    ``switch_seconds``. With ``loaded`` the first ones are there at the start, whichever are wanted. A worker of
    certain stages brings each there once or more, starts when the first item can have come to its earliest stage,
    and ends when what is left of its last item's way still fits. How many workers have which stages, and for how
    long, is the best of an integer programme. Raises ValueError for what is not an instance.
    """
    if not costs or min(costs) < 0 or items < 0 or workers < 1 or memory_stages < 1 or switch_seconds < 0:
        raise ValueError(
            "a bound needs stages, costs >= 0, items >= 0, workers >= 1, memory_stages >= 1 and switch_seconds >= 0, "
            f"got {costs}, {items}, {workers}, {memory_stages} and {switch_seconds}"
        )
    if not items:
        return 0.0
    stages = range(len(costs))
    sets = [chosen for size in (n + 1 for n in stages) for chosen in itertools.combinations(stages, size)]
    lost = []
    for chosen in sets:
        loads = max(len(chosen) - memory_stages, 0) if loaded else len(chosen)
        lost.append(loads * switch_seconds + sum(costs[: chosen[0]]) + sum(costs[chosen[-1] + 1 :]))
    work = items * np.array(costs)
    fastest = sum(costs) + (0.0 if loaded else switch_seconds)
    low = max(float(work.sum()) / workers, fastest)
    high = low + max(lost) + float(work.sum())  # one worker alone does it all in that time
    while high - low > _ACCURACY * low:
        middle = (low + high) / 2
        low, high = (low, middle) if _possible(middle, sets, lost, work, workers) else (middle, high)
    return low


def _possible(seconds: float, sets: list[tuple[int, ...]], lost: list[float], work: np.ndarray, workers: int) -> bool:
    """Whether some numbers of workers by set of stages have the time; columns: numbers, then time by set and stage."""
    pairs = [(number, stage) for number, chosen in enumerate(sets) for stage in chosen]
    columns, sums = len(sets) + len(pairs), 1 + len(sets)
    entries: list[Entry] = [(0, number, 1.0) for number in range(len(sets))]
    entries += [(1 + number, number, -max(seconds - seconds_lost, 0.0)) for number, seconds_lost in enumerate(lost)]
    for column, (number, stage) in enumerate(pairs, start=len(sets)):
        entries += [(1 + number, column, 1.0), (sums + stage, column, 1.0)]
    lower, upper = np.full(sums + len(work), -np.inf), np.full(sums + len(work), np.inf)
    upper[:sums] = [workers, *[0.0] * len(sets)]
    lower[sums:] = work * (1 - 1e-9)
    return minimum(np.zeros(columns), entries, upper, lower, whole=range(len(sets))) is not None
