"""Events of a run that nobody made: a small fleet, a workload that shifts, roles that follow."""

from __future__ import annotations

from typing import Any

from dfdask.events import (
    Event,
    ItemQuarantined,
    JobEnded,
    JobStarted,
    RolesChanged,
    ShardWritten,
    TaskDone,
    WorkerJoined,
    WorkerLeft,
)

BEGAN = 1_790_000_000.0
RUN = "0a1b2c3d"


def told(workers: int = 6, seconds: float = 300.0, ended: bool = True) -> list[dict[str, Any]]:
    """A third of the workers changes from denoise to encode when half the time is over; one leaves at the end."""
    events: list[Event] = [JobStarted(BEGAN, RUN, "demo", "runs/demo", 1000)]
    shift, movers = BEGAN + seconds / 2, range(max(workers // 3, 1))
    for worker in range(workers):
        address = f"tcp://10.0.0.{worker}:4000"
        events.append(WorkerJoined(BEGAN, address, "cpu", 1 << 34))
        first, later = ("decode" if worker == workers - 1 else "denoise"), "encode"
        roles = {f"{RUN}/{first}": 1.0}
        events.append(RolesChanged(BEGAN + 0.1, address, {}, roles, "demo began", "shares", 290.0, 400.0))
        if worker in movers:
            mixed = {f"{RUN}/encode": 0.75, f"{RUN}/denoise": 0.25}
            events.append(RolesChanged(shift, address, roles, mixed, "encode is slower", "shares", 140.0, 200.0))
        when = BEGAN + 0.5
        while when < BEGAN + seconds - 4:
            stage = later if worker in movers and when > shift and int(when) % 4 else first
            spent = {"encode": 1.0, "denoise": 3.0, "decode": 2.0}[stage] * (0.8 + (int(when * 7) % 5) / 10)
            when += spent + 0.2
            predicted = 0.0 if when < BEGAN + 5 else spent * (1.1 if int(when) % 2 else 0.95)
            events.append(TaskDone(when, RUN, stage, address, 4, when - spent, spent, 0.0, predicted, 1000))
    events.append(WorkerLeft(BEGAN + seconds - 2, f"tcp://10.0.0.{workers - 1}:4000", 2))
    events.append(ItemQuarantined(BEGAN + seconds - 3, RUN, 17, "denoise", 3))
    events.append(ShardWritten(BEGAN + seconds - 1, RUN, 0, 8, 1, ("denoise: <b>bad</b>",)))
    if ended:
        events.append(JobEnded(BEGAN + seconds, RUN, "finished"))
    return sorted((event.as_dict() for event in events), key=lambda event: float(event["when"]))


def later(seconds: float) -> list[dict[str, Any]]:
    """The same events again, ``seconds`` later."""
    return [{name: value + seconds if name in ("when", "start") else value for name, value in event.items()}
            for event in told()]  # fmt: skip
