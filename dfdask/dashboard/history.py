"""What happened lately on a cluster, bounded whatever its size: pure, fed by the sampler, drawn by the page."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Reversible

from dfdask.dashboard.records import (
    BIN_SECONDS,
    USES,
    Bar,
    Bin,
    Failure,
    Held,
    Mark,
    Picture,
    Point,
    Tail,
    Use,
)
from dfdask.events import (
    ClusterState,
    Event,
    ItemQuarantined,
    JobEnded,
    JobStarted,
    JobState,
    RolesChanged,
    ShardWritten,
    TaskDone,
    WorkerJoined,
    WorkerLeft,
    WorkerState,
)
from dfdask.words import duration

WINDOW_SECONDS = 300  # that the timeline shows
SHORTEST_SECONDS = 30
RATE_SECONDS = 60  # that items per second are a mean over
GAP_SECONDS = 0.3  # between two calls of a stage that are still drawn as one bar
BAR_SECONDS = 5.0  # the longest bar before a new one begins, so that it is drawn while it still grows
CALLS_A_LOOK = 10_000  # that are taken in, at most: the first look of a page finds many
ROLES_SHOWN = 3
POINTS_A_LOOK = 40  # of predicted against measured; more calls than that are thinned


class History:
    """Takes in states and events; all its fields are for reading."""

    def __init__(self) -> None:
        self.state: ClusterState | None = None
        self.memory_bytes = 0
        self.names: dict[str, str] = {}  # of runs, ended ones included
        self.labels: dict[str, str] = {}  # of workers by address, those that left included
        self.gone: dict[str, float] = {}  # when a worker left
        self.bars: Tail[Bar] = Tail(4000)
        self.marks: Tail[Mark] = Tail(400)
        self.points: Tail[Point] = Tail(400)
        self.uses: Tail[Use] = Tail(600)
        self.held: Tail[Held] = Tail(600)
        self.pictures: Tail[Picture] = Tail(48)
        self.failures: dict[tuple[str, str], Failure] = {}
        self.ended: deque[JobEnded] = deque(maxlen=4)
        self.device_seconds: dict[str, float] = {}  # by run, of those that were seen while they ran
        self.bins: deque[Bin] = deque(maxlen=WINDOW_SECONDS // BIN_SECONDS)
        self._seen = -1
        self._open: dict[str, Bar] = {}
        self._free_at: dict[str, float] = {}  # when a worker last was without a task, as far as that is known
        self._shown: dict[str, Bar] = {}  # what workers ran at the last look
        self._items: dict[tuple[str, str], deque[tuple[float, int]]] = {}  # done per second

    def observe(self, state: ClusterState, events: Reversible[tuple[int, Event]], memory_bytes: int = 0) -> None:
        """Take in a state and the gate's latest events, of which those that are known already are skipped.

        ``memory_bytes`` is what all worker processes use.
        """
        self._shown = {bar.worker: bar for bar in self.running()}
        before, self.state = self.state, state
        self.memory_bytes = memory_bytes
        for job in state.jobs:
            self.names[job.run] = job.name
        for worker in state.workers:
            self.labels[worker.address] = worker_label(worker)
            self.gone.pop(worker.address, None)
        new, calls = self._news(events)
        every = max(-(-calls // POINTS_A_LOOK), 1)
        for number, event in new:
            self._take(event, point=number % every == 0)
        for job in state.jobs:
            self.device_seconds[job.run] = sum(stage.device_seconds for stage in job.stages)
        for worker in state.workers:
            if worker.running is None or worker.address not in self._free_at:
                self._free_at[worker.address] = max(self._free_at.get(worker.address, 0.0), state.when)
        self._close_bars(state.when)
        if before is not None and state.when > before.when:
            self.uses.append(Use(state.when, use_between(before, state)))
        self.held.append(Held(state.when, held_bytes(state.jobs)))
        self._forget(state)

    def _news(self, events: Reversible[tuple[int, Event]]) -> tuple[list[tuple[int, Event]], int]:
        """Events since the last look, oldest first, and how many of them are calls: the latest, if there are many."""
        new, calls = [], 0
        for number, event in reversed(events):
            if number <= self._seen:
                break
            is_call = isinstance(event, TaskDone)
            calls += is_call
            if not is_call or calls <= CALLS_A_LOOK:
                new.append((number, event))
        if new:
            self._seen = new[0][0]
        return new[::-1], min(calls, CALLS_A_LOOK)

    def span(self, first: float | None = None) -> tuple[float, float]:
        """The time that a plot shows: the last minutes, or what there is of them from ``first`` on."""
        now = self.state.when if self.state else 0.0
        if first is None:
            first = self.bins[0].start if self.bins else now
        return min(max(now - WINDOW_SECONDS, first), now - SHORTEST_SECONDS), now

    def rate(self, run: str, stage: str) -> float | None:
        """Items per second over the last minute; None before the first."""
        seconds = self._items.get((run, stage))
        if not seconds or self.state is None:
            return None
        now = self.state.when
        first = max(now - RATE_SECONDS, seconds[0][0])
        return sum(items for when, items in seconds if when >= first) / max(now - first, 1.0)

    def growing(self) -> list[Bar]:
        """Bars that the next call may make longer."""
        return list(self._open.values())

    def running(self) -> list[Bar]:
        """For each call that runs a bar without calls, from where it began as far as that is known."""
        if self.state is None:
            return []
        now = self.state.when
        found = []
        for worker in self.state.workers:
            if worker.running is not None:
                start = min(self._free_at.get(worker.address, now), now)
                found.append(Bar(worker.address, "", worker.running, start, now, 0, calls=0))
        return found

    def _take(self, event: Event, point: bool) -> None:
        match event:
            case TaskDone():
                self._take_call(event)
                if point and event.predicted_seconds > 0 and event.seconds > 0:
                    items = max(event.items, 1)
                    self.points.append(Point(event.stage, event.predicted_seconds / items, event.seconds / items))
            case RolesChanged():
                text = self._retag_text(event)
                self.marks.append(Mark(event.when, event.worker, "retag", text))
                here = self._bin(event.when)
                if here is not None:
                    here.retags += 1
                    here.last_retag = f"{worker_text(self.label(event.worker))}: {text}"
            case WorkerJoined():
                self.marks.append(Mark(event.when, event.worker, "joined", f"joined ({event.device_class})"))
            case WorkerLeft():
                self.gone[event.worker] = event.when
                lost = f"; {event.lost_tasks} tasks go elsewhere" if event.lost_tasks else ""
                self.marks.append(Mark(event.when, event.worker, "left", f"left{lost}"))
            case ShardWritten():
                for row, jpeg in event.thumbnails.items():
                    self.pictures.append(Picture(event.run, row, jpeg))
                for text in event.errors:
                    self._fail(event.run, text, event.when)
            case ItemQuarantined():
                text = f"item {event.item} killed its worker {event.kills} times in {event.stage} and is given up"
                self._fail(event.run, text, event.when)
            case JobStarted():
                self.names[event.run] = event.name
            case JobEnded():
                self.ended.append(event)

    def label(self, worker: str) -> str:
        return self.labels.get(worker) or short_address(worker)

    def _retag_text(self, event: RolesChanged) -> str:
        """What changed and why, on one line."""
        gain = event.stay_seconds - event.predicted_seconds
        better = f" (saves {duration(gain)} by prediction)" if gain >= 1 else ""
        before, after = roles_text(event.before, self.names), roles_text(event.after, self.names)
        return f"{reason_text(event.reason)}: {before} \N{RIGHTWARDS ARROW} {after}{better}"

    def _take_call(self, event: TaskDone) -> None:
        end = event.start + event.seconds
        done = self._items.setdefault((event.run, event.stage), deque())
        second = float(int(event.when))
        if done and done[-1][0] >= second:
            done[-1] = (done[-1][0], done[-1][1] + event.items)
        else:
            done.append((second, event.items))
        while done[0][0] < second - RATE_SECONDS:
            done.popleft()
        if event.run in self.device_seconds:
            self.device_seconds[event.run] += event.seconds
        held, since = self._shown.pop(event.worker, None), self._free_at.get(event.worker, event.start)
        self._free_at[event.worker] = end
        bar = self._open.get(event.worker)
        if (
            bar is not None
            and (bar.run, bar.stage) == (event.run, event.stage)
            and event.start - bar.end < GAP_SECONDS
            and end - bar.start < BAR_SECONDS
        ):
            bar.end, bar.items, bar.calls = end, bar.items + event.items, bar.calls + 1
        else:
            if bar is not None:
                self.bars.append(bar)
            self._open[event.worker] = Bar(event.worker, event.run, event.stage, event.start, end, event.items)
        begin = event.start - event.load_seconds
        if held is not None and held.stage == event.stage and held.end < event.start:
            begin = min(begin, since)  # it was drawn as running before it computed: that stays
        if event.start - begin > GAP_SECONDS:
            self.bars.append(Bar(event.worker, event.run, event.stage, begin, event.start, 0, calls=0))
        for place, seconds in spread(begin, end):
            here = self._bin(place)
            if here is not None:
                here.stage_seconds[event.stage] += seconds

    def _bin(self, when: float) -> Bin | None:
        start = when // BIN_SECONDS * BIN_SECONDS
        if not self.bins:
            self.bins.append(Bin(start))
        missing = round((start - self.bins[-1].start) / BIN_SECONDS)
        if missing > WINDOW_SECONDS // BIN_SECONDS:
            self.bins.clear()
            self.bins.append(Bin(start))
        for _ in range(missing):
            self.bins.append(Bin(self.bins[-1].start + BIN_SECONDS))
        place = len(self.bins) - 1 + min(missing, 0)
        return self.bins[place] if place >= 0 else None

    def _close_bars(self, now: float) -> None:
        for worker, bar in list(self._open.items()):
            if now - bar.end > GAP_SECONDS:
                self.bars.append(bar)
                del self._open[worker]

    def _fail(self, run: str, text: str, when: float) -> None:
        known = self.failures.pop((run, text), None)
        self.failures[run, text] = Failure(run, text, when, 1 + (known.times if known else 0))
        if len(self.failures) > 50:
            del self.failures[next(iter(self.failures))]

    def _forget(self, state: ClusterState) -> None:
        """Drop what is known of workers and jobs that are long gone."""
        for worker, when in list(self.gone.items()):
            if when < state.when - WINDOW_SECONDS:
                del self.gone[worker]
                self.labels.pop(worker, None)
                self._free_at.pop(worker, None)
        runs = {job.run for job in state.jobs} | {ended.run for ended in self.ended}
        for run, stage in list(self._items):
            if run not in runs:
                del self._items[run, stage]
        self.device_seconds = {run: spent for run, spent in self.device_seconds.items() if run in runs}
        shown = runs | {failure.run for failure in self.failures.values()}
        if len(self.names) > 200:
            self.names = {run: name for run, name in self.names.items() if run in shown}


def spread(start: float, end: float) -> Iterator[tuple[float, float]]:
    """The bins, by their starts, that a time lies in, and its seconds in each."""
    place = max(start, end - WINDOW_SECONDS)
    while place < end:
        left = place // BIN_SECONDS * BIN_SECONDS
        border = left + BIN_SECONDS
        yield left, min(border, end) - place
        place = border


def use_between(before: ClusterState, after: ClusterState) -> dict[str, float]:
    """Shares of the fleet's time between two looks, by ``USES``.

    Seconds of work are booked when a call ends, which may be long after it began: whether a worker is busy
    is taken from what it runs now. Without a job nobody starves.
    """
    known = {worker.address: worker for worker in before.workers}
    shares = dict.fromkeys(USES, 0.0)
    if not after.workers:
        return shares
    for worker in after.workers:
        old = known.get(worker.address, worker)
        if worker.running is not None:
            shares["busy"] += 1
        elif worker.blocked_seconds > old.blocked_seconds:
            shares["blocked"] += 1
        elif after.jobs and worker.starving_seconds > old.starving_seconds:
            shares["starving"] += 1
        shares["load"] += (worker.load_seconds - old.load_seconds) / (after.when - before.when)
    shares["load"] = min(max(shares["load"], 0.0), shares["busy"])
    shares["busy"] -= shares["load"]
    return {use: share / len(after.workers) for use, share in shares.items()}


def held_bytes(jobs: Iterable[JobState]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for job in jobs:
        for stage in job.stages:
            totals[stage.name] += stage.waiting_bytes
    return dict(totals)


def roles_text(roles: Mapping[str, float], names: Mapping[str, str]) -> str:
    """``denoise 80% + decode 20%``, the largest shares first; with the job where there are several.

    Keys are ``run/stage``.
    """
    working = sorted(((share, role) for role, share in roles.items() if share > 0), reverse=True)
    several = len({role.rpartition("/")[0] for _, role in working}) > 1
    parts = []
    for share, role in working[:ROLES_SHOWN]:
        run, _, stage = role.rpartition("/")
        text = f"{stage} of {names.get(run, run)}" if several else stage
        parts.append(text if len(working) == 1 else f"{text} {share:.0%}")
    if len(working) > ROLES_SHOWN:
        parts.append(f"{len(working) - ROLES_SHOWN} more")
    return " + ".join(parts) or "nothing"


def worker_label(worker: WorkerState) -> str:
    """Its name where it has one of its own, else host and port."""
    return short_address(worker.name) if worker.name else short_address(worker.address)


def worker_text(label: str) -> str:
    """``worker 2``: a bare number would read like a count."""
    return label if "worker" in label.lower() else f"worker {label}"


def reason_text(reason: str) -> str:
    """The gate's reasons, with its workers called so."""
    return _WORKER.sub(lambda found: found[1] + worker_text(short_address(found[2])), reason)


_WORKER = re.compile(r"(^|; )(\S+)(?= (?:joined|left|paused|goes on)(?:;|$))")


def short_address(address: str) -> str:
    return address.rpartition("://")[2]
