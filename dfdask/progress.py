"""A job in the terminal: a calm live view for people, plain lines for logs, JSON lines for programs.

``follow`` and ``watch`` are all that the command line needs; what they draw are pure functions of a Progress.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dfdask.errors import JobStopped
from dfdask.events import Progress
from dfdask.words import ENDED, count, duration, notes, pace, percent, printable, rate, status_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Look = Literal["live", "lines", "json"]

POLL_SECONDS = 0.25
LIVE_SECONDS = 1.0  # more often is no help to people, and a burden on a slow line
LINE_SECONDS = 5.0
LATER_LINE_SECONDS = 30.0  # after five minutes: a day-long job must not fill its log
INTERRUPTED = 130
_BAR_WIDTH = 32


class Job(Protocol):
    """What is followed: a Run."""

    @property
    def progress(self) -> Progress: ...

    def wait(self, timeout: float | None = None) -> Any: ...

    def stop(self) -> None: ...


SAME_COMMAND = "the same command goes on from there"


def follow(job: Job, console: Console, look: Look, again: str = SAME_COMMAND) -> Progress:
    """Show ``job`` until it ends and return its last state. Raises what ``job.wait`` raises.

    The first Ctrl-C (or SIGTERM) stops the job and keeps what is committed; the second leaves at once. ``again`` says
    how to go on with one that was stopped.
    """
    view = _VIEWS[look](console)
    interrupts = _Interrupts(console)
    stopping = False
    with interrupts.caught(), view.shown():
        while True:
            view.update(job.progress)
            if interrupts.count and not stopping:
                stopping = True
                if look != "json":
                    console.print("Stopping: finishing what is nearly done. Ctrl-C again leaves at once.")
                job.stop()
            if _ended(job):
                break
        view.update(job.progress)
    job.wait()  # raises what ended the job
    progress = job.progress
    if progress.phase == "stopped":
        raise JobStopped(f"stopped with {_done(progress)} committed; {again}")
    return progress


def watch(states: Iterator[tuple[Progress, str]], console: Console, look: Look) -> Progress | None:
    """Show ``states``, each with a remark, as they come; return the last. Ctrl-C leaves, and there is none."""
    view = _VIEWS[look](console)
    last: Progress | None = None
    with view.shown():
        try:
            for last, remark in states:  # noqa: B007
                view.update(last, remark)
        except KeyboardInterrupt:
            return None
    return last


def live(progress: Progress, remark: str = "") -> RenderableType:
    """The live view: a bar, the speed, one row per stage, where the dashboard is."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(
        total=max(progress.items, 1),
        completed=progress.committed_items if progress.items else 1,
        width=_BAR_WIDTH,
        complete_style="green" if progress.phase == "finished" else "cyan",
        finished_style="green",
    )
    head.add_row(
        Text(printable(progress.run), style="bold", no_wrap=True, overflow="ellipsis"),
        bar,
        Text(f"{percent(progress.committed_items, progress.items):>4}", no_wrap=True),
        Text(pace(progress) or progress.phase, no_wrap=True, overflow="ellipsis"),
    )
    facts = [_done(progress), notes(progress), remark or f"{duration(progress.elapsed_seconds)} so far"]
    line = Text(f"  {', '.join(fact for fact in facts if fact)}", style="dim", no_wrap=True, overflow="ellipsis")
    line.highlight_regex(r"\d[\d,]* failed", "not dim red")
    parts: list[RenderableType] = [head, line]
    if progress.stages and progress.phase not in ENDED:
        parts.append(_stages(progress))
    if progress.dashboard and progress.phase not in ENDED:
        parts.append(Text(f"  dashboard {printable(progress.dashboard)}", style="dim", no_wrap=True))
    return Group(*parts)


def header(progress: Progress, model: str, lines: bool) -> list[tuple[str, str]]:
    """What is about to run; with ``lines`` also the dashboard, which the live view has of itself."""
    rows = [
        ("run", progress.run),
        ("model", model),
        ("items", f"{progress.items:,}"),
        ("output", progress.output),
    ]
    return [*rows, ("dashboard", progress.dashboard)] if progress.dashboard and lines else rows


