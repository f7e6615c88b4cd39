"""A micro-batch on its way through the stages, and how one bad item is kept from spoiling the others."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

from dfdask.errors import DfdaskError
from dfdask.items import Item

MAX_ERROR_CHARACTERS = 500


class Stage(Protocol):
    """One step of a model, loaded and ready on this worker."""

    def run(self, items: Sequence[Item], state: Any) -> Any:
        """Take what the stage before handed over for these items (None: this is the first) one step on.

        What has a part for each item is handed over as ``Rows``: nothing else is divided with the items. The last
        stage returns a sequence of uint8 arrays, one per item, or an exception in the place of an item that came out
        wrong. Where ``passes_pictures`` is there and false, later stages get the items' pictures without their data.
        """


@dataclass(frozen=True, slots=True)
class Rows:
    """What has a part for each item, in their order: a tensor or array by its first dimension, or a list."""

    value: Any


@dataclass(frozen=True, slots=True)
class Group:
    """Items that are still together; ``state`` is what the last stage handed over for all of them."""

    items: tuple[Item, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch between two stages. ``failures`` maps the row of a failed item to its error.

    ``problem`` is what kept a worker from its stage, through no fault of an item. It travels to the client as a
    value: of what a task raises, Dask would log the traceback on every worker.
    """

    groups: tuple[Group, ...]
    failures: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    problem: DfdaskError | None = None

    @classmethod
    def start(cls, items: Sequence[Item]) -> Batch:
        return cls(groups=(Group(tuple(items)),))

    def without(self, rows: Collection[int], error: str) -> Batch:
        """The batch with the items of these ``rows`` failed, and those that cannot be parted from them."""
        groups: list[Group] = []
        failures = dict(self.failures)
        todo = list(reversed(self.groups))
        while todo:
            group = todo.pop()
            if not any(item.index in rows for item in group.items):
                groups.append(group)
            elif halves := _halves(group):
                todo.extend(reversed(halves))
            else:
                failures.update((item.index, error) for item in group.items)
        return replace(self, groups=tuple(groups), failures=failures)

    def in_single_items(self) -> Batch:
        """The same items, each in a group of its own as far as they can be parted."""
        groups: list[Group] = []
        todo = list(reversed(self.groups))
        while todo:
            group = todo.pop()
            halves = _halves(group)
            if halves:
                todo.extend(reversed(halves))
            else:
                groups.append(group)
        return replace(self, groups=tuple(groups))


def run_batch(name: str, stage: Stage, batch: Batch) -> Batch:
    """Run ``stage`` over all groups that have not failed; halve a group that raises until the culprit is alone.

    Errors that concern the worker and not an item (out of memory, an unreadable model) are raised.
    """
    started = time.perf_counter()
    groups: list[Group] = []
    failures = dict(batch.failures)
    todo = list(reversed(batch.groups))
    while todo:
        group = todo.pop()
        try:
            done = stage.run(group.items, group.state)
            items = group.items
            if not getattr(stage, "passes_pictures", True):
                items = tuple(item.without_pictures() for item in items)
            groups.append(Group(items, done))
        except DfdaskError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            halves = _halves(group)
            if halves:
                todo.extend(reversed(halves))
            else:
                failures.update((item.index, f"{name}: {describe(error)}") for item in group.items)
    seconds = {**batch.seconds, name: time.perf_counter() - started}
    return Batch(tuple(groups), failures, seconds)


def is_out_of_memory(error: BaseException) -> bool:
    """Of this machine or of its GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def describe(error: BaseException) -> str:
    """The error in one line, without the traceback."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:MAX_ERROR_CHARACTERS]


def nbytes(value: Any) -> int:
    """Bytes of the tensors, arrays and texts inside ``value``."""
    return sum(part.nbytes if hasattr(part, "nbytes") else len(part) for part in _leaves(value))


def _halves(group: Group) -> list[Group] | None:
    """The group in two, or None where it is a single item or its state cannot be divided by items."""
    count = len(group.items)
    if count == 1 or (group.state is not None and not _has_rows(group.state)):
        return None
    middle = count // 2
    return [Group(group.items[part], _select(group.state, part)) for part in (slice(middle), slice(middle, count))]


def map_entries(function: Callable[[Any], Any], value: Any) -> Any:
    """A mapping, list or tuple of the same kind with ``function`` of each entry; Rows with that of its value."""
    if isinstance(value, Rows):
        return Rows(function(value.value))
    if isinstance(value, dict):
        changed = copy.copy(value)  # of the same kind: what a pipeline reads by attribute stays readable
        for key, entry in value.items():
            changed[key] = function(entry)
        return changed
    entries = [function(entry) for entry in value]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _has_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_rows, value.values()))
    return isinstance(value, Rows) or (isinstance(value, (list, tuple)) and any(map(_has_rows, value)))


def _select(value: Any, part: slice) -> Any:
    if isinstance(value, Rows):
        return Rows(value.value[part])
    return map_entries(lambda entry: _select(entry, part), value) if isinstance(value, (dict, list, tuple)) else value


def _leaves(value: Any) -> Iterator[Any]:
    if hasattr(value, "nbytes") or isinstance(value, (bytes, str)):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _leaves(getattr(value, part.name))
