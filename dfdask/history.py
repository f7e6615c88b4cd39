"""What the events of a run say: who ran what and when, what was decided and what came of it. Pure functions.

Input are the dicts that ``RunStore.events`` gives, of any age and any completeness: what is missing is None.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]
SAME_DECISION_SECONDS = 0.05  # roles that change so close to each other were decided together
_RATE_SECONDS = 30.0  # before and after a decision, at most
_PAUSE_SECONDS = 1.0  # what is shorter is no pause
_WORKED = ("TaskDone", "ShardWritten", "JobEnded")

Pauses = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A worker's time shares by stage before and after."""

    worker: str
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Decision:
    """Roles that changed together. Seconds that were left: by prediction if nothing had changed (``stay_seconds``) and
    with the change (``predicted_seconds``), and those that it took until the run was finished (later decisions
    included, pauses not), which is not known where it was stopped first and went on later.

    Items of the last stage per second in the time before and after, up to the next decision or half a minute.
    """

    when: float
    reason: str
    policy: str
    moves: tuple[Move, ...]
    stay_seconds: float | None
    predicted_seconds: float | None
    actual_seconds: float | None
    rate_before: float | None
    rate_after: float | None

    @property
    def predicted_gain_seconds(self) -> float | None:
        return _minus(self.stay_seconds, self.predicted_seconds)

    @property
    def actual_gain_seconds(self) -> float | None:
        """Against ``stay_seconds``, which is an estimate too: nobody ran the run without the change."""
        return _minus(self.stay_seconds, self.actual_seconds)


@dataclass(frozen=True, slots=True)
class Work:
    """Stage calls on one worker, one or a sum of several: from ``start`` to ``when``, ``seconds`` of them busy."""

    stage: str
    worker: str
    start: float
    when: float
    calls: int
    items: int
    seconds: float
    load_seconds: float
    predicted_seconds: float | None


@dataclass(frozen=True, slots=True)
class StageSum:
    """All calls of a stage. ``error`` is the mean of |predicted - measured| / measured over calls, or sums of them,
    weighted by their seconds."""

    name: str
    calls: int
    items: int
    seconds: float
    load_seconds: float
    predicted_item_seconds: float | None
    measured_item_seconds: float | None
    error: float | None


@dataclass(frozen=True, slots=True)
class History:
    """A run's events in order and in shape. Times are seconds since the epoch.

    ``pauses``: from the last work of one start of the run to the next start, in order.
    """

    events: tuple[Event, ...]
    began: float
    ended: float
    job_ended: float | None
    pauses: Pauses
    workers: tuple[str, ...]
    work: tuple[Work, ...]
    decisions: tuple[Decision, ...]
    stages: tuple[StageSum, ...]

    @classmethod
    def of(cls, events: Iterable[Event], stages: Sequence[str] = ()) -> History:
        """Of events in any order; ``stages`` as the run's chain has them."""
        told = sorted(events, key=lambda event: (float(event["when"]), str(event["event"]), str(event.get("worker"))))
        work = sorted(filter(None, map(_work, told)), key=lambda one: one.when)
        times = [float(event["when"]) for event in told]
        starts = [one.start for one in work]
        began = min(times + starts, default=0.0)
        ends = [event for event in told if event["event"] == "JobEnded"]
        ended = max(times, default=0.0)
        order = _order(work, stages)
        pauses = _pauses(told, work)
        return cls(
            events=tuple(told),
            began=began,
            ended=ended,
            job_ended=float(ends[-1]["when"]) if ends else None,
            pauses=pauses,
            workers=_workers(told, work),
            work=tuple(work),
            decisions=_decisions(told, work, order, began, ended, ends, pauses),
            stages=tuple(_sum(stage, [one for one in work if one.stage == stage]) for stage in order),
        )

    def of_kind(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event["event"] in kinds]

    @property
    def seconds(self) -> float:
        """From beginning to end without the pauses."""
        return self.at(self.ended)

    def at(self, when: float) -> float:
        """Seconds from the beginning to ``when`` without the pauses."""
        return _between(self.began, when, self.pauses)

    def presence(self) -> dict[str, list[tuple[float, float]]]:
        """When each worker was there: from joining (or its first work) to leaving, or the end of its last job."""
        came: dict[str, float] = {}
        there: dict[str, list[tuple[float, float]]] = {worker: [] for worker in self.workers}
        for event in self.of_kind("WorkerJoined", "WorkerLeft"):
            worker, when = str(event["worker"]), float(event["when"])
            if event["event"] == "WorkerJoined":
                came.setdefault(worker, when)
            elif worker in there:
                there[worker].append((came.pop(worker, self.began), when))
        first = {one.worker: one.start for one in reversed(self.work)}
        last = {one.worker: one.when for one in self.work}
        ends = [float(event["when"]) for event in self.of_kind("JobEnded")]
        for worker, spans in there.items():
            if worker in came or not spans:
                start = came.get(worker, first.get(worker, self.began))
                seen = max(start, last.get(worker, start))
                spans.append((start, next((end for end in ends if end >= seen), self.ended)))
        return there

    def rates(self, stage: str, bins: int) -> list[float]:
        """Items per second of ``stage`` in ``bins`` equal parts of ``seconds``."""
        width = max(self.seconds, 1e-9) / bins
        counts = [0.0] * bins
        for one in self.work:
            if one.stage == stage:
                for place, share in _spread(self.at(one.start), self.at(one.when), 0.0, width, bins):
                    counts[place] += one.items * share
        return [value / width for value in counts]

    def busy(self, bins: int) -> dict[str, list[dict[str, float]]]:
        """By worker, in equal parts of ``seconds``: the share that it spent in each stage."""
        width = max(self.seconds, 1e-9) / bins
        found: dict[str, list[dict[str, float]]] = {worker: [{} for _ in range(bins)] for worker in self.workers}
        for one in self.work:
            lane = found[one.worker]
            for place, share in _spread(self.at(one.start), self.at(one.when), 0.0, width, bins):
                lane[place][one.stage] = lane[place].get(one.stage, 0.0) + one.seconds * share / width
        return found


