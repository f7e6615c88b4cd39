"""Other ways to give roles to workers, as deciders for ``dfdask.simulate``: every worker has one stage at a time.

Each is given more than its original has, so that what is compared is the rule: it knows the costs as dfdask does,
begins at the best split by its own rule, and what it does not scale is tried both ways.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from dfdask.controller import Controller, Decision
from dfdask.dispatch import Kind, Seat
from dfdask.placement import Placement
from dfdask.simulate import Simulation

RESTART_SECONDS = 5.0
"""A new Python process with torch and a CUDA context, before any weight is loaded."""
_NO_PLACEMENT = Placement({}, "rival", {}, {}, (), 0.0, 0.0)

Counts = Mapping[Kind, int]


class OneStageEach:
    """Keeps who runs what. ``restart_seconds`` is what a change of stage costs beside loading weights."""

    restart_seconds = 0.0

    def __init__(self) -> None:
        self.simulation: Simulation | None = None
        self._roles: dict[str, Kind | None] = {}

    def __call__(self, controller: Controller, now: float) -> Decision:
        before = dict(self._roles)
        work = {(one.job, one.stage): one for one in controller.work()}
        seconds = {kind: next(iter(one.options.values()))[0].seconds_per_item for kind, one in work.items()}
        left = {kind: one.items for kind, one in work.items()}
        if not self._roles:
            names = list(self.simulation.outcome.busy_seconds)
            self._roles = dict(zip(names, _spread(self.begin(seconds, left, len(names))), strict=True))
        else:
            self.move(seconds, left, now)
        seats = {
            name: Seat((kind,) if kind else ()) for name, kind in self._roles.items() if before.get(name, ()) != kind
        }
        return Decision(seats, {}, _NO_PLACEMENT)

    def begin(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], workers: int) -> Counts:
        return max_min(seconds, left, workers)

    def move(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], now: float) -> None:
        """Change ``_roles`` or not."""

    def counts(self) -> Counter[Kind]:
        return Counter(kind for kind in self._roles.values() if kind)

    def _become(self, counts: Counts) -> None:
        """Other counts with as few moves as possible."""
        spare = self.counts()
        spare.subtract(counts)
        wanted = [kind for kind, surplus in spare.items() for _ in range(-surplus)]
        for name, kind in self._roles.items():
            if wanted and (kind is None or spare[kind] > 0):
                if kind is not None:
                    spare[kind] -= 1
                self._roles[name] = wanted.pop()


class Static(OneStageEach):
    """One split for the whole run; the benchmark tries all of them and takes the best."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def begin(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], workers: int) -> Counts:
        return self._counts


class MaxMin(OneStageEach):
    """The best integer split for what is left, by predicted costs; moves at once, if that gains 3% or more."""

    def move(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], now: float) -> None:
        best = max_min(seconds, left, len(self._roles))
        if _end(seconds, left, best) * 1.03 < _end(seconds, left, self.counts()):
            self._become(best)


class Proportional(OneStageEach):
    """As DisagFusion (arXiv 2605.25550) and its code: workers in proportion to the predicted work in flight.

    Its averages of stage times are exponential; one worker a tick moves, after it drained, by a process restart
    and a reload of weights, then nothing for 15 s. Work in flight is read as all that is left of a stage: counting
    queues alone would send every worker to the encoder of a bulk job.
    """

    restart_seconds = RESTART_SECONDS
    cooldown_seconds = 15.0

    def __init__(self) -> None:
        super().__init__()
        self._moved = -math.inf

    def begin(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], workers: int) -> Counts:
        return proportional(seconds, left, workers)

    def move(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], now: float) -> None:
        if now - self._moved < self.cooldown_seconds:
            return
        target, present = proportional(seconds, left, len(self._roles)), self.counts()
        gaps = {kind: target.get(kind, 0) - present[kind] for kind in {*target, *present}}
        if any(gaps.values()):
            short, over = max(gaps, key=lambda kind: gaps[kind]), min(gaps, key=lambda kind: gaps[kind])
            self._become({**present, short: present[short] + 1, over: present[over] - 1})
            self._moved = now


