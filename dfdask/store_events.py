"""The events of a run, kept beside its data as JSON lines: what ``explain``, ``report`` and notebooks read later.

Every client process (a *session*) writes objects of its own, ``events/<session>-<number>.jsonl``, so that nobody
waits for anybody. The newest object is put again, whole, until it has its share of events; then the next begins.

Size: what happens once (roles changed, workers joined) is kept as it is, up to ``MOST_OF_A_KIND`` of each kind and
session; after that it is counted (``EventsDropped``). ``TaskDone`` and ``ShardWritten``, of which there may be
millions, are summed over spans of time per run, stage and worker. A span grows with the session's age and with the
number of workers, so that a session has at most about ``SUMS_PER_E_FOLD * ln(seconds)`` sums of some 90 bytes: 10 MB
in a day. Once spans have reached ``MOST_SPAN_SECONDS`` (100 workers: after a day), a worker adds 10 kB a day and stage.
A sum reads like an event with two fields more: ``events`` that it stands for, and ``first``, when the first ended.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from dfdask.errors import StorageError
from dfdask.store_objects import Objects, TakenError, storage_errors
from dfdask.targets import Location

FOLDER = "events"
SUMS_PER_E_FOLD = 10_000
MOST_SPAN_SECONDS = 900.0
MOST_OF_A_KIND = 20_000
_OBJECT_SECONDS, _OBJECT_SHARE = 60.0, 1 / 64  # an object holds a minute, later a 64th of the session's age
_MOST_ERRORS = 8
_READERS = 16
_KEY = re.compile(rf"{FOLDER}/(\w+-\w+)-(\d+)\.jsonl")
_KEYS = {"TaskDone": ("run", "stage", "worker"), "ShardWritten": ("run",)}
_SUMMED = {"items", "failed_items", "seconds", "load_seconds", "predicted_seconds", "nbytes"}
_TIMES = {"when", "first", "start"}
_UNTOLD = {"thumbnails"}

Event = dict[str, Any]


class EventLog:
    """What this process has to say about a run. Threads may share it."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._session = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self._number = 0
        self._lock = threading.Lock()
        self._began: float | None = None
        self._object_began = 0.0
        self._single: list[Event] = []
        self._sums: list[Event] = []
        self._open: dict[tuple[Any, ...], Event] = {}
        self._pairs: set[tuple[Any, ...]] = set()
        self._kinds: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._saved = self._warned = False

    def append(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Keep ``events`` (``Event.as_dict()``). What cannot be put now is put by the next call; a warning says so."""
        told = [_plain({name: value for name, value in event.items() if name not in _UNTOLD}) for event in events]
        if not told:
            return
        with self._lock:
            self._turn(float(told[0]["when"]))
            for event in told:
                self._take(event)
            self._saved = False
            try:
                self._put()
                self._saved = True
            except StorageError as error:  # an observer never stops a job
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"events of the run are not saved for now: {error}", RuntimeWarning, stacklevel=3)

    def _turn(self, when: float) -> None:
        """Begin the next object where the one at hand is old enough, and safe."""
        if self._began is None:
            self._began = self._object_began = when
        age = when - self._object_began
        if self._saved and age > max(_OBJECT_SECONDS, (when - self._began) * _OBJECT_SHARE):
            self._number += 1
            self._object_began = when
            self._single, self._sums, self._open = [], [], {}
            self._dropped.clear()

    def _take(self, event: Event) -> None:
        kind = str(event["event"])
        if kind in _KEYS:
            self._sum(kind, float(event["when"]), event)
            return
        self._kinds[kind] += 1
        if self._kinds[kind] <= MOST_OF_A_KIND:
            self._single.append(event)
        else:
            self._dropped[kind] += 1

    def _sum(self, kind: str, when: float, event: Event) -> None:
        # Sums of what is not known are kept apart: a prediction is compared with the seconds of its own tasks.
        key = (kind, *(event.get(name) for name in _KEYS[kind]), not event.get("predicted_seconds"))
        self._pairs.add(key)
        age = when - (self._began or when)
        span = min(age * len(self._pairs) / SUMS_PER_E_FOLD, MOST_SPAN_SECONDS)
        total = self._open.get(key)
        if total is None or when - total["first"] > span:
            self._open[key] = total = {**event, "first": when, "events": 1}
            self._sums.append(total)
            return
        for name, value in event.items():
            if name in _SUMMED and value is not None:
                total[name] = (total.get(name) or 0) + value
            elif name == "start":
                total[name] = min(total[name], value)
            elif name == "errors":
                total[name] = list(dict.fromkeys([*total[name], *value]))[:_MOST_ERRORS]
            elif name == "when":
                total[name] = max(total[name], value)
        total["events"] += 1

    def _put(self) -> None:
        lines: list[Event] = list(self._single)
        for kind in _KEYS:
            if rows := [row for row in self._sums if row["event"] == kind]:
                lines.append(_packed(kind, rows))
        if self._dropped:
            when = max(float(event["when"]) for event in (*self._single, *self._sums)) if lines else self._object_began
            lines.append({"event": "EventsDropped", "when": when, "dropped": dict(self._dropped)})
        data = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n" for line in lines)
        with storage_errors(f"cannot save the events of {self._objects.location}"):
            if not self._number:
                _make_group(self._objects)
            self._objects.put(f"{FOLDER}/{self._session}-{self._number:06d}.jsonl", data.encode())


@lru_cache(maxsize=64)
def event_log(location: Location) -> EventLog:
    """This process's log of a run: one session, whoever asks."""
    return EventLog(Objects(location, quick=True))  # what cannot be put now is put later, and who tells goes on


def read_events(objects: Objects) -> list[Event]:
    """All events of a run, by time. Objects that cannot be read are skipped with a warning. Raises StorageError.

    Where several clients followed the run at once, each has saved the same events: those of the first are taken.
    """
    keys = _keys(objects)
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(_reader(objects), keys))
    sessions: dict[str, list[Event]] = {}
    for key, part in zip(keys, parts, strict=True):
        found = _KEY.fullmatch(key)
        if part is None:
            warnings.warn(f"{objects.location}: {key} cannot be read; its events are left out", stacklevel=3)
        elif found:
            sessions.setdefault(found[1], []).extend(part)
    told: list[Event] = []
    until = -math.inf
    for events in sorted(filter(None, sessions.values()), key=lambda events: min(event["when"] for event in events)):
        told += [event for event in events if event["when"] > until]
        until = max(until, *(event["when"] for event in events))
    return sorted(told, key=lambda event: float(event["when"]))