def roles_text(roles: Mapping[str, float]) -> str:
    """``denoise``, ``encode 25% + decode 75%``; who only helps out: ``(encode)``; nobody: ``nothing``."""
    own = {name: share for name, share in roles.items() if share > 0}
    if not own:
        return ", ".join(f"({name})" for name in roles) or "nothing"
    if len(own) == 1:
        return next(iter(own))
    return " + ".join(f"{name} {share:.0%}" for name, share in own.items())


def _work(event: Event) -> Work | None:
    if event["event"] != "TaskDone":
        return None
    predicted = event.get("predicted_seconds")
    seconds, when = float(event.get("seconds") or 0.0), float(event["when"])
    known = isinstance(predicted, (int, float)) and math.isfinite(predicted) and predicted > 0
    return Work(
        stage=str(event["stage"]),
        worker=str(event["worker"]),
        start=min(float(event.get("start") or when - seconds), when),
        when=when,
        calls=int(event.get("events", 1)),
        items=int(event.get("items") or 0),
        seconds=seconds,
        load_seconds=float(event.get("load_seconds") or 0.0),
        predicted_seconds=float(predicted) if known and predicted is not None else None,
    )


def _order(work: Sequence[Work], stages: Sequence[str]) -> list[str]:
    """The stages that were run, as in ``stages``, others as they were first done."""
    done = dict.fromkeys(one.stage for one in work)
    return [stage for stage in dict.fromkeys([*stages, *done]) if stage in done]


def _workers(events: Sequence[Event], work: Sequence[Work]) -> tuple[str, ...]:
    named = [str(event["worker"]) for event in events if event["event"] in ("WorkerJoined", "RolesChanged")]
    return tuple(dict.fromkeys([*named, *(one.worker for one in work)]))


def _sum(name: str, work: Sequence[Work]) -> StageSum:
    items = sum(one.items for one in work)
    seconds = sum(one.seconds for one in work)
    known = [one for one in work if one.predicted_seconds is not None and one.seconds > 0 and one.items]
    told = sum(one.items for one in known)
    off = sum(abs((one.predicted_seconds or 0.0) - one.seconds) for one in known)
    spent = sum(one.seconds for one in known)
    return StageSum(
        name=name,
        calls=sum(one.calls for one in work),
        items=items,
        seconds=seconds,
        load_seconds=sum(one.load_seconds for one in work),
        predicted_item_seconds=sum(one.predicted_seconds or 0.0 for one in known) / told if told else None,
        measured_item_seconds=seconds / items if items else None,
        error=off / spent if spent else None,
    )


