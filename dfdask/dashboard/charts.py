"""The parts of the page that are plots. Each sends only what is new to its browser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    CustomJSTickFormatter,
    DatetimeTicker,
    DatetimeTickFormatter,
    FactorRange,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from dfdask.dashboard.history import History, spread, worker_text
from dfdask.dashboard.palette import MARK_COLOURS, SLOTS, USE_COLOURS, Palette
from dfdask.dashboard.records import BIN_SECONDS, USES, Bar, Held, Mark, Point, Tail, Use
from dfdask.words import count, duration

ROWS = 40  # workers that get a row of their own; more are shown together
HEIGHT = 345  # of the plots of who runs what, in pixels
GREY = "#80868f"  # reads on white and on black, where a browser does not take the page's own
SLOT_NAMES = tuple(f"slot{number}" for number in range(len(SLOTS)))


class Timeline:
    """Who ran what when: a row per worker."""

    def __init__(self, palette: Palette) -> None:
        self._palette = palette
        self._bars = _Stream({name: [] for name in _BAR_COLUMNS})
        self._now = ColumnDataSource({name: [] for name in _BAR_COLUMNS})
        self._marks = _Stream(
            {"when": [], "worker": [], "name": [], "text": [], "marker": [], "colour": [], "edge": [], "line": []}
        )
        self._x, self._y = Range1d(start=0, end=1), FactorRange(factors=[])
        self.figure = _figure(height=HEIGHT, x_range=self._x, y_range=self._y, name="timeline")
        shape: dict[str, Any] = {"y": "worker", "left": "left", "right": "right", "height": 0.7}
        look: dict[str, Any] = {"fill_color": "colour", "fill_alpha": "alpha", "line_color": None}
        bars = self.figure.hbar(source=self._bars.source, **shape, **look)
        now = self.figure.hbar(source=self._now, **shape, **look)
        marks = self.figure.scatter(
            "when", "worker", source=self._marks.source, marker="marker", size=9, fill_color="colour",
            line_color="edge", line_width="line",
        )  # fmt: skip
        bar_text = [("worker", "@worker"), ("job", "@job"), ("stage", "@stage"), ("items", "@items"), ("", "@calls")]
        self.figure.add_tools(HoverTool(renderers=[bars, now], tooltips=bar_text, attachment="below"))
        self.figure.add_tools(HoverTool(renderers=[marks], tooltips="<b>@name</b> @text", attachment="above"))
        _clock(self.figure, 6)

    def push(self, history: History) -> None:
        state = history.state
        workers = [worker.address for worker in state.workers] if state else []
        rows = [*workers, *(worker for worker in history.gone if worker not in workers)]
        self.figure.visible = len(rows) <= ROWS
        if state is None or not self.figure.visible:
            return
        _follow(self._x, history)
        labels = sorted({history.label(worker) for worker in rows}, key=_natural, reverse=True)
        if labels != self._y.factors:
            self._y.factors = labels
            self.figure.height = max(60 + 22 * len(labels), HEIGHT)
        self._bars.push(history.bars, lambda bars: self._bar_columns(bars, history))
        self._marks.push(history.marks, lambda marks: _mark_columns(marks, history))
        self._now.data = self._bar_columns([*history.growing(), *history.running()], history)

    def _bar_columns(self, bars: Sequence[Bar], history: History) -> dict[str, Any]:
        return {
            "worker": [history.label(bar.worker) for bar in bars],
            "left": [_moment(bar.start) for bar in bars],
            "right": [_moment(bar.end) for bar in bars],
            "colour": [self._palette.colour(bar.stage) for bar in bars],
            "job": [history.names.get(bar.run, bar.run) for bar in bars],
            "stage": [bar.stage for bar in bars],
            "items": [bar.items for bar in bars],
            "calls": [_calls(bar) for bar in bars],
            "alpha": [1.0 if bar.calls else 0.55 for bar in bars],
        }


_BAR_COLUMNS = ("worker", "left", "right", "colour", "job", "stage", "items", "calls", "alpha")


class Crowd:
    """Who ran what when for more workers than there are rows: how many were busy with each stage."""

    def __init__(self, palette: Palette) -> None:
        self._palette = palette
        self._bins = ColumnDataSource({name: [] for name in ("when", *SLOT_NAMES)})
        self._retags = ColumnDataSource({"when": [], "height": [], "text": [], "size": []})
        self._x = Range1d(start=0, end=1)
        self.figure = _figure(height=HEIGHT, x_range=self._x, name="crowd", visible=False)
        self.figure.vbar_stack(
            SLOT_NAMES, x="when", width=BIN_SECONDS * 1030, source=self._bins, fill_color=list(SLOTS), line_color=None
        )
        marks = self.figure.scatter(
            "when", "height", source=self._retags, marker="inverted_triangle", size="size", fill_color="#f2c744",
            line_color=GREY,
        )  # fmt: skip
        self.figure.add_tools(HoverTool(renderers=[marks], tooltips="@text"))
        self.figure.y_range.start = 0
        self.figure.yaxis.axis_label = "busy workers"
        _clock(self.figure, 6)

    def push(self, history: History) -> None:
        state = history.state
        self.figure.visible = state is not None and len(state.workers) + len(history.gone) > ROWS
        if state is None or not self.figure.visible:
            return
        _follow(self._x, history)
        columns = {name: np.zeros(len(history.bins)) for name in SLOT_NAMES}
        places = {one.start: index for index, one in enumerate(history.bins)}
        for index, one in enumerate(history.bins):
            for stage, seconds in one.stage_seconds.items():
                columns[SLOT_NAMES[self._palette.slot(stage)]][index] += seconds
        for bar in history.running():
            column = columns[SLOT_NAMES[self._palette.slot(bar.stage)]]
            for start, seconds in spread(bar.start, bar.end):
                if start in places:
                    column[places[start]] += seconds
        lengths = np.array([min(max(state.when - one.start, 0.5), BIN_SECONDS) for one in history.bins])
        middle = [_moment(one.start + BIN_SECONDS / 2) for one in history.bins]
        self._bins.data = {"when": middle, **{name: column / lengths for name, column in columns.items()}}
        marked = [one for one in history.bins if one.retags]
        self._retags.data = {
            "when": [_moment(one.start + BIN_SECONDS / 2) for one in marked],
            "height": [len(state.workers)] * len(marked),
            "text": [f"{one.retags} role changes, the last of {one.last_retag}" for one in marked],
            "size": [min(7 + one.retags, 20) for one in marked],
        }


class Uses:
    """How the fleet spends its time."""

    def __init__(self) -> None:
        self._rows = _Stream({name: [] for name in ("when", *USES)})
        self._x = Range1d(start=0, end=1)
        self.figure = _figure(height=230, x_range=self._x, y_range=Range1d(start=0, end=1), name="uses")
        colours = [USE_COLOURS[use] for use in USES]
        self.figure.varea_stack(USES, x="when", source=self._rows.source, fill_color=colours, fill_alpha=0.85)
        self.figure.yaxis.formatter = NumeralTickFormatter(format="0%")
        _clock(self.figure, 3)

    def push(self, history: History) -> None:
        _follow(self._x, history, _first(history.uses))
        self._rows.push(history.uses, _use_columns)


_BYTES = """
const units = ["B", "kB", "MB", "GB", "TB", "PB"]
let place = 0
while (tick >= 1000 && place < 5) { tick /= 1000; place++ }
return `${+tick.toPrecision(3)} ${units[place]}`
"""


class HeldBytes:
    """Results in the workers' memory that wait for the next stage."""

    def __init__(self, palette: Palette) -> None:
        self._palette = palette
        self._rows = _Stream({name: [] for name in ("when", *SLOT_NAMES)})
        self._x = Range1d(start=0, end=1)
        self.figure = _figure(height=230, x_range=self._x, name="held")
        self.figure.varea_stack(SLOT_NAMES, x="when", source=self._rows.source, fill_color=list(SLOTS), fill_alpha=0.85)
        self.figure.y_range.start = 0
        self.figure.yaxis.formatter = CustomJSTickFormatter(code=_BYTES)
        _clock(self.figure, 3)

    def push(self, history: History) -> None:
        _follow(self._x, history, _first(history.held))
        self._rows.push(history.held, self._columns)

    def _columns(self, held: Sequence[Held]) -> dict[str, Any]:
        columns: dict[str, Any] = {name: [0] * len(held) for name in SLOT_NAMES}
        for place, one in enumerate(held):
            for stage, nbytes in one.stage_bytes.items():
                columns[SLOT_NAMES[self._palette.slot(stage)]][place] += nbytes
        return {"when": [_moment(one.when) for one in held], **columns}


