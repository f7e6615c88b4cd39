"""How many workers of each class to have: a pure function of the work, the fleet, the limits and what was decided.

With a deadline: the cheapest fleet that meets it. Without: as many workers as pay off. In either case within the
minimum and maximum of each class, and never for more than the budget: a budget beats the minimum. More workers are
asked for at once; fewer are kept only when that has been right for a while, so that noise moves nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dfdask.fleets import Counts, Fleet, Forecast, Frontier, WorkerClass
from dfdask.placement import StageWork
from dfdask.words import duration

PATIENCE_SECONDS = 60.0
"""For so long a smaller fleet must have been right before workers leave."""
MARGIN = 0.1
"""Of a deadline, kept in reserve; and the part by which another fleet must be faster or cheaper."""
_HOUR = 3600.0

Reason = Literal["idle", "deadline", "late", "trial", "pays off", "probe", "impossible", "budget", "spent", "as it is"]
_WHY: Mapping[Reason, str] = {
    "idle": "nothing to do",
    "deadline": "the cheapest that meets the deadline",
    "late": "the fastest there may be, and the deadline will be missed",
    "trial": "the deadline will be missed with the classes that are known, and one more is tried",
    "pays off": "as many as pay off within the limits",
    "probe": "to learn how long a stage takes",
    "impossible": "no worker there may be can run what is left",
    "budget": "the cheapest, and the budget will not last until the end",
    "spent": "the budget is spent",
    "as it is": "no other fleet is much better",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What is left: seconds until the deadline, money until the budget is spent. None: no such limit.

    ``look_seconds`` pass until the next decision: what workers cost until then must be there.
    """

    deadline_seconds: float | None = None
    budget: float | None = None
    look_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class State:
    """What was right lately: (when, counts), oldest first."""

    wanted: tuple[tuple[float, tuple[tuple[str, int], ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """``counts`` workers by class should be there now; ``wanted`` is what is right without patience.

    ``seconds`` and ``cost`` are predicted from now to the end of the work for what is wanted, ``stay_seconds`` and
    ``stay_cost`` for the fleet as it is; where the budget ends first, ``cost`` is what is left of it.
    """

    counts: Counts
    wanted: Counts
    reason: Reason
    seconds: float
    cost: float
    stay_seconds: float
    stay_cost: float
    limits: Limits

    def explain(self) -> str:
        """One line with the numbers that made it."""
        fleet = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count) or "no workers"
        parts = [f"{fleet}: {_WHY[self.reason]}"]
        if self.reason not in ("idle", "spent", "probe", "impossible"):
            cost = f" for {self.cost:.2f}" if self.cost else ""
            stay = f"{duration(self.stay_seconds)} as it was" if math.isfinite(self.stay_seconds) else "never as it was"
            parts.append(f"ends in {duration(self.seconds)}{cost} ({stay})")
        if self.limits.deadline_seconds is not None and self.reason != "idle":
            parts.append(f"deadline in {duration(max(self.limits.deadline_seconds, 0))}")
        if self.limits.budget is not None:
            parts.append(f"budget {max(self.limits.budget, 0):.2f}")
        return "; ".join(parts)


def decide(
    works: Sequence[StageWork],
    classes: Sequence[WorkerClass],
    fleet: Fleet,
    limits: Limits,
    state: State,
    now_seconds: float,
    patience_seconds: float = PATIENCE_SECONDS,
) -> tuple[Decision, State]:
    """What to have now, and what to remember. A work without ``options`` for a class cannot run there.

    Where no class is known to run a work, one worker of a class is tried after the other, cheapest first; and so it
    is with classes that nobody knows where the others will miss the deadline.
    """
    frontier = Frontier(works, classes, fleet)
    stay = frontier.predict({kind.name: fleet.count(kind.name) for kind in classes})
    wanted, reason = _wanted(frontier, stay, limits)
    if reason == "spent" or (limits.budget is not None and reason == "budget"):
        counts, state = dict(wanted.counts), State()  # no patience with money
    else:
        counts, state = _patient(wanted.counts, fleet, state, now_seconds, patience_seconds)
        over = frontier.rate(counts) - frontier.rate(wanted.counts)
        if limits.budget is not None and wanted.cost + over * patience_seconds / _HOUR > limits.budget:
            counts, state = dict(wanted.counts), State()
    cost = min(wanted.cost, max(limits.budget, 0.0)) if limits.budget is not None else wanted.cost
    decision = Decision(counts, wanted.counts, reason, wanted.seconds, cost, stay.seconds, stay.cost, limits)
    return decision, state


def _patient(wanted: Counts, fleet: Fleet, state: State, now: float, patience: float) -> tuple[dict[str, int], State]:
    """More at once; fewer only down to the most that were wanted within the last ``patience`` seconds."""
    lately = [entry for entry in state.wanted if now - entry[0] < patience]
    counts = {}
    for name, count in wanted.items():
        most = max((dict(before).get(name, 0) for _, before in lately), default=count)
        counts[name] = max(count, min(most, fleet.count(name)))
    return counts, State((*lately, (now, tuple(wanted.items()))))


def _wanted(frontier: Frontier, stay: Forecast, limits: Limits) -> tuple[Forecast, Reason]:
    classes, fleet = frontier.classes, frontier.fleet
    least = {kind.name: kind.minimum for kind in classes}
    if not _affordable(frontier, least, limits):
        return Forecast(dict.fromkeys(least, 0), math.inf if frontier.works else 0.0, 0.0), "spent"
    if not frontier.works:
        return Forecast(least, 0.0, 0.0), "idle"
    if frontier.unknown():
        return _probe(frontier, stay, limits)
    allowed = all(kind.minimum <= fleet.count(kind.name) <= kind.maximum for kind in classes)
    if allowed and _is_good(frontier, stay, limits):
        return stay, "as it is"
    found = [one for one in frontier.candidates(limits.deadline_seconds is None) if math.isfinite(one.seconds)]
    if not found and limits.deadline_seconds is None:
        # Nobody is there and nobody pays off, but somebody has to do it: the cheapest.
        able = [one for one in frontier.candidates(False) if math.isfinite(one.seconds)]
        found = [min(able, key=lambda one: (frontier.weight(one), sum(one.counts.values())))] if able else []
    if not found:
        return Forecast(least, math.inf, 0.0), "impossible"
    affordable = [one for one in found if limits.budget is None or one.cost <= limits.budget]
    if not affordable:
        return _most_for_the_money(frontier, found, limits)
    reason: Reason = "pays off"
    if limits.deadline_seconds is None:
        chosen = _fastest(frontier, affordable)
    else:
        latest = limits.deadline_seconds * (1 - MARGIN)
        meeting = [one for one in affordable if one.seconds <= latest]
        if not meeting:
            return _trial(frontier, _fastest(frontier, affordable), limits)
        chosen, reason = min(meeting, key=lambda one: (frontier.weight(one), one.seconds)), "deadline"
    if allowed and _is_good(frontier, stay, limits, chosen):
        return stay, "as it is"
    return chosen, reason


def _fastest(frontier: Frontier, found: Sequence[Forecast]) -> Forecast:
    """Nearly the fastest: the cheapest among those that differ by less than two percent."""
    best = min(one.seconds for one in found)
    return min((one for one in found if one.seconds <= 1.02 * best), key=frontier.weight)


def _is_good(frontier: Frontier, stay: Forecast, limits: Limits, chosen: Forecast | None = None) -> bool:
    """The fleet as it is keeps all limits, and is neither much slower nor much dearer than the one to choose.

    Without ``chosen``, than any: then there is no need to search.
    """
    if limits.budget is not None and stay.cost > limits.budget:
        return False
    if limits.deadline_seconds is not None:
        if stay.seconds > limits.deadline_seconds * (1 - MARGIN):
            return False
    else:
        fastest = chosen or frontier.predict({kind.name: kind.maximum for kind in frontier.classes})
        if stay.seconds > fastest.seconds * (1 + MARGIN):
            return False
        if not stay.idle:
            return True  # it is fast because all of it works
    least = frontier.least_weight() if chosen is None else frontier.weight(chosen)
    return frontier.weight(stay) <= least * (1 + MARGIN)


def _probe(frontier: Frontier, stay: Forecast, limits: Limits) -> tuple[Forecast, Reason]:
    """What is there, and one worker of the cheapest class that nobody has yet; it may know after its first tasks."""
    fleet = frontier.fleet
    counts = {kind.name: min(max(fleet.count(kind.name), kind.minimum), kind.maximum) for kind in frontier.classes}
    absent = [k for k in frontier.classes if not counts[k.name] and k.maximum and not fleet.others.get(k.name)]
    if not any(fleet.starting.values()):  # else wait for what it will teach
        for kind in sorted(absent, key=lambda kind: frontier.weights[kind.name]):
            more = {**counts, kind.name: 1}
            if _affordable(frontier, more, limits):
                return Forecast(more, math.inf, 0.0), "probe"
    if not _affordable(frontier, counts, limits):
        counts = {kind.name: kind.minimum for kind in frontier.classes}
    busy = any(counts.values()) or any(fleet.others.values())
    return Forecast(counts, math.inf, 0.0), "probe" if busy else "impossible"


def _trial(frontier: Frontier, fastest: Forecast, limits: Limits) -> tuple[Forecast, Reason]:
    """The fastest fleet of known classes is late: it, and one worker of the cheapest class that is not known.

    One that starts is kept; who would come when all is over teaches nothing. The budget must have room for it until
    it could leave again.
    """
    starting = frontier.fleet.starting
    for kind in sorted(filter(frontier.is_untried, frontier.classes), key=lambda kind: frontier.weights[kind.name]):
        if min(starting.get(kind.name) or (kind.startup_seconds,)) >= fastest.seconds:
            continue
        counts = {**fastest.counts, kind.name: max(fastest.counts[kind.name], 1)}
        more = frontier.rate(counts) - frontier.rate(fastest.counts)
        cost = fastest.cost + more * (kind.startup_seconds + PATIENCE_SECONDS) / _HOUR
        if limits.budget is None or (cost <= limits.budget and _affordable(frontier, counts, limits)):
            return Forecast(counts, fastest.seconds, cost), "trial"
    return fastest, "late"


def _most_for_the_money(frontier: Frontier, found: Sequence[Forecast], limits: Limits) -> tuple[Forecast, Reason]:
    """No fleet can end the work within the budget: the one that does most of it, as long as the money lasts."""
    lasting = [one for one in found if _affordable(frontier, one.counts, limits)]
    if not lasting:
        return Forecast({kind.name: 0 for kind in frontier.classes}, math.inf, 0.0), "spent"
    return min(lasting, key=lambda one: (one.cost, one.seconds)), "budget"


def _affordable(frontier: Frontier, counts: Counts, limits: Limits) -> bool:
    """Whether there is money for the start of the new workers, and for all of them until the next decision."""
    if limits.budget is None:
        return True
    started = sum(
        kind.price_per_hour * max(counts[kind.name] - frontier.fleet.count(kind.name), 0) * kind.startup_seconds
        for kind in frontier.classes
    )
    return limits.budget > 0 and started + frontier.rate(counts) * limits.look_seconds <= limits.budget * _HOUR
