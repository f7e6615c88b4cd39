"""Small charts as SVG text: no script, no style sheet, legible on light and dark pages, tooltips by ``<title>``.

Colours are CSS variables (``--dfdask-0`` and so on) with a default, so that a page may have its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dfdask.history import Decision, History, Move, roles_text
from dfdask.words import duration, printable

WIDTH = 860
COLOURS = ("#3b7dd8", "#e08a1e", "#2e9e6b", "#9b5de5", "#d1495b", "#1b9aaa", "#8d6e63", "#7f8c8d")
MOST_LANES = 400
_LEFT, _RIGHT, _BOTTOM = 64, 12, 26
_CELLS = 12_000  # of all lanes together: a page stays below a megabyte
_MARKS = 400
_POINTS = 1500
_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
_FONT = 'font-family="system-ui,sans-serif" font-size="11" fill="currentColor"'


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to pixels, linear or logarithmic, with ticks at round numbers; ``time`` are seconds."""

    low: float
    high: float
    start_px: float
    stop_px: float
    log: bool = False
    time: bool = False

    def px(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(max(value, self.low)) if self.log else value
        return self.start_px + (place - low) / (high - low) * (self.stop_px - self.start_px)

    def ticks(self, most: int = 6) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(powers) < 4 else (1,)
            found = [factor * 10.0**power for power in powers for factor in factors]
            inside = [value for value in found if self.low <= value <= self.high]
            return inside[:: max(1, math.ceil(len(inside) / most))]
        wanted = (self.high - self.low) / most
        step = _round_step(wanted)
        if self.time:
            step = next((step for step in _TIME_STEPS if step >= wanted), step)
        first = math.ceil(self.low / step - 1e-9)
        return [place * step for place in range(first, math.floor(self.high / step + 1e-9) + 1)]


def colour(place: int) -> str:
    place %= len(COLOURS)
    return f"var(--dfdask-{place},{COLOURS[place]})"


def legend(names: Sequence[str]) -> str:
    """HTML: a coloured square and a name for each."""
    parts = [
        f'<span style="white-space:nowrap;margin-right:14px"><span style="display:inline-block;width:10px;height:10px;'
        f'border-radius:2px;margin-right:5px;background:{colour(place)}"></span>{text(name)}</span>'
        for place, name in enumerate(names)
    ]
    return f'<div class="legend">{"".join(parts)}</div>'


def timeline(history: History) -> str:
    """A lane for each worker: how much of its time went to which stage, and where its roles changed."""
    workers = history.workers[:: max(1, -(-len(history.workers) // MOST_LANES))]
    if not workers or history.seconds <= 0:
        return ""
    height = min(max(420 / len(workers), 2.0), 20.0)
    gap = 3.0 if height > 7 else 0.0
    bins = max(120, min(430, _CELLS // len(workers)))
    top, bottom = 14.0, 14.0 + len(workers) * height
    x = Axis(0, history.seconds, _LEFT, WIDTH - _RIGHT, time=True)
    stages = [stage.name for stage in history.stages]
    presence, busy = history.presence(), history.busy(bins)
    labels = _short_names(workers)
    back: list[str] = []
    names: list[str] = []
    paths: dict[str, list[str]] = {stage: [] for stage in stages}
    step = (x.stop_px - x.start_px) / bins
    for place, worker in enumerate(workers):
        y = top + place * height
        for start, stop in presence[worker]:
            left, right = x.px(max(history.at(start), 0)), x.px(history.at(min(stop, history.ended)))
            back.append(f"M{left:.1f} {y:.1f}h{right - left:.1f}v{height - gap:.1f}h{left - right:.1f}z")
        for cell, shares in enumerate(busy[worker]):
            floor, scale = y + height - gap, (height - gap) / max(sum(shares.values()), 1.0)
            for stage in stages:
                tall = shares.get(stage, 0.0) * scale
                if tall >= 0.2:
                    floor -= tall
                    left, wide = x.start_px + cell * step, step + 0.1
                    paths[stage].append(f"M{left:.1f} {floor:.1f}h{wide:.2f}v{tall:.1f}h-{wide:.2f}z")
        if height >= 11:
            names.append(_label(_LEFT - 6, y + (height - gap) / 2 + 4, labels[place], "end", title=worker))
    body = [f'<path d="{"".join(back)}" fill="currentColor" opacity=".08"/>']
    body += [f'<path d="{"".join(parts)}" style="fill:{colour(place)}"/>' for place, parts in enumerate(paths.values())]
    body += [*names, *_marks(history, workers, x, top, height, bottom - gap), _bottom(x, bottom, duration)]
    return _svg(bottom + _BOTTOM, body, "What each worker did")


def rates(history: History, bins: int = 90) -> str:
    """Items per second of every stage over the time of the run."""
    if history.seconds <= 0 or not history.stages:
        return ""
    series = {stage.name: _smooth(history.rates(stage.name, bins)) for stage in history.stages}
    return lines(series, history.seconds, "items/s")


def lines(series: Mapping[str, Sequence[float]], seconds: float, unit: str) -> str:
    """Lines of equally spaced values over ``seconds``; the last one is filled."""
    top, bottom = 14.0, 194.0
    x = Axis(0, seconds, _LEFT, WIDTH - _RIGHT, time=True)
    most = max((value for values in series.values() for value in values), default=0.0)
    y = Axis(0, most * 1.05 or 1.0, bottom, top)
    body = _grid(y, x)
    for place, (name, values) in enumerate(series.items()):
        width = seconds / max(len(values), 1)
        points = [f"{x.px((cell + 0.5) * width):.1f} {y.px(value):.1f}" for cell, value in enumerate(values)]
        if not points:
            continue
        path = "M" + "L".join(points)
        if place == len(series) - 1:
            ends = f"L{x.px(seconds - width / 2):.1f} {bottom}L{x.px(width / 2):.1f} {bottom}z"
            body.append(f'<path d="{path}{ends}" style="fill:{colour(place)}" opacity=".18"/>')
        body.append(
            f'<path d="{path}" fill="none" style="stroke:{colour(place)}" stroke-width="1.8" stroke-linejoin="round">'
            f"<title>{text(name)}</title></path>"
        )
    body += [_label(_LEFT, 9, unit, "start"), _bottom(x, bottom, duration)]
    return _svg(bottom + _BOTTOM, body, unit)


def predictions(history: History) -> str:
    """Predicted against measured seconds per item, a dot for every call or sum of calls; on the line is right."""
    dots = [
        (one.predicted_seconds / one.items, one.seconds / one.items, one)
        for one in history.work
        if one.predicted_seconds and one.items and one.seconds > 0
    ]
    dots = dots[:: max(1, -(-len(dots) // _POINTS))]
    if not dots:
        return ""
    values = [value for predicted, measured, _ in dots for value in (predicted, measured)]
    low, high = min(values) / 1.3, max(values) * 1.3
    size, top = 330.0, 14.0
    x, y = Axis(low, high, _LEFT, _LEFT + size, log=True), Axis(low, high, top + size, top, log=True)
    names = [stage.name for stage in history.stages]
    line = f'<path d="M{x.px(low):.1f} {y.px(low):.1f}L{x.px(high):.1f} {y.px(high):.1f}" '
    body = [*_grid(y, x), f'{line}stroke="currentColor" opacity=".5" stroke-dasharray="4 3"/>']
    for predicted, measured, one in dots:
        body.append(
            f'<circle cx="{x.px(predicted):.1f}" cy="{y.px(measured):.1f}" r="3" opacity=".55" '
            f'style="fill:{colour(names.index(one.stage))}"><title>{text(one.stage)}: predicted {predicted:.3g} s, '
            f"measured {measured:.3g} s an item</title></circle>"
        )
    body += [
        _label(_LEFT, 9, "measured seconds an item", "start"),
        _bottom(x, top + size, lambda value: f"{value:g}"),
        _label(_LEFT + size + 8, top + size + 16, "predicted seconds an item", "start"),
    ]
    return _svg(top + size + _BOTTOM, body, "Predicted against measured", _LEFT + size + 190)


def text(value: str) -> str:
    return escape(printable(value))


def _short_names(workers: Sequence[str]) -> list[str]:
    """The port where all are on one host, else the host; the end of what is too long."""
    places = [worker.rpartition("://")[2].rpartition(":") for worker in workers]
    hosts = {host for host, _, _ in places}
    names = [f":{port}" if len(hosts) == 1 and host else host or port for host, _, port in places]
    return [name if len(name) <= 11 else f"…{name[-10:]}" for name in names]


def _marks(history: History, workers: Sequence[str], x: Axis, top: float, height: float, bottom: float) -> list[str]:
    """A line for each decision, a notch where a worker's roles changed, a thick line where the run began again."""
    parts = []
    for start, stop in history.pauses[-_MARKS:]:
        at = x.px(history.at(stop))
        title = f"{duration(history.at(stop))}: started again after {duration(stop - start)}"
        parts.append(
            f'<path d="M{at:.1f} {top - 4:.1f}V{bottom:.1f}" stroke="currentColor" stroke-width="3" opacity=".6">'
            f"<title>{text(title)}</title></path>"
        )
    rows = {worker: place for place, worker in enumerate(workers)}
    moves = [(decision, move) for decision in history.decisions for move in decision.moves if move.worker in rows]
    for decision in history.decisions[-_MARKS:]:
        at = x.px(history.at(decision.when))
        title = f"{duration(history.at(decision.when))}: {decision.reason}"
        parts.append(
            f'<g><title>{text(title)}</title><path d="M{at:.1f} {top - 4:.1f}V{bottom:.1f}" stroke="currentColor" '
            f'opacity=".35" stroke-dasharray="2 3"/><path d="M{at - 4:.1f} {top - 12:.1f}h8l-4 7z" '
            f'fill="currentColor" opacity=".7"/></g>'
        )
    if height >= 5:
        for decision, move in moves[-_MARKS:]:
            at, y = x.px(history.at(decision.when)), top + rows[move.worker] * height
            parts.append(
                f'<path d="M{at - 1:.1f} {y:.1f}h2v{height - 3 if height > 7 else height:.1f}h-2z" '
                f'fill="currentColor"><title>{text(_moved(decision, move))}</title></path>'
            )
    return parts


def _moved(decision: Decision, move: Move) -> str:
    return f"{move.worker}: {roles_text(move.before)} → {roles_text(move.after)}; {decision.reason}"


def _grid(y: Axis, x: Axis) -> list[str]:
    parts = []
    for tick in y.ticks(5):
        at = y.px(tick)
        parts.append(f'<path d="M{x.start_px:.1f} {at:.1f}H{x.stop_px:.1f}" stroke="currentColor" opacity=".12"/>')
        parts.append(_label(x.start_px - 6, at + 4, f"{tick:,g}", "end"))
    return parts


def _bottom(x: Axis, y: float, words: Callable[[float], str]) -> str:
    parts = [f'<path d="M{x.start_px:.1f} {y:.1f}H{x.stop_px:.1f}" stroke="currentColor" opacity=".4"/>']
    for tick in x.ticks():
        at = x.px(tick)
        parts.append(f'<path d="M{at:.1f} {y:.1f}v4" stroke="currentColor" opacity=".4"/>')
        parts.append(_label(at, y + 17, words(tick), "end" if at > WIDTH - 40 else "middle"))
    return "".join(parts)


def _label(x: float, y: float, value: str, anchor: str, title: str = "") -> str:
    more = f"<title>{text(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_FONT} opacity=".8">{more}{text(value)}</text>'


def _svg(height: float, body: Sequence[str], title: str, width: float = WIDTH) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{text(title)}" style="width:100%;max-width:{width:.0f}px;height:auto;display:block">'
        f"{''.join(body)}</svg>"
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours: calls that end together are not a burst."""
    return [sum(values[max(at - 1, 0) : at + 2]) / len(values[max(at - 1, 0) : at + 2]) for at in range(len(values))]


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= step * (1 - 1e-9))