def _decisions(
    events: Sequence[Event],
    work: Sequence[Work],
    stages: Sequence[str],
    began: float,
    ended: float,
    ends: Sequence[Event],
    pauses: Pauses,
) -> tuple[Decision, ...]:
    groups: list[list[Event]] = []
    for event in events:
        if event["event"] != "RolesChanged":
            continue
        last = groups[-1][-1] if groups else None
        together = last is not None and float(event["when"]) - float(last["when"]) <= SAME_DECISION_SECONDS
        if last is not None and together and event["reason"] == last["reason"]:
            groups[-1].append(event)
        else:
            groups.append([event])
    own = {str(event.get("run")) for event in events if event["event"] in ("JobStarted", "TaskDone")}
    times = [float(group[0]["when"]) for group in groups]
    finished = [one for one in work if stages and one.stage == stages[-1]]
    found = []
    for place, group in enumerate(groups):
        when = times[place]
        end: Event = next((end for end in ends if float(end["when"]) >= when), {})
        before = max(
            [began, when - _RATE_SECONDS, *times[max(place - 1, 0) : place], *(b for _, b in pauses if b <= when)]
        )
        after = min([ended, when + _RATE_SECONDS, *times[place + 1 : place + 2], *(a for a, _ in pauses if a >= when)])
        found.append(
            Decision(
                when=when,
                reason=str(group[0].get("reason") or ""),
                policy=str(group[0].get("policy") or ""),
                moves=tuple(Move(str(e["worker"]), _roles(e, "before", own), _roles(e, "after", own)) for e in group),
                # Who did nothing before could not have stayed with it.
                stay_seconds=_number(group[0].get("stay_seconds")) if any(e.get("before") for e in group) else None,
                predicted_seconds=_number(group[0].get("predicted_seconds")),
                actual_seconds=_between(when, end["when"], pauses) if end.get("reason") == "finished" else None,
                rate_before=_rate(finished, before, when),
                rate_after=_rate(finished, when, after),
            )
        )
    return tuple(found)


def _pauses(events: Sequence[Event], work: Sequence[Work]) -> Pauses:
    found = []
    last: float | None = None
    for event in events:
        when = float(event["when"])
        if event["event"] in _WORKED:
            last = when
        elif event["event"] == "JobStarted" and last is not None and when - last > _PAUSE_SECONDS:
            if not any(one.start < when < one.when for one in work):  # else another client was at it
                found.append((last, when))
            last = when
    return tuple(found)


def _between(start: float, stop: float, pauses: Pauses) -> float:
    """Seconds from one time to a later one without what there was of ``pauses``."""
    return stop - start - sum(max(min(stop, b) - max(start, a), 0.0) for a, b in pauses)


def _roles(event: Event, name: str, own: set[str]) -> dict[str, float]:
    """Shares by stage. The events say ``run/stage``; stages of other jobs stay recognisable."""
    found: dict[str, float] = {}
    for role, share in (event.get(name) or {}).items():
        run, _, stage = str(role).rpartition("/")
        label = stage if not run or run in own else f"{stage} of {run}"
        found[label] = found.get(label, 0.0) + float(share)
    return found


def _rate(work: Sequence[Work], start: float, stop: float) -> float | None:
    """Items a second between two times; None where that is too short to say."""
    if stop - start < 0.5:
        return None
    items = sum(one.items * sum(share for _, share in _spread(one.start, one.when, start, stop - start, 1))
                for one in work)  # fmt: skip
    return items / (stop - start)


def _spread(start: float, stop: float, began: float, width: float, bins: int) -> list[tuple[int, float]]:
    """How a span of time falls into bins of ``width`` seconds from ``began`` on: bin and share of the span."""
    if stop - start < 1e-9:
        place = math.floor((stop - began) / width)
        return [(min(place, bins - 1), 1.0)] if 0 <= stop - began <= width * bins else []
    first = max(math.floor((start - began) / width), 0)
    last = min(math.floor((stop - began) / width), bins - 1)
    parts: dict[int, float] = defaultdict(float)
    for place in range(first, last + 1):
        inside = min(stop, began + (place + 1) * width) - max(start, began + place * width)
        if inside > 0:
            parts[place] += inside / (stop - start)
    return list(parts.items())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
