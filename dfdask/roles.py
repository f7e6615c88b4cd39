"""Carries out what the controller decides: seats at the dispatcher, tags that Dask shows, events that explain."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dfdask.controller import Controller, Decision
from dfdask.dispatch import Dispatcher, Kind
from dfdask.events import RolesChanged
from dfdask.ledger import Ledger
from dfdask.tags import ROLE

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler


DECIDE_SECONDS = 0.5
"""How often roles are reconsidered at most where nobody asks for it."""
UNHURRIED_SECONDS = 20.0
"""How often at least, while tasks end."""
SECONDS_PER_TASK = 5e-5
"""CPU time that this may take for each task: a small fleet's tasks are few, and a decision for it is not cheaper."""
MOST_OF_THE_TIME = 0.05


class Roles:
    """``forecast_seconds`` until each job ends by the last decision, and the stages that are ``impossible`` here."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        controller: Controller,
        ledger: Ledger,
        on_change: Callable[[str], None] = lambda worker: None,
    ) -> None:
        self._dispatcher, self._controller, self._ledger, self._on_change = dispatcher, controller, ledger, on_change
        self._seconds: dict[str, float] = {}
        self.impossible: dict[str, tuple[str, ...]] = {}
        self._decided = 0.0
        self._took_seconds = 0.0
        self._looks_again = False

    @property
    def forecast_seconds(self) -> dict[str, float]:
        """By the last decision, less the time since."""
        passed = time.monotonic() - self._decided
        return {run: max(seconds - passed, 0.0) for run, seconds in self._seconds.items()}

    def are_due(self) -> bool:
        """Whether to reconsider for no other reason than that tasks ended: soon where they were not as expected."""
        passed, took, controller = time.monotonic() - self._decided, self._took_seconds, self._controller
        if passed <= max(DECIDE_SECONDS, took / MOST_OF_THE_TIME):
            return False
        is_cheap = took <= controller.ended_tasks * SECONDS_PER_TASK
        return controller.has_drifted or is_cheap or passed > UNHURRIED_SECONDS

    def look_again(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when news that came too soon may be considered: the next task to end may be a minute off."""
        if self._controller.has_drifted and not self._looks_again:
            self._looks_again = True

            def look() -> None:
                self._looks_again = False
                wake()

            asyncio.get_running_loop().call_later(DECIDE_SECONDS, look)

    def decide(self, scheduler: Scheduler, reason: str) -> None:
        """Reconsider all roles. What is assigned already stays where it is."""
        began = time.thread_time()
        self._count_what_is_there()
        decision = self._controller.decide()
        placement = decision.placement
        seconds = max(placement.seconds.values(), default=0.0)
        stay = self._stay_seconds(seconds, decision)
        for address, shares in decision.shares.items():
            account = self._ledger.workers[address]
            before, account.shares = account.shares, shares
            if address in decision.seats:
                self._dispatcher.seat(address, decision.seats[address])
                own_before, own = _own(before), _own(shares)
                if own_before.keys() != own.keys():
                    self._on_change(address)
                    self._ledger.note(
                        RolesChanged(time.time(), address, own_before, own, reason, placement.policy, seconds, stay)
                    )
            _tag(scheduler, address, shares)
        for run in self._ledger.jobs:
            self._seconds[run] = placement.seconds.get(run, 0.0)
            self.impossible[run] = tuple(stage for job, stage in placement.impossible if job == run)
        self._decided, self._took_seconds = time.monotonic(), time.thread_time() - began

    def _stay_seconds(self, seconds: float, decision: Decision) -> float:
        """Until the last job would end with the roles that were there; NaN where some of the work had no worker.

        To be asked before the shares are taken over. A job that does not advance has no end to compare with.
        """
        placement, accounts = decision.placement, self._ledger.workers
        served = {kind for each in decision.shares for kind, share in accounts[each].shares.items() if share > 0}
        waiting = {
            (run, stage.name)
            for run, facts in self._controller.jobs.items()
            for stage in facts.stages
            if self._controller.left((run, stage.name))
        }
        if waiting - served - set(placement.impossible):
            return math.nan
        return seconds * placement.score / placement.stay_score if placement.stay_score > 0 else seconds

    def forget(self, run: str) -> None:
        self._seconds.pop(run, None)
        self.impossible.pop(run, None)

    def _count_what_is_there(self) -> None:
        """Results that were lost are made again: what is ready or running is left to do, whatever was counted."""
        for run, facts in self._controller.jobs.items():
            for stage in facts.stages:
                kind = run, stage.name
                there = self._dispatcher.ready_items(kind) + self._dispatcher.running_items(kind)
                self._controller.at_least_left(kind, there)
        for kind, cost in self._controller.item_costs().items():
            self._dispatcher.weigh(kind, cost)


def _own(shares: Mapping[Kind, float]) -> dict[str, float]:
    return {f"{job}/{stage}": share for (job, stage), share in shares.items() if share > 0}


def _tag(scheduler: Scheduler, address: str, shares: Mapping[Kind, float]) -> None:
    """Show the roles of a worker where Dask shows its resources."""
    state = scheduler.workers.get(address)
    if state is None:
        return
    wanted: dict[str, float] = {}
    for (_, stage), share in shares.items():
        if share > 0:
            wanted[ROLE + stage] = round(wanted.get(ROLE + stage, 0.0) + share, 3)
    present = {name: amount for name, amount in state.resources.items() if name.startswith(ROLE)}
    if wanted == present or not shares:
        return
    for name in present:
        del state.resources[name]
        state.used_resources.pop(name, None)
        scheduler.resources[name].pop(address, None)
    for name, amount in wanted.items():
        state.resources[name] = amount
        state.used_resources[name] = 0
        scheduler.resources.setdefault(name, {})[address] = amount
