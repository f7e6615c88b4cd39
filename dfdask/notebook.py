"""Runs, jobs and fleets in a notebook: live while a kernel runs, plain HTML afterwards.

IPython and ipywidgets are used where they are there; only ``controls`` needs them.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dfdask.errors import DfdaskError
from dfdask.events import Progress
from dfdask.markup import fleet_html, html, job_html
from dfdask.words import ENDED, count, status_line

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Controls", "Fleet", "controls", "html", "register", "watch"]


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
    """Let IPython show a Run that ends a cell with ``watch``, a JobSpec as a table. Nothing happens elsewhere."""
    formatter = getattr(_shell(), "display_formatter", None)
    if formatter is not None:
        formatter.ipython_display_formatter.for_type_by_name("dfdask.run", "Run", watch)
        formatter.formatters["text/html"].for_type_by_name("dfdask.spec", "JobSpec", _job)


class Controllable(Watched, Protocol):
    """A Run that is made here."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop(self) -> None: ...


class Controls:
    """A view of a run with buttons. ``pause.click()`` in code is the same as a click."""

    def __init__(self, run: Controllable, interval_seconds: float = 0.5) -> None:
        widgets = _widgets()
        self._run = run
        self._view = widgets.HTML(html(run.progress))
        self.pause, self.resume, self.stop = (
            widgets.Button(description=name, icon=icon, layout={"width": "100px"})
            for name, icon in (("Pause", "pause"), ("Resume", "play"), ("Stop", "stop"))
        )
        for button, action in ((self.pause, run.pause), (self.resume, run.resume), (self.stop, run.stop)):
            button.on_click(lambda _, action=action: self._act(action))
        self.widget = widgets.VBox([self._view, widgets.HBox([self.pause, self.resume, self.stop])])
        self._update()
        threading.Thread(target=self._follow, args=(interval_seconds,), name="dfdask-controls", daemon=True).start()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, and the state of the moment for where no kernel runs."""
        bundle: Any = self.widget._repr_mimebundle_(**options)
        parts: dict[str, Any] = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        progress = self._run.progress
        return {**parts, "text/html": html(progress), "text/plain": status_line(progress)}

    def _act(self, action: Any) -> None:
        action()
        self._update()

    def _follow(self, interval_seconds: float) -> None:
        pause = threading.Event()
        while self._run.progress.phase not in ENDED:
            self._update()
            pause.wait(interval_seconds)
        self._update()

    def _update(self) -> None:
        progress = self._run.progress
        view = html(progress)
        if self._view.value != view:
            self._view.value = view
        self.pause.disabled = progress.phase != "running"
        self.resume.disabled = progress.phase != "paused"
        self.stop.disabled = progress.phase not in ("running", "paused")


def controls(run: Controllable) -> Controls:
    """``run`` with buttons to pause, resume and stop it. Raises DfdaskError where ipywidgets is not installed."""
    return Controls(run)


class Fleet:
    """The workers and jobs of a cluster, as they are each time that this is shown."""

    def __init__(self, cluster: Client | str) -> None:
        self._cluster = cluster

    def state(self) -> Mapping[str, Any]:
        """A ClusterState as a dict. Raises ClusterError."""
        from dfdask.watch import cluster_state

        if isinstance(self._cluster, str):
            return cluster_state(self._cluster)
        scheduler: Any = self._cluster.scheduler
        state: Mapping[str, Any] = self._cluster.sync(scheduler.dfdask_state)
        return state

    def __repr__(self) -> str:
        state = self.state()
        return f"<Fleet: {count(len(state['workers']), 'worker')}, {count(len(state['jobs']), 'job')}>"

    def _repr_html_(self) -> str:
        return fleet_html(self.state())


def _widgets() -> Any:
    try:
        return importlib.import_module("ipywidgets")
    except ImportError:
        raise DfdaskError("controls need ipywidgets; install them with: pip install 'dfdask[notebooks]'") from None


def _job(spec: Any) -> str:
    return job_html(spec.model_dump(exclude_defaults=True))


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