def summary(progress: Progress) -> list[tuple[str, str]]:
    """What an ended job leaves behind, as labels and values."""
    rows = [("items", f"{_done(progress)} committed")]
    if progress.resumed_items:
        rows.append(("", f"{progress.resumed_items:,} of them were there already"))
    rows.append(("failed", f"{progress.failed_items:,}"))
    took = duration(progress.elapsed_seconds)
    made = progress.committed_items - progress.resumed_items
    if made > 0 and progress.elapsed_seconds > 0:
        took += f", {rate(progress.items_per_second or made / progress.elapsed_seconds)}"
    rows.append(("time", took))
    return [*rows, ("dataset", progress.output)]


def print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    """Labels and values in two columns; a value stays on one line, so that a path can be copied."""
    from rich.text import Text

    width = max(9, *(len(label) for label, _ in rows)) + 2
    for label, value in rows:
        style = "red" if label == "failed" and value != "0" else ""
        line = Text.assemble((f"{label:<{width}}", "dim"), (printable(value), style))
        console.print(line, soft_wrap=True)


def _stages(progress: Progress) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("  stage", no_wrap=True, overflow="ellipsis")
    for column in ("queued", "running", "done", "workers"):
        table.add_column(column, justify="right", no_wrap=True, min_width=7)
    for stage in progress.stages:
        name = Text(f"  {printable(stage.name)}")
        busy = Text(f"{stage.running:,}", style="cyan" if stage.running else "dim")
        table.add_row(name, f"{stage.queued:,}", busy, f"{stage.done:,}", f"{stage.workers:,}")
    return table


def _done(progress: Progress) -> str:
    return f"{progress.committed_items:,} of {count(progress.items, 'item')}"


def _ended(job: Job) -> bool:
    try:
        job.wait(timeout=POLL_SECONDS)
    except Exception as error:  # a timeout, or what ended the job: that is raised once the view is closed
        if job.progress.phase not in ENDED and not isinstance(error, TimeoutError):
            raise
    return job.progress.phase in ENDED


class _View(Protocol):
    def __init__(self, console: Console) -> None: ...

    def shown(self) -> AbstractContextManager[Any]: ...

    def update(self, progress: Progress, remark: str = "") -> None: ...


class _Live:
    """Redraws in place, once a second or when the phase changes."""

    def __init__(self, console: Console) -> None:
        from dfdask.terminal import Painter

        self._painter = Painter(console)
        self._phase, self._drawn = "", 0.0

    def shown(self) -> AbstractContextManager[Any]:
        return self._painter

    def update(self, progress: Progress, remark: str = "") -> None:
        now = time.monotonic()
        if progress.phase != self._phase or now - self._drawn >= LIVE_SECONDS:
            self._painter.paint(live(progress, remark))
            self._phase, self._drawn = progress.phase, now


class _Lines:
    """A line when the phase changes, at the end, and every few seconds in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._started = self._printed = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def update(self, progress: Progress, remark: str = "") -> None:
        now = time.monotonic()
        pause = LINE_SECONDS if now - self._started < 300 else LATER_LINE_SECONDS
        due = progress.phase not in ENDED and now - self._printed >= pause
        if due or progress.phase != self._phase:
            self._print(progress, remark)
            self._phase, self._printed = progress.phase, now

    def _print(self, progress: Progress, remark: str) -> None:
        line = f"[{duration(progress.elapsed_seconds)}] {status_line(progress)}"
        self._console.print(f"{line}; {remark}" if remark else line, markup=False, highlight=False, soft_wrap=True)


class _JsonLines(_Lines):
    """The same as JSON, one Progress a line, unbuffered."""

    def _print(self, progress: Progress, remark: str) -> None:
        line = json.dumps({"event": "Progress", "when": round(time.time(), 3), **asdict(progress)}, ensure_ascii=False)
        self._console.file.write(line + "\n")
        self._console.file.flush()


_VIEWS: dict[Look, type[_View]] = {"live": _Live, "lines": _Lines, "json": _JsonLines}


class _Interrupts:
    """Counts Ctrl-C and SIGTERM; doing more in a signal handler could deadlock."""

    def __init__(self, console: Console) -> None:
        self.count = 0
        self._console = console

    @contextmanager
    def caught(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            if self._console.is_terminal:
                os.write(self._console.file.fileno(), b"\x1b[?25h\n")  # show the cursor again
            os._exit(INTERRUPTED)
