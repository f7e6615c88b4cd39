"""``dfdask explain``: the decisions of the scheduler for people and for programs, from the events of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
        "pauses": [list(pause) for pause in history.pauses],
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
    line = f"{name}: {', '.join(facts)} in {duration(history.seconds)}{pauses(history)}"
    console.print(line, style="bold", markup=False)
    if history.decisions:
        console.print(_decisions(history))
        console.print(
            "What is left without a change is an estimate, for nobody ran it, and so are gains; as it came includes "
            "later decisions.",
            style="dim",
        )
    else:
        console.print("No roles were changed.")
    if history.stages:
        console.print()
        console.print(_stages(history))
    for event in history.of_kind("WorkerLeft", "ItemQuarantined", "EventsDropped"):
        console.print(f"  {remark(event, history)}", markup=False)


def pauses(history: History) -> str:
    """What is left out of the times, a clause for after them; nothing where there is nothing."""
    if not history.pauses:
        return ""
    seconds = sum(stop - start for start, stop in history.pauses)
    return f" ({count(len(history.pauses), 'pause')} between starts left out, {duration(seconds)})"


def moved(decision: Decision) -> list[str]:
    """Who went from what to what, workers of the same change together: ``2 workers: encode → denoise``."""
    changes = Counter((roles_text(move.before), roles_text(move.after)) for move in decision.moves)
    return [f"{count(number, 'worker')}: {printable(old)} → {printable(new)}" for (old, new), number in changes.items()]


def why(decision: Decision) -> str:
    """What led to it, and which kind of roles was found best: ``encode of run is done (whole models)``."""
    return printable(decision.reason) + (f" ({decision.policy})" if decision.policy not in ("", "none") else "")


def gain(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return ("−" if seconds < 0 else "+" if seconds > 0 else "") + duration(abs(seconds))


def remark(event: Any, history: History) -> str:
    """One line about an event that is no decision."""
    at = duration(max(history.at(float(event["when"])), 0.0))
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

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for decision in history.decisions:
        told = Text("\n").join(
            [Text(why(decision), style="bold"), *map(Text, moved(decision)), *map(Text, _outcome(decision))]
        )
        table.add_row(duration(history.at(decision.when)), told)
    return table


def _outcome(decision: Decision) -> list[str]:
    """What is known of the time that was left, what the change brought and the speed, a line each."""
    left = _known(
        (decision.stay_seconds, duration, "without it"),
        (decision.predicted_seconds, duration, "predicted"),
        (decision.actual_seconds, duration, "as it came"),
    )
    gained = _known(
        (decision.predicted_gain_seconds, gain, "predicted"), (decision.actual_gain_seconds, gain, "as it came")
    )
    speed = _known((decision.rate_before, rate, "before"), (decision.rate_after, rate, "after"))
    return [f"{what}: {known}" for what, known in (("left", left), ("gain", gained), ("speed", speed)) if known]


def _known(*figures: tuple[float | None, Callable[[float], str], str]) -> str:
    return ", ".join(f"{write(value)} {word}" for value, write, word in figures if value is not None)


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
