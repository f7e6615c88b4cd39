"""``dfdask explain``: the decisions of the scheduler for people and for programs, from the events of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dfdask.history import Decision, History, roles_text
from dfdask.store import RunStore
from dfdask.words import count, duration, printable, rate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

NO_EVENTS = "No events are stored with this run: nothing can be said about what the scheduler did."


def as_dict(history: History) -> dict[str, Any]:
    """For programs; times in seconds since the epoch, what is not known is null."""
    return {
        "began": history.began or None,
        "ended": history.ended or None,
        "complete": history.job_ended is not None,
        "workers": list(history.workers),
        "decisions": [
            {
                **asdict(decision),
                "predicted_gain_seconds": decision.predicted_gain_seconds,
                "actual_gain_seconds": decision.actual_gain_seconds,
            }
            for decision in history.decisions
        ],
        "stages": [asdict(stage) for stage in history.stages],
        "other": [dict(event) for event in history.of_kind("WorkerLeft", "ItemQuarantined", "EventsDropped")],
    }


def print_history(console: Console, store: RunStore, history: History) -> None:
    name = printable(store.location.name)
    if not history.events:
        console.print(f"{name}: {NO_EVENTS}", markup=False, soft_wrap=True)
        return
    moves = sum(len(decision.moves) for decision in history.decisions)
    facts = [count(len(history.decisions), "decision"), count(moves, "move"), count(len(history.workers), "worker")]
    starts = len(history.of_kind("JobStarted"))
    pauses = f", {count(starts, 'start')} and the time between them included" if starts > 1 else ""
    console.print(f"{name}: {', '.join(facts)} in {duration(history.seconds)}{pauses}", style="bold", markup=False)
    if history.decisions:
        console.print(_decisions(history))
        console.print(
            "left: seconds until the end if nothing had changed > by prediction with the change > as it came (later "
            "decisions included). Nobody ran the first, so gains are against an estimate.",
            style="dim",
        )
    else:
        console.print("No roles were changed.")
    if history.stages:
        console.print()
        console.print(_stages(history))
    for event in history.of_kind("WorkerLeft", "ItemQuarantined", "EventsDropped"):
        console.print(f"  {remark(event, history)}", markup=False)


def moved(decision: Decision) -> list[str]:
    """Who went from what to what, workers of the same change together: ``2 workers: encode → denoise``."""
    changes = Counter((roles_text(move.before), roles_text(move.after)) for move in decision.moves)
    return [f"{count(number, 'worker')}: {printable(old)} → {printable(new)}" for (old, new), number in changes.items()]


def left(decision: Decision) -> str:
    """``4 min 05 s > 3 min 20 s > 3 min 31 s``, ``?`` for what is not known."""
    numbers = (decision.stay_seconds, decision.predicted_seconds, decision.actual_seconds)
    return " > ".join("?" if number is None else duration(number) for number in numbers)


def gain(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return ("−" if seconds < 0 else "+" if seconds > 0 else "") + duration(abs(seconds))


def remark(event: Any, history: History) -> str:
    """One line about an event that is no decision."""
    at = duration(max(float(event["when"]) - history.began, 0.0))
    if event["event"] == "WorkerLeft":
        lost = (
            f", its {count(int(event.get('lost_tasks') or 0), 'task')} went elsewhere"
            if event.get("lost_tasks")
            else ""
        )
        return f"{at}: {printable(str(event['worker']))} left{lost}"
    if event["event"] == "ItemQuarantined":
        return (
            f"{at}: item {event['item']} was given up in {printable(str(event['stage']))} after it had ended "
            f"{count(int(event['kills']), 'worker')}"
        )
    kinds = ", ".join(f"{number:,} {printable(str(kind))}" for kind, number in event["dropped"].items())
    return f"{at}: too many events to keep them all, left out: {kinds}"


def _decisions(history: History) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("why", ratio=2, overflow="fold")
    table.add_column("who moved", ratio=3, overflow="fold")
    table.add_column("left", no_wrap=True)
    table.add_column("gain", no_wrap=True)
    table.add_column("items/s", no_wrap=True)
    for decision in history.decisions:
        why = printable(f"{decision.reason} ({decision.policy})" if decision.policy else decision.reason)
        gains = f"{gain(decision.predicted_gain_seconds)} > {gain(decision.actual_gain_seconds)}"
        speeds = [
            "?" if speed is None else rate(speed).removesuffix(" items/s")
            for speed in (decision.rate_before, decision.rate_after)
        ]
        table.add_row(
            duration(decision.when - history.began),
            Text(why),
            Text("\n".join(moved(decision))),
            left(decision),
            gains,
            " > ".join(speeds),
        )
    return table


def _stages(history: History) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("stage", "calls", "items", "device time", "loading", "s/item", "predicted", "error"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage in history.stages:
        table.add_row(
            Text(printable(stage.name)),
            f"{stage.calls:,}",
            f"{stage.items:,}",
            duration(stage.seconds),
            duration(stage.load_seconds),
            *("?" if s is None else f"{s:.4g}" for s in (stage.measured_item_seconds, stage.predicted_item_seconds)),
            "?" if stage.error is None else f"{stage.error:.0%}",
        )
    return table
