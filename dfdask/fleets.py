"""Which fleets are worth considering for the work that is left: how long each takes, and what it costs. Pure.

For a horizon T, the fleet with the lowest price per hour that does all work within T is a small linear programme.
Solved for horizons from the fastest fleet's to the cheapest's and rounded, it gives the frontier of time against
cost. The seconds and the cost of each fleet on it are then predicted from its whole workers, late ones included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

from dfdask.capacity import usable
from dfdask.errors import SpecError
from dfdask.fluid import Group
from dfdask.linear import Entry, minimum
from dfdask.placement import StageWork

_STEP = 1.2
"""Between the horizons: fleets that differ by less are not told apart."""
_MOST_HORIZONS = 40
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class WorkerClass:
    """Equal workers: between ``minimum`` and ``maximum`` of them, each paid from when it is asked for.

    Raises SpecError.
    """

    name: str
    maximum: int
    minimum: int = 0
    price_per_hour: float = 0.0
    startup_seconds: float = 30.0
    memory_bytes: int = 0  # 0: not known, and no limit

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise SpecError(f"scale: the name of a class must be text, got {self.name!r}; write e.g. gpu")
        for what, count in (("min", self.minimum), ("max", self.maximum), ("memory", self.memory_bytes)):
            if not isinstance(count, Integral) or isinstance(count, bool):
                raise SpecError(f"scale: {self.name}: {what} must be a whole number, got {count!r}; write e.g. 2")
        if not 0 <= self.minimum <= self.maximum:
            raise SpecError(
                f"scale: {self.name}: needs 0 <= min <= max, got min {self.minimum} and max {self.maximum}; change one"
            )
        for what, value in (("price", self.price_per_hour), ("startup", self.startup_seconds)):
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and value >= 0):
                raise SpecError(
                    f"scale: {self.name}: {what} must be a number of at least 0, got {value!r}; write e.g. 0.5"
                )


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers by class: ``ready``; ``starting``, with the seconds until each is expected; ``others`` are not ours.

    Others work too, but cost nothing, count for no limit and are never stopped.
    """

    ready: Mapping[str, int] = field(default_factory=dict)
    starting: Mapping[str, Sequence[float]] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)

    def count(self, name: str) -> int:
        return self.ready.get(name, 0) + len(self.starting.get(name, ()))


Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Forecast:
    """A fleet of ``counts`` workers by class ends the work in ``seconds`` and costs ``cost`` until then.

    ``idle``: some have nothing to do, because the last micro-batches cannot be divided among all.
    """

    counts: Counts
    seconds: float
    cost: float
    idle: bool = False