class Costs:
    """Predicted against measured seconds per item: on the line is right."""

    def __init__(self, palette: Palette) -> None:
        self._palette = palette
        self._rows = _Stream({name: [] for name in ("predicted", "measured", "stage", "colour")})
        self.figure = _figure(height=230, x_axis_type="log", y_axis_type="log", name="costs")
        self.figure.line([1e-4, 1e5], [1e-4, 1e5], line_color=GREY, line_dash="dashed")
        points = self.figure.scatter(
            "predicted",
            "measured",
            source=self._rows.source,
            size=6,
            fill_color="colour",
            fill_alpha=0.6,
            line_color=None,
        )
        for axis_range in (self.figure.x_range, self.figure.y_range):
            axis_range.renderers = [points]
        for axis in self.figure.axis:
            axis.ticker = FixedTicker(ticks=[float(f"{part}e{power}") for power in range(-5, 6) for part in (1, 3)])
            axis.formatter = PrintfTickFormatter(format="%g")
        self.figure.xaxis.axis_label, self.figure.yaxis.axis_label = "predicted s per item", "measured"
        text = [("stage", "@stage"), ("predicted", "@predicted{0.0000} s"), ("measured", "@measured{0.0000} s")]
        self.figure.add_tools(HoverTool(renderers=[points], tooltips=text))

    def push(self, history: History) -> None:
        self._rows.push(history.points, self._columns)

    def _columns(self, points: Sequence[Point]) -> dict[str, Any]:
        return {
            "predicted": [point.predicted_seconds for point in points],
            "measured": [point.measured_seconds for point in points],
            "stage": [point.stage for point in points],
            "colour": [self._palette.colour(point.stage) for point in points],
        }


