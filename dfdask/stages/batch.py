"""A micro-batch on its way through the stages, and how one bad item is kept from spoiling the others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

from dfdask.errors import DfdaskError
from dfdask.items import Item

MAX_ERROR_CHARACTERS = 500


class Stage(Protocol):
    """One step of a model, loaded and ready on this worker."""

    def run(self, items: Sequence[Item], state: Any) -> Any:
        """Take what the stage before handed over for these items (None: this is the first) one step on.

        The last stage returns a sequence of uint8 arrays, one per item, or an exception in the place of an
        item that came out wrong.
        """


@dataclass(frozen=True, slots=True)
class Group:
    """Items that are still together; ``state`` is what the last stage handed over for all of them."""

    items: tuple[Item, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch between two stages. ``failures`` maps the row of a failed item to its error."""

    groups: tuple[Group, ...]
    failures: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, items: Sequence[Item]) -> Batch:
        return cls(groups=(Group(tuple(items)),))


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
            groups.append(replace(group, state=stage.run(group.items, group.state)))
        except (DfdaskError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            halves = _halves(group)
            if halves:
                todo.extend(reversed(halves))
            else:
                failures.update((item.index, f"{name}: {describe(error)}") for item in group.items)
    seconds = {**batch.seconds, name: time.perf_counter() - started}
    return Batch(tuple(groups), failures, seconds)


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
    if count == 1:
        return None
    if group.state is not None and not any(_per_item(part, count) for part in _leaves(group.state)):
        return None
    middle = count // 2
    return [
        Group(group.items[part], _select(group.state, part, count)) for part in (slice(0, middle), slice(middle, count))
    ]


def _per_item(value: Any, count: int) -> bool:
    shape: tuple[int, ...] = tuple(getattr(value, "shape", ()))
    return bool(shape) and shape[0] == count


def _select(value: Any, part: slice, count: int) -> Any:
    if _per_item(value, count):
        return value[part]
    if isinstance(value, dict):
        return {key: _select(entry, part, count) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_select(entry, part, count) for entry in value)
    return value


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