class Frontier:
    """The work that is left, on any fleet of these classes, from the fleet that is there now."""

    def __init__(self, works: Sequence[StageWork], classes: Sequence[WorkerClass], fleet: Fleet) -> None:
        self.works = [work for work in works if work.items > 0]
        self.classes, self.fleet = classes, fleet
        self.seconds = {kind.name: self._seconds(kind) for kind in classes}
        priced = any(kind.price_per_hour > 0 for kind in classes)
        # Workers of no price at all are fewer rather than more; beside paid ones they come first.
        self.weights = {kind.name: kind.price_per_hour if priced else 1.0 for kind in classes}

    def _seconds(self, kind: WorkerClass) -> dict[int, float]:
        found = {}
        for place, work in enumerate(self.works):
            options = work.options.get(kind.name, ())
            if fitting := usable(options, kind.memory_bytes) if kind.memory_bytes else options:
                found[place] = max(min(option.seconds_per_item for option in fitting), 1e-6)
        return found

    def unknown(self) -> list[int]:
        """Works that nobody knows a time of, on any class."""
        known = set().union(*self.seconds.values()) if self.seconds else set()
        return [place for place in range(len(self.works)) if place not in known]

    def is_untried(self, kind: WorkerClass) -> bool:
        """Whether a class may be able to do work that nobody knows its time of, because it was never there.

        What is there has a time for all that it can do, if only a guess.
        """
        if not kind.maximum or self.fleet.ready.get(kind.name) or self.fleet.others.get(kind.name):
            return False
        return any(
            not work.options.get(kind.name)
            and (not kind.memory_bytes or any(usable(options, kind.memory_bytes) for options in work.options.values()))
            for work in self.works
        )

    def rate(self, counts: Counts) -> float:
        """Price of an hour."""
        return sum(kind.price_per_hour * counts.get(kind.name, 0) for kind in self.classes)

    def weight(self, forecast: Forecast) -> float:
        """What a fleet is chosen by: its cost, or worker hours where nothing has a price."""
        workers = sum(self.weights[name] * count for name, count in forecast.counts.items())
        return workers * forecast.seconds / _HOUR if workers else 0.0

    def predict(self, counts: Counts) -> Forecast:
        """All workers of ``counts`` work until the end; those that are not ready come when they are expected."""
        groups: list[tuple[float, Group]] = []
        for kind in self.classes:
            delays = self._delays(kind)[: counts.get(kind.name, 0)]
            delays += [kind.startup_seconds] * (counts.get(kind.name, 0) - len(delays))
            ready = sum(delay <= 0 for delay in delays) + self.fleet.others.get(kind.name, 0)
            late = [delay for delay in delays if delay > 0]
            seconds = self.seconds[kind.name]
            groups.append((0.0, Group(ready, seconds)))
            if late:
                groups.append((sum(late) / len(late), Group(len(late), seconds)))
        seconds_left, chain = self._makespan([entry for entry in groups if entry[1].workers and entry[1].seconds])
        end = max(seconds_left, chain)
        rate = self.rate(counts)
        return Forecast(dict(counts), end, rate * end / _HOUR if rate else 0.0, chain > seconds_left)

    def _delays(self, kind: WorkerClass) -> list[float]:
        """Of those that are there or were asked for, the first to be ready first."""
        starting = sorted(max(seconds, 1e-3) for seconds in self.fleet.starting.get(kind.name, ()))
        return [0.0] * self.fleet.ready.get(kind.name, 0) + starting

    def _makespan(self, groups: Sequence[tuple[float, Group]]) -> tuple[float, float]:
        """Seconds until all is done, if the workers of a group work from its delay on; and those of the longest chain.

        A linear programme as in ``dfdask.fluid``, all jobs as one. A group that would come when all is over counts
        for nothing; the programme cannot say so, so those are left out one after the other, the last to come first.
        """
        if not self.works:
            return 0.0, 0.0
        able = set().union(*(group.seconds for _, group in groups)) if groups else set()
        if len(able) < len(self.works):
            return math.inf, 0.0
        coming = sorted(groups, key=lambda entry: entry[0])
        best = math.inf
        while coming and len(set().union(*(group.seconds for _, group in coming))) == len(self.works):
            best = min(best, self._flow_seconds(coming))
            if best > coming[-1][0]:
                break
            coming.pop()
        return best, min(delay for delay, _ in groups) + self._chain_seconds(groups)

    def _flow_seconds(self, groups: Sequence[tuple[float, Group]]) -> float:
        workers = sum(group.workers for _, group in groups)
        if all(group.seconds is groups[0][1].seconds for _, group in groups):  # one class
            seconds = sum(work.items * groups[0][1].seconds[place] for place, work in enumerate(self.works))
            return (seconds + sum(delay * group.workers for delay, group in groups)) / workers
        edges = [(number, place) for number, (_, group) in enumerate(groups) for place in group.seconds]
        unit = self._least_seconds / workers  # so that all numbers are near one
        entries: list[Entry] = [(number, 0, -group.workers) for number, (_, group) in enumerate(groups)]
        for column, (number, place) in enumerate(edges, start=1):
            seconds = groups[number][1].seconds[place]
            entries.append((number, column, 1.0))
            entries.append((len(groups) + place, column, -unit / (seconds * self.works[place].items)))
        most = [-group.workers * delay / unit for delay, group in groups] + [-1.0] * len(self.works)
        found = minimum([1.0, *[0.0] * len(edges)], entries, most)
        if found is None:
            raise RuntimeError("every work has a class, and yet none can do them")
        return float(found[0]) * unit

    @property
    def _least_seconds(self) -> float:
        return sum(
            work.items * min(seconds[place] for seconds in self.seconds.values() if place in seconds)
            for place, work in enumerate(self.works)
        )

    def least_weight(self) -> float:
        """What no fleet can undercut: every stage where it is cheapest, nobody starting or waiting."""
        return (
            sum(
                work.items
                * min(self.weights[name] * seconds[place] for name, seconds in self.seconds.items() if place in seconds)
                for place, work in enumerate(self.works)
            )
            / _HOUR
        )

    def _chain_seconds(self, groups: Iterable[tuple[float, Group]]) -> float:
        """One micro-batch through all stages of a job cannot be divided among workers."""
        longest: dict[str, float] = {}
        for place, work in enumerate(self.works):
            fastest = min(group.seconds.get(place, math.inf) for _, group in groups)
            batch = min((option.batch for options in work.options.values() for option in options), default=1)
            longest[work.job] = longest.get(work.job, 0.0) + fastest * min(batch, work.items)
        return max(longest.values(), default=0.0)

    def candidates(self, pays_off: bool) -> list[Forecast]:
        """Fleets from the fastest to the cheapest, the present one and the smallest one among them.

        With ``pays_off`` only those whose new workers spend at least as long working as starting.
        """
        least = {kind.name: kind.minimum for kind in self.classes}
        most = {kind.name: kind.maximum for kind in self.classes}
        now = {k.name: min(max(self.fleet.count(k.name), k.minimum), k.maximum) for k in self.classes}
        found = {tuple(counts.values()): counts for counts in (now, least, most)}
        fastest = self.predict(most).seconds
        if math.isfinite(fastest):
            horizon = fastest
            for _ in range(_MOST_HORIZONS):
                parts = self._cheapest(horizon, pays_off)
                for whole in (math.ceil, round) if parts else ():
                    counts = {name: min(whole(part - 1e-6), most[name]) for name, part in parts.items()}
                    found.setdefault(tuple(counts.values()), counts)
                if parts and sum(math.ceil(part - 1e-6) for part in parts.values()) <= max(1, sum(least.values())):
                    break
                horizon *= _STEP
        forecasts = [self.predict(counts) for counts in found.values()]
        return [one for one in forecasts if not pays_off or one.counts == least or self._pays_off(one)]

    def _pays_off(self, forecast: Forecast) -> bool:
        return all(
            forecast.counts[kind.name] <= max(self.fleet.count(kind.name), kind.minimum)
            or forecast.seconds >= 2 * kind.startup_seconds
            for kind in self.classes
        )

    def _cheapest(self, horizon: float, pays_off: bool) -> dict[str, float]:
        """Workers by class, in parts, of the lowest price per hour that end the work within ``horizon`` seconds.

        Empty where none can. Columns: workers by class and readiness, then each class's worker time a second at each
        stage.
        """
        parts: list[tuple[WorkerClass, float, int]] = []  # class, the part of the horizon that each works, how many
        for kind in self.classes:
            delays = self._delays(kind)[: kind.maximum]
            late = [delay for delay in delays if delay > 0]
            new = kind.maximum - len(delays)
            if pays_off and horizon < 2 * kind.startup_seconds:
                new = max(kind.minimum - len(delays), 0)
            parts.append((kind, 1.0, len(delays) - len(late)))
            parts.append((kind, max(1 - sum(late) / len(late) / horizon, 0.0) if late else 0.0, len(late)))
            parts.append((kind, max(1 - kind.startup_seconds / horizon, 0.0), new))
        edges = [(kind, place) for kind in self.classes for place in self.seconds[kind.name]]
        entries: list[Entry] = []
        most: list[float] = []
        row_of = {kind.name: 2 * number for number, kind in enumerate(self.classes)}
        for kind in self.classes:  # no more work than workers, and no fewer workers than there must be
            most += [float(self.fleet.others.get(kind.name, 0)), -float(kind.minimum)]
        for column, (kind, part, _) in enumerate(parts):
            entries += [(row_of[kind.name], column, -part), (row_of[kind.name] + 1, column, -1.0)]
        for column, (kind, place) in enumerate(edges, start=len(parts)):  # all of the work
            rate = horizon / (self.seconds[kind.name][place] * self.works[place].items)
            entries += [(row_of[kind.name], column, 1.0), (len(most) + place, column, -rate)]
        most += [-1.0] * len(self.works)
        top = max(self.weights.values(), default=1.0) or 1.0
        price = [self.weights[kind.name] / top + 1e-4 for kind, *_ in parts]
        bounds = [float(count) for *_, count in parts] + [math.inf] * len(edges)
        found = minimum([*price, *[0.0] * len(edges)], entries, most, most=bounds)
        if found is None:
            return {}
        amounts = {kind.name: 0.0 for kind in self.classes}
        for (kind, *_), value in zip(parts, found, strict=False):
            amounts[kind.name] += float(value)
        return amounts
