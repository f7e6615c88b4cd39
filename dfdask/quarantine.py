"""Items that kill their workers: found without blaming their neighbours, and given up after the third kill.

Dask counts for every task how often a worker died that held it, guilty or not. After the first death a task runs
alone on its worker; after the second its worker says which item it begins, one by one; the item that had begun
at the third is the culprit. The others of its batch go on without it. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

KILLS_TO_BLAME = 3
KILLS_TO_GIVE_UP = 10
"""Deaths without a culprit: then it is the model or the machine, and the job must say so."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """How a task must run: ``alone`` on its worker, with a ``note`` for the worker, and the item just found guilty."""

    alone: bool = False
    note: dict[str, Any] | None = None
    culprit: int | None = None


@dataclass
class _Case:
    forgiven: int = 0
    begun: int | None = None
    poison: set[int] = field(default_factory=set)


class Quarantine:
    """Cases by task; an item is its row in the output."""

    kills_to_blame = KILLS_TO_BLAME

    def __init__(self) -> None:
        self._cases: dict[Any, _Case] = {}

    def began(self, key: Hashable, item: int) -> None:
        """A worker has begun with ``item`` of a suspected batch."""
        if key in self._cases:
            self._cases[key].begun = item

    def suspicion(self, key: Hashable, deaths: int) -> Suspicion:
        """For a task that is about to be placed; ``deaths`` are those that Dask counts for it."""
        if not deaths:
            return Suspicion()
        case = self._cases.setdefault(key, _Case())
        fresh, culprit = deaths - case.forgiven, None
        if fresh >= KILLS_TO_BLAME and case.begun is not None:
            culprit = case.begun
            case.poison.add(culprit)
            case.forgiven, fresh = deaths, 0
        case.begun = None
        note = {
            "poison": sorted(case.poison),
            "careful": fresh >= KILLS_TO_BLAME - 1,
            "give_up": fresh >= KILLS_TO_GIVE_UP,
        }
        return Suspicion(True, note, culprit)

    def forget_task(self, key: Hashable) -> None:
        self._cases.pop(key, None)
