"""One open page: its Bokeh document, kept up to date with what the sampler sees."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bokeh.models.css import InlineStyleSheet
from bokeh.models.widgets import Div

from dfdask.dashboard import cards
from dfdask.dashboard.charts import charts
from dfdask.dashboard.history import History
from dfdask.dashboard.palette import Palette

if TYPE_CHECKING:
    from bokeh.document import Document

_TEXTS = ("headline", "lanes", "stages", "use_names", "pictures", "failures", "decisions")


class View:
    """What one browser sees. Not more than one update is on its way to it, however slowly it reads."""

    def __init__(self, document: Document, palette: Palette, extra: Mapping[str, Any]) -> None:
        self._document = weakref.ref(document)
        self._divs = {name: _div(name) for name in _TEXTS}
        self._charts = charts(palette)
        self._is_due = False
        self._next: tuple[History, Mapping[str, str]] | None = None
        self.failures = 0  # in a row
        self.problem: Exception | None = None
        with document.models.freeze():  # else Bokeh looks at all models again after each
            for root in (*self._divs.values(), *(chart.figure for chart in self._charts)):
                document.add_root(root)
        document.title = "dfdask"
        document.template = _template()
        document.template_variables.update(extra)

    @property
    def is_open(self) -> bool:
        """Whether the browser may still be there: Bokeh ends the session of one that has been gone for a while."""
        document = self._document()
        return document is not None and document.session_context is not None

    def show(self, history: History, texts: Mapping[str, str]) -> None:
        """Change the document; its lock must be held."""
        for name, text in texts.items():
            if self._divs[name].text != text:
                self._divs[name].text = text
        for chart in self._charts:
            chart.push(history)

    def send(self, history: History, texts: Mapping[str, str], spent: Any) -> None:
        """Show this as soon as the document is free; what waited to be shown is dropped for it.

        Bokeh holds the document's lock until the browser's connection has taken all of the last change.
        """
        document = self._document()
        if document is None:
            return
        self._next = history, texts
        if not self._is_due:
            self._is_due = True
            document.add_next_tick_callback(lambda: self._apply(spent))

    def _apply(self, spent: Any) -> None:
        self._is_due = False
        if self._next is None:
            return
        with spent:
            try:
                self.show(*self._next)
                self.failures = 0
            except Exception as error:
                self.failures, self.problem = self.failures + 1, error
        self._next = None


def render(history: History, palette: Palette) -> dict[str, str]:
    """The texts of all views."""
    return {
        "headline": cards.headline(history),
        "lanes": cards.lanes(history, palette),
        "stages": cards.timeline_legend(palette),
        "use_names": cards.uses_legend(),
        "pictures": cards.pictures(history),
        "failures": cards.failures(history),
        "decisions": cards.decisions(history),
    }


def _div(name: str) -> Div:
    style = InlineStyleSheet(css=_data("page.css"))
    return Div(name=name, sizing_mode="stretch_width", stylesheets=[style], disable_math=True)


@cache
def _data(name: str) -> str:
    return (files("dfdask.dashboard") / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    """Dask's own frame, with its tabs, around the page."""
    from distributed.dashboard.components.scheduler import env

    return env.from_string(_data("page.html"))