def last_end(objects: Objects) -> Event | None:
    """The JobEnded that nobody has started after; None: it goes on, was killed, or is not known of.

    Raises StorageError.
    """
    newest = {key.rpartition("-")[0]: key for key in _keys(objects)}  # of each session
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(_reader(objects), newest.values())
        told = [event for part in parts for event in part or () if event["event"] in ("JobStarted", "JobEnded")]
    last = max(told, key=lambda event: float(event["when"]), default=None)
    return last if last and last["event"] == "JobEnded" else None


def _keys(objects: Objects) -> list[str]:
    """Of all objects, those of a session in their order."""
    with storage_errors(f"cannot list the events of {objects.location}"):
        return sorted(filter(_KEY.fullmatch, objects.listing(FOLDER)))


def is_event(key: str) -> bool:
    """Whether the object of a run belongs to its events, and not to its data."""
    return key.startswith(f"{FOLDER}/")


def _reader(objects: Objects) -> Callable[[str], list[Event] | None]:
    def read(key: str) -> list[Event] | None:
        try:
            with storage_errors(key):
                data = objects.get(key)
            return None if data is None else list(_unpacked(data))
        except (StorageError, ValueError, LookupError, TypeError, AttributeError):
            return None

    return read


def _packed(kind: str, rows: list[Event]) -> Event:
    """Many sums as one line: what is the same in all once, the rest as columns."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "event"))
    columns = {name: [row.get(name) for row in rows] for name in names}
    same = {name: values[0] for name, values in columns.items() if all(value == values[0] for value in values)}
    rest = {name: [_short(name, value) for value in values] for name, values in columns.items() if name not in same}
    return {"event": kind, "rows": len(rows), "same": same, "columns": rest}


def _unpacked(data: bytes) -> Iterator[Event]:
    """Raises ValueError, LookupError, TypeError or AttributeError for what is no event."""
    for line in data.decode().splitlines():
        event = json.loads(line)
        if "rows" not in event:
            yield {**event, "event": str(event["event"]), "when": float(event["when"])}
            continue
        columns = event["columns"]
        for row in range(int(event["rows"])):
            values = {name: column[row] for name, column in columns.items()}
            yield {"event": str(event["event"]), **event["same"], **values}


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: both mean "not known" here."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(name: str, value: Any) -> Any:
    """Times to the millisecond, other numbers to six digits."""
    if not isinstance(value, float):
        return value
    return round(value, 3) if name in _TIMES else float(f"{value:.6g}")


def _make_group(objects: Objects) -> None:
    """An empty group to Zarr, which would wonder about the folder otherwise."""
    try:
        document = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        objects.put(f"{FOLDER}/zarr.json", json.dumps(document).encode(), create=True)
    except TakenError:
        return
