"""A run in a notebook: a view that keeps itself up to date while a kernel runs, plain HTML afterwards.

IPython is used where it is there and never needed.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any, Protocol

from dfdask.events import Progress
from dfdask.markup import html
from dfdask.words import ENDED, status_line

__all__ = ["html", "register", "watch"]


class Watched(Protocol):
    """Anything with a ``progress``, such as a Run."""

    @property
    def progress(self) -> Progress: ...


def watch(run: Watched, interval_seconds: float = 0.5) -> None:
    """Show ``run`` and return at once; in a notebook the view follows the job until it ends.

    Elsewhere the state of the moment is printed, once.
    """
    progress = run.progress
    shell = _shell()
    if shell is None or type(shell).__name__ == "TerminalInteractiveShell":  # a terminal cannot take updates
        print(status_line(progress))
        return
    display: Any = importlib.import_module("IPython.display").display
    handle = display(_bundle(progress), raw=True, display_id=True)
    if progress.phase not in ENDED:
        follower = threading.Thread(
            target=_follow, args=(run, handle, interval_seconds), name="dfdask-notebook", daemon=True
        )
        follower.start()


def register() -> None:
    """Let IPython show a Run that ends a cell with ``watch``. Nothing happens outside a running IPython."""
    formatter = getattr(getattr(_shell(), "display_formatter", None), "ipython_display_formatter", None)
    if formatter is not None:
        formatter.for_type_by_name("dfdask.run", "Run", watch)


def _shell() -> Any:
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython() if get_ipython else None


def _bundle(progress: Progress) -> dict[str, str]:
    return {"text/html": html(progress), "text/plain": status_line(progress)}


def _follow(run: Watched, handle: Any, interval_seconds: float) -> None:
    shown: dict[str, str] = {}
    pause = threading.Event()
    while True:
        progress = run.progress
        bundle = _bundle(progress)
        if bundle != shown:
            handle.update(bundle, raw=True)
            shown = bundle
        if progress.phase in ENDED:
            return
        pause.wait(interval_seconds)
