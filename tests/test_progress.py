"""The terminal view: what it draws, when it prints, and how Ctrl-C ends it."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console
from samples import ENDED, PROGRESS

from dfdask.errors import ClusterError, JobStopped
from dfdask.events import Progress, StageProgress
from dfdask.progress import follow, header, live, print_rows, summary


class Script:
    """A job that goes through given states, one per ``wait``, and ends as told."""

    def __init__(self, *states: Progress, error: Exception | None = None, wait_raises: bool = True) -> None:
        self.states, self.error, self.wait_raises = list(states), error, wait_raises
        self.stops = 0

    @property
    def progress(self) -> Progress:
        return self.states[0]

    def wait(self, timeout: float | None = None) -> Script:
        if len(self.states) > 1:
            self.states.pop(0)
        if self.progress.phase in ("finished", "stopped", "failed"):
            if self.error:
                raise self.error
        elif self.wait_raises:
            raise TimeoutError
        return self

    def stop(self) -> None:
        self.stops += 1
        self.states = [replace(self.progress, phase="stopped")]


def text_of(draw: Callable[[Console], None], width: int = 100, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=terminal)
    draw(console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_live_view_shows_stages_speed_and_dashboard() -> None:
    text = text_of(lambda console: console.print(live(PROGRESS)))
    for part in (
        "demo",
        "49%",
        "2.10 items/s, 6 min 30 s left",
        "812 of 1,632 items",
        "2 failed",
        "8787/status",
    ):
        assert part in text
    rows = {words[0]: words[1:] for words in (line.split() for line in text.splitlines()) if words}
    assert rows["stage"] == ["queued", "running", "done", "workers"]
    assert rows["encode"] == ["0", "8", "832", "2"]
    assert rows["denoise"] == ["1,200", "16", "820", "2"]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_live_view_keeps_its_height_in_narrow_terminals(width: int) -> None:
    text = text_of(lambda console: console.print(live(replace(PROGRESS, run="r" * 60))), width)
    assert len(text.splitlines()) <= 8
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize(
    "progress",
    [
        replace(PROGRESS, phase="preparing", items=0, committed_items=0, stages=(), workers=0, dashboard=None),
        replace(PROGRESS, items_per_second=None, eta_seconds=None),
        replace(PROGRESS, committed_items=2000),
        ENDED,
    ],
)
def test_live_view_of_odd_states(progress: Progress) -> None:
    assert "demo" in text_of(lambda console: console.print(live(progress)))


def test_names_from_outside_cannot_command_the_terminal() -> None:
    stage = StageProgress("\x1b[2Jencode[bold]", 0, 0, 0, 0)
    odd = replace(PROGRESS, run="\x1b]0;x\x07[red]name", stages=(stage,), dashboard="\x1b[2J")
    text = text_of(lambda console: console.print(live(odd)), terminal=False)
    text += text_of(lambda console: print_rows(console, [*header(odd, "\x1b[2J", True), *summary(odd)]))
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]name" in text and "encode[bold]" in text


def test_header_names_the_dashboard_where_no_live_view_does() -> None:
    assert dict(header(PROGRESS, "bundled", lines=True))["dashboard"] == PROGRESS.dashboard
    assert list(dict(header(PROGRESS, "bundled", lines=False))) == ["run", "model", "items", "output"]


def test_summary_names_what_was_made_and_where() -> None:
    rows = dict(summary(ENDED))
    assert rows["items"] == "1,632 of 1,632 items committed"
    assert rows["failed"] == "2"
    assert rows["time"] == "6 min 40 s, 2.10 items/s"
    assert rows["dataset"] == "runs/demo"


def test_summary_of_a_run_that_was_complete_already_claims_no_speed() -> None:
    rows = dict(summary(replace(ENDED, resumed_items=1632, items_per_second=None, elapsed_seconds=0.21)))
    assert rows["time"] == "0.2 s"
    assert rows[""] == "1,632 of them were there already"


def test_long_paths_stay_on_one_line() -> None:
    path = "s3://bucket/" + "x" * 300
    assert path in text_of(lambda console: print_rows(console, summary(replace(ENDED, output=path))), width=60)


@pytest.mark.parametrize("wait_raises", [True, False])
def test_plain_lines_mark_every_phase_once(wait_raises: bool) -> None:
    job = Script(replace(PROGRESS, phase="preparing"), PROGRESS, PROGRESS, PROGRESS, ENDED, wait_raises=wait_raises)
    text = text_of(lambda console: follow(job, console, look="lines"))
    assert [line.split("] ")[1].split(":")[0] for line in text.splitlines()] == [
        "preparing",
        "running",
        "finished",
    ]


def test_live_view_leaves_no_trace_behind() -> None:
    text = text_of(lambda console: follow(Script(PROGRESS, ENDED), console, look="live"), terminal=True)
    assert text.endswith("\x1b[J\x1b[?25h")  # erased, the cursor shown again


@pytest.mark.parametrize("terminal", [True, False])
def test_errors_of_the_job_are_raised_after_the_view(terminal: bool) -> None:
    job = Script(PROGRESS, replace(PROGRESS, phase="failed"), error=ClusterError("scheduler went away"))
    console = Console(file=io.StringIO(), force_terminal=terminal)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ClusterError, match="went away"):
        follow(job, console, look="live" if terminal else "lines")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_job_is_told_apart_from_a_finished_one() -> None:
    job = Script(PROGRESS, replace(PROGRESS, phase="stopped"))
    with pytest.raises(JobStopped, match="812 of 1,632 items committed"):
        follow(job, Console(file=io.StringIO()), look="lines")


@pytest.mark.parametrize(("signals", "code", "stops"), [(1, 0, True), (2, 130, False)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_interrupt_stops_the_second_leaves(number: int, signals: int, code: int, stops: bool) -> None:
    """In a process of its own, because the second one ends it. Its job never stops when interrupted twice."""
    script = textwrap.dedent(
        f"""
        import sys, threading, time
        from dataclasses import replace
        from rich.console import Console
        from dfdask.errors import JobStopped
        from dfdask.events import Progress
        from dfdask.progress import follow

        class Job:
            progress = Progress("r", "o", "running", 9, 3, 0, 0, 3, 1, 1.0, 1.0, 6.0, (), 1, None)
            ended = threading.Event()
            def wait(self, timeout=None):
                if not self.ended.wait(timeout):
                    raise TimeoutError
            def stop(self):
                print("stop asked", flush=True)
                if {stops}:
                    self.progress = replace(self.progress, phase="stopped")
                    self.ended.set()

        try:
            follow(Job(), Console(), look="lines")
        except JobStopped as error:
            print("stopped:", error)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert "running:" in process.stdout.readline()
        process.send_signal(number)
        assert process.stdout.readline().startswith("Stopping:")
        assert process.stdout.readline() == "stop asked\n"
        if signals == 2:
            process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == code
        assert ("stopped: stopped with 3 of 9 items committed" in rest) == stops
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
