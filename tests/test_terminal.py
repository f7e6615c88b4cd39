"""The painter against a terminal emulator: what people see, and how little is written for it."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyte
import pytest
from rich.console import Console
from rich.text import Text
from samples import PROGRESS

from dfdask.progress import live
from dfdask.terminal import Painter

WIDTH, HEIGHT = 80, 12


class Screen:
    """A console, and what it shows."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, width=width, height=height, force_terminal=True, highlight=False)
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.Stream(self.screen)
        self._read = 0

    def written(self) -> str:
        """What came since the last look; it is fed to the emulator as a terminal in its usual mode would get it."""
        text = self.file.getvalue()[self._read :]
        self._read += len(text)
        self._stream.feed(text.replace("\n", "\r\n"))
        return text

    def lines(self) -> list[str]:
        self.written()
        rows = [line.rstrip() for line in self.screen.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def test_only_what_changed_is_written() -> None:
    screen = Screen()
    with Painter(screen.console) as painter:
        painter.paint(Text("one\ntwo\nthree"))
        assert screen.lines() == ["one", "two", "three"]
        painter.paint(Text("one\ntwo\nthree"))
        assert screen.written() == ""
        painter.paint(Text("one\n2\nthree"))
        assert len(screen.written()) < 20
        assert screen.lines() == ["one", "2", "three"]
        painter.paint(Text("1\n2\n3"))
        assert screen.lines() == ["1", "2", "3"]
        painter.paint(Text("1\n2\n3\n4"))
        assert screen.lines() == ["1", "2", "3", "4"]
        painter.paint(Text("only"))
        assert screen.lines() == ["only"]
        assert screen.screen.cursor.hidden
    assert screen.lines() == []
    assert not screen.screen.cursor.hidden


def test_a_second_of_a_job_is_a_few_bytes() -> None:
    screen = Screen(100, 24)
    with Painter(screen.console) as painter:
        painter.paint(live(PROGRESS))
        whole = len(screen.written())
        for second in range(1, 11):
            stages = (replace(PROGRESS.stages[0], done=832 + second), PROGRESS.stages[1])
            painter.paint(live(replace(PROGRESS, elapsed_seconds=400.2 + second, stages=stages)))
            assert 0 < len(screen.written()) < whole / 2
        assert any("842" in line for line in screen.lines())


def test_what_is_printed_meanwhile_goes_above() -> None:
    screen = Screen()
    with Painter(screen.console) as painter:
        painter.paint(Text("a\nb"))
        screen.console.print("a warning")
        assert screen.lines() == ["a warning", "a", "b"]
        painter.paint(Text("a\nc"))
        assert screen.lines() == ["a warning", "a", "c"]
        for line in range(20):
            screen.console.print(f"line {line}")
        painter.paint(Text("d\nc"))
        assert screen.lines()[-3:] == ["line 19", "d", "c"]
    assert screen.lines()[-1] == "line 19"


def test_it_is_cut_to_the_screen() -> None:
    screen = Screen(20, 6)
    with Painter(screen.console) as painter:
        painter.paint(Text("\n".join(f"line {line}" for line in range(40))))
        assert screen.lines()[0] == "line 0" and len(screen.lines()) == 5
        painter.paint(Text("\n".join(f"Line {line}" for line in range(40))))
        assert screen.lines()[0] == "Line 0" and len(screen.lines()) == 5


def test_a_window_that_changes_its_size() -> None:
    screen = Screen(40, 10)
    with Painter(screen.console) as painter:
        painter.paint(Text("a\nb"))
        screen.lines()
        screen.console.width = 30
        painter.paint(Text("a\nb"))
        assert "a" in screen.written()


JOB = """
import sys, time, warnings
from dataclasses import replace
from rich.console import Console
sys.path.insert(0, sys.argv[1])
from samples import PROGRESS
from dfdask.progress import follow

class Job:
    progress, polls = PROGRESS, 0
    def wait(self, timeout=None):
        self.polls += 1
        time.sleep(0.05)
        self.progress = replace(self.progress, committed_items=812 + self.polls, elapsed_seconds=400.0 + self.polls)
        if self.polls == 10:
            warnings.warn("odd", stacklevel=1)
            print("said on stdout")
        if self.polls >= 30:
            self.progress = replace(self.progress, phase="finished")
            return
        raise TimeoutError
    def stop(self): ...

follow(Job(), Console(highlight=False), "live")
print("the end")
"""


def test_in_a_real_terminal() -> None:
    """A process with a terminal of its own: warnings and prints stand above the view, the view leaves no trace."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, str(tests)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        cwd=tests.parent,
    )
    os.close(slave)
    data, reads, end = b"", 0, time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data += os.read(master, 65536)
                reads += 1
            except OSError:
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait() == 0, data
    screen = pyte.Screen(80, 24)
    pyte.ByteStream(screen).feed(data)
    rows = [line.rstrip() for line in screen.display if line.strip()]
    assert any("odd" in row for row in rows) and rows[-2:] == ["said on stdout", "the end"]
    assert not any("denoise" in row for row in rows)
    assert not screen.cursor.hidden
    assert 1000 < len(data) < 8000 and reads < 40


@pytest.mark.parametrize("width", [1, 5, 30])
def test_narrow_windows(width: int) -> None:
    screen = Screen(width, 5)
    with Painter(screen.console) as painter:
        painter.paint(live(PROGRESS))
        painter.paint(live(replace(PROGRESS, committed_items=900)))
        assert len(screen.lines()) <= 5
    assert screen.lines() == []