class Threshold(OneStageEach):
    """As LightX2V's disaggregated controller (lightx2v/disagg/services/controller.py of commit f8aee98b).

    Every 5 s and with 30 s between two changes of a stage: a stage gets a worker from the idle ones if its workers
    are busy for more than 80% of the time or more than 2 tasks wait, the stage with the most waiting first; the
    least busy worker of a stage becomes idle below 20% with nothing waiting, unless it is the last. The code
    leaves the encoder alone; ``scale_first`` tries it the other way.
    """

    restart_seconds = RESTART_SECONDS
    poll_seconds, cooldown_seconds = 5.0, 30.0

    def __init__(self, scale_first: bool) -> None:
        super().__init__()
        self._scale_first = scale_first
        self._polled = 0.0
        self._changed: dict[Kind, float] = {}
        self._busy: dict[str, float] = {}

    def begin(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], workers: int) -> Counts:
        return proportional(seconds, left, workers)

    def move(self, seconds: Mapping[Kind, float], left: Mapping[Kind, float], now: float) -> None:
        elapsed = now - self._polled
        if elapsed < self.poll_seconds:
            return
        simulation = self.simulation
        busy = {name: simulation.busy_seconds(name) for name in self._roles}
        use = {name: (busy[name] - self._busy.get(name, 0.0)) / elapsed for name in self._roles}
        self._polled, self._busy = now, busy
        out: list[tuple[int, Kind]] = []
        firsts = {job: next(kind for kind in seconds if kind[0] == job) for job, _ in seconds}
        for kind in seconds:
            if now - self._changed.get(kind, -math.inf) < self.cooldown_seconds:
                continue
            if not self._scale_first and kind == firsts[kind[0]]:
                continue
            mine = [name for name, role in self._roles.items() if role == kind]
            waiting = simulation.waiting_tasks(kind)
            if waiting > 2 or (mine and sum(use[name] for name in mine) / len(mine) > 0.8):
                out.append((waiting, kind))
            least = min(mine, key=lambda name: use[name], default=None)
            if least is not None and use[least] < 0.2 and len(mine) > 1 and not waiting:
                self._roles[least], self._changed[kind] = None, now
        idle = next((name for name, role in self._roles.items() if role is None), None)
        if out and idle is not None:
            _, kind = max(out)
            self._roles[idle], self._changed[kind] = kind, now


class NoRoles(OneStageEach):
    """Plain Dask: every worker runs whatever comes, later stages first."""

    def __call__(self, controller: Controller, now: float) -> Decision:
        return Decision({}, {}, _NO_PLACEMENT)


def splits(kinds: Sequence[Kind], workers: int) -> Iterator[dict[Kind, int]]:
    """All ways to give each stage at least one worker."""
    for cuts in itertools.combinations(range(1, workers), len(kinds) - 1):
        edges = (0, *cuts, workers)
        yield {kind: b - a for kind, a, b in zip(kinds, edges, edges[1:], strict=False)}


def max_min(seconds: Mapping[Kind, float], left: Mapping[Kind, float], workers: int) -> dict[Kind, int]:
    """The split that ends first; a worker more always goes to the stage that would end last (which is optimal)."""
    counts = dict.fromkeys((kind for kind in seconds if left[kind] > 0), 0)
    for _ in range(workers if counts else 0):
        last = max(counts, key=lambda kind: left[kind] * seconds[kind] / counts[kind] if counts[kind] else math.inf)
        counts[last] += 1
    return counts


def proportional(seconds: Mapping[Kind, float], left: Mapping[Kind, float], workers: int) -> dict[Kind, int]:
    """One worker each, the others in proportion to the work left, the largest remainders first."""
    work = {kind: left[kind] * seconds[kind] for kind in seconds if left[kind] > 0}
    if not work:
        return {}
    spare = workers - len(work)
    parts = {kind: spare * one / sum(work.values()) for kind, one in work.items()}
    counts = {kind: 1 + math.floor(part) for kind, part in parts.items()}
    for kind in sorted(parts, key=lambda kind: math.floor(parts[kind]) - parts[kind])[: workers - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _spread(counts: Counts) -> list[Kind]:
    return [kind for kind, count in counts.items() for _ in range(count)]


def _end(seconds: Mapping[Kind, float], left: Mapping[Kind, float], counts: Counts) -> float:
    return max(
        (left[kind] * seconds[kind] / counts[kind] if counts.get(kind) else math.inf for kind in seconds if left[kind]),
        default=0.0,
    )
