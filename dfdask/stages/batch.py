"""A micro-batch on its way through the stages, and how one bad item is kept from spoiling the others."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

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
    value: of what a task raises, Dask would log the traceback on every worker. ``committed``: there is nothing to do,
    for the shard is in the store.
    """

    groups: tuple[Group, ...]
    failures: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    problem: DfdaskError | None = None
    committed: bool = False

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


@runtime_checkable
class Memory(Protocol):
    """A stage that knows what fits into its worker's memory."""

    def most_items(self, items: Sequence[Item]) -> int:
        """How many items like these may run at once; at least 1."""

    def next_items(self, items: Sequence[Item]) -> int:
        """How many of these to run at once now; no more than may."""

    def ran_out(self, items: Sequence[Item]) -> bool:
        """These were too many. Whether the same may be tried again, or else fewer must be."""


def run_batch(name: str, stage: Stage, batch: Batch) -> Batch:
    """Run ``stage`` over all groups that have not failed; halve a group that raises until the culprit is alone.

    Where the stage knows its memory, groups are cut to what fits, and run again in halves where it runs out. Errors
    that concern the worker and not an item (too little memory for a single one, an unreadable model) are raised.
    """
    memory = stage if isinstance(stage, Memory) else None
    started = time.perf_counter()
    groups: list[Group] = []
    failures = dict(batch.failures)
    todo = list(reversed(_merged(batch.groups, memory)))
    while todo:
        group = todo.pop()
        most = memory.next_items(group.items) if memory else len(group.items)
        if most < len(group.items) and (parts := _parts(group, most)):
            todo.extend(reversed(parts))
            continue
        shortage = None
        try:
            done = stage.run(group.items, group.state)
            items = group.items
            if not getattr(stage, "passes_pictures", True):
                items = tuple(item.without_pictures() for item in items)
            groups.append(Group(items, done))
        except DfdaskError:
            raise
        except Exception as error:
            if memory and is_out_of_memory(error):
                shortage = describe(error)  # not the error: its traceback holds on to the memory
            elif is_out_of_memory(error):
                raise
            elif halves := _halves(group):
                todo.extend(reversed(halves))
            else:
                failures.update((item.index, f"{name}: {describe(error)}") for item in group.items)
        if shortage is not None and memory is not None:
            again = memory.ran_out(group.items)
            smaller = None if again else _halves(group)
            if not again and not smaller:
                raise MemoryError(shortage)
            todo.extend(reversed(smaller or [group]))
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
    """The group in two, or None where it cannot be divided."""
    return _parts(group, (len(group.items) + 1) // 2)


def _parts(group: Group, most: int) -> list[Group] | None:
    """The group in parts of at most ``most`` items each and about one size, or None where it cannot be divided.

    That is a single item, or a state without a part for each.
    """
    count = len(group.items)
    if count == 1 or most < 1 or (group.state is not None and not _has_rows(group.state)):
        return None
    parts = max(-(-count // most), 2)
    edges = [count * number // parts for number in range(parts + 1)]
    slices = [slice(*pair) for pair in itertools.pairwise(edges)]
    return [Group(group.items[part], _select(group.state, part)) for part in slices]


def _merged(groups: Sequence[Group], memory: Memory | None) -> list[Group]:
    """Neighbours together again where ``memory`` allows more at once: an earlier stage may have had to part them."""
    merged: list[Group] = []
    for group in groups:
        together = _joined(merged[-1], group) if memory and merged else None
        if memory and together and memory.most_items(together.items) >= len(together.items):
            merged[-1] = together
        else:
            merged.append(group)
    return merged


def _joined(one: Group, other: Group) -> Group | None:
    states = (one.state, other.state)
    if states != (None, None) and not all(map(_has_rows, states)):
        return None  # of a pipeline that takes one item at a time: equal states are not one of both
    try:
        return Group(one.items + other.items, _join(one.state, other.state))
    except _Apart:
        return None


class _Apart(Exception):
    """These states cannot be made one."""


def _join(one: Any, other: Any) -> Any:
    """The state of the items of both: Rows end to end, everything else must be the same in both."""
    if type(one) is not type(other):
        raise _Apart
    if isinstance(one, Rows):
        return Rows(_end_to_end(one.value, other.value))
    if isinstance(one, (dict, list, tuple)):
        keys = list(one) if isinstance(one, dict) else range(len(one))
        if len(one) != len(other) or (isinstance(one, dict) and one.keys() != other.keys()):
            raise _Apart
        pairs = iter([(one[key], other[key]) for key in keys])
        return map_entries(lambda _: _join(*next(pairs)), one)
    same: Any = one is other or (getattr(one, "shape", None) == getattr(other, "shape", None) and one == other)
    if not (same if isinstance(same, bool) else same.all()):
        raise _Apart
    return one


def _end_to_end(one: Any, other: Any) -> Any:
    if isinstance(one, list) and isinstance(other, list):
        return one + other
    if getattr(one, "shape", ())[1:] != getattr(other, "shape", ())[1:] or getattr(one, "dtype", 0) != other.dtype:
        raise _Apart
    if hasattr(one, "joined"):
        return one.joined(other)
    if type(one).__module__.startswith("torch"):
        import torch

        return torch.cat([one, other])
    import numpy as np

    return np.concatenate([one, other])


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
