"""Drawing in a terminal that may be at the far end of a slow line: only lines that changed are written.

``Painter`` keeps a few lines at the bottom of the screen. What is printed meanwhile, through the console or to
stdout and stderr, goes above them.
"""

from __future__ import annotations

import io
import sys
import threading
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleRenderable, RenderableType, RenderHook
from rich.control import Control
from rich.file_proxy import FileProxy
from rich.segment import ControlType, Segment

_HIDE, _SHOW, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[K", "\x1b[J"


class Painter(RenderHook):
    """A context in which ``paint`` shows something in place of what it showed before; nothing stays behind."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: list[str] = []
        self._size: Any = None
        self._lock = threading.RLock()
        self._stack = ExitStack()

    def __enter__(self) -> Painter:
        self._console.push_render_hook(self)
        self._stack.callback(self._console.pop_render_hook)
        # What is printed past the console would stand in the middle of the view.
        out: Any = FileProxy(self._console, sys.stdout)
        err: Any = FileProxy(self._console, sys.stderr)
        if self._console.file is sys.stdout:
            self._stack.enter_context(redirect_stdout(out))
            self._stack.enter_context(redirect_stderr(err))
        self._console.control(_raw(_HIDE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            text, self._lines = _erasing(self._lines) + _SHOW, []
        self._console.control(_raw(text))
        self._stack.close()

    def paint(self, content: RenderableType) -> None:
        """Show ``content``, cut to the screen. One write, or none where nothing changed."""
        with self._lock:
            size, lines = self._console.size, self._rendered(content)
            if size == self._size and len(lines) == len(self._lines):
                text = _changing(self._lines, lines)
            else:  # also in a window of another size, where the old lines may be anywhere
                text = _erasing(self._lines) + "\n".join(lines)
            self._lines, self._size = lines, size
        if text:
            self._console.control(_raw(text))

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What the console calls when something else is printed: that goes above."""
        with self._lock:
            if not self._lines:
                return renderables
            return [_raw(_erasing(self._lines)), *renderables, _raw("\n".join(self._lines))]

    def _rendered(self, content: RenderableType) -> list[str]:
        size, file = self._console.size, io.StringIO()
        colours: Any = self._console.color_system
        Console(
            file=file,
            width=max(size.width - 1, 1),
            height=size.height,
            color_system=colours,
            force_terminal=True,
            highlight=False,
        ).print(content)
        return file.getvalue().splitlines()[: max(size.height - 1, 1)]


def _changing(old: list[str], new: list[str]) -> str:
    """What turns ``old`` lines into as many ``new`` ones; the cursor is behind the last line before and after."""
    at = last = len(old) - 1
    parts = []
    for place, line in enumerate(new):
        if line != old[place]:
            parts.append(f"{_moved(place - at)}\r{line}{_CLEAR_LINE}")
            at = place
    return "".join([*parts, _moved(last - at)])


def _erasing(lines: list[str]) -> str:
    return f"\r{_moved(1 - len(lines))}{_CLEAR_BELOW}" if lines else ""


def _moved(lines: int) -> str:
    return f"\x1b[{lines}B" if lines > 0 else f"\x1b[{-lines}A" if lines < 0 else ""


def _raw(text: str) -> Control:
    control = Control()
    control.segment = Segment(text, None, [(ControlType.CARRIAGE_RETURN,)])
    return control