class _Stream:
    """A Bokeh source that gets from a tail what it has not had yet."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.source = ColumnDataSource(columns)
        self._seen = 0

    def push(self, tail: Tail[Any], columns: Any) -> None:
        new = tail.since(self._seen)
        if new:
            self.source.stream(columns(new), rollover=tail.limit)
        self._seen = tail.count


def _use_columns(uses: Sequence[Use]) -> dict[str, Any]:
    columns = {use: [one.shares[use] for one in uses] for use in USES}
    return {"when": [_moment(one.when) for one in uses], **columns}


def _mark_columns(marks: Sequence[Mark], history: History) -> dict[str, Any]:
    markers = {"retag": "inverted_triangle", "joined": "plus", "left": "x"}
    return {
        "when": [_moment(mark.when) for mark in marks],
        "worker": [history.label(mark.worker) for mark in marks],
        "name": [worker_text(history.label(mark.worker)) for mark in marks],
        "text": [mark.text for mark in marks],
        "marker": [markers[mark.kind] for mark in marks],
        "colour": [MARK_COLOURS[mark.kind] for mark in marks],
        "edge": [GREY if mark.kind == "retag" else MARK_COLOURS[mark.kind] for mark in marks],
        "line": [3 if mark.kind == "left" else 1 for mark in marks],  # an x is nothing but its lines
    }


def _figure(**options: Any) -> Any:
    plot = figure(
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=8,
        min_border_right=12,
        output_backend="canvas",
        **options,
    )
    for axis in plot.axis:
        axis.axis_line_color = axis.major_tick_line_color = axis.major_label_text_color = GREY
        axis.axis_label_text_color = GREY
        axis.minor_tick_line_color = None
        axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_color = GREY
    plot.grid.grid_line_alpha = 0.2
    return plot


def _clock(plot: Any, ticks: int) -> None:
    """An x axis of times of day, as the scheduler's machine has it."""
    formats: dict[str, Any] = dict.fromkeys(("milliseconds", "seconds", "minsec"), "%H:%M:%S")
    formats |= dict.fromkeys(("minutes", "hourmin", "hours", "days"), "%H:%M")
    plot.xaxis.formatter = DatetimeTickFormatter(**formats)
    plot.xaxis.ticker = DatetimeTicker(desired_num_ticks=ticks, num_minor_ticks=0)


def _follow(axis: Range1d, history: History, first: float | None = None) -> None:
    """Move the axis on to now; ``first`` is when its data begin."""
    start, end = history.span(first)
    axis.update(start=_moment(start), end=_moment(end))


def _first(tail: Tail[Any]) -> float | None:
    rows = tail.since(0)
    return rows[0].when if rows else None


def _moment(when: float) -> float:
    """Milliseconds, shifted so that Bokeh, which knows UTC only, writes the local time."""
    return (when + time.localtime(when).tm_gmtoff) * 1000


def _calls(bar: Bar) -> str:
    spent = duration(bar.end - bar.start)
    if bar.calls:
        return f"{count(bar.calls, 'call')} in {spent}"
    return f"loaded or waited for {spent}" if bar.run else "running"


def _natural(label: str) -> tuple[Any, ...]:
    return (len(label), label) if label.isdigit() else (1000, label)


def charts(palette: Palette) -> tuple[Timeline | Crowd | Uses | HeldBytes | Costs, ...]:
    return Timeline(palette), Crowd(palette), Uses(), HeldBytes(palette), Costs(palette)
