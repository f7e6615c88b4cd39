"""The report as HTML: one page that loads nothing and runs nothing, for light and dark screens and for paper."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfdask import __version__, charts
from dfdask.charts import text
from dfdask.explain import NO_EVENTS, gain, moved, remark, why
from dfdask.history import Decision, History
from dfdask.summary import RunStatus
from dfdask.words import count, duration, percent, rate, size

_DECISIONS = 200
_DECISION_CELLS = ("n", "", "w", "n", "n", "n", "n", "n")

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2733;--faint:#5c6873;--line:#e2e6ea;--card:#f6f8fa;--bad:#b3261e;
--good:#1e7d4f;--wait:#9a6700}
@media (prefers-color-scheme:dark){:root{--page:#14181d;--ink:#e3e8ed;--faint:#98a4b0;--line:#2b333b;--card:#1c2229;
--bad:#ff8f85;--good:#6fd3a0;--wait:#e3b341;--dfdask-0:#6ea8ff;--dfdask-1:#f2ab4b;--dfdask-2:#5fcb98;--dfdask-3:#bd93f9;
--dfdask-4:#f28391;--dfdask-5:#54c7d6;--dfdask-6:#c4a494;--dfdask-7:#a5b1b8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 20px 64px;max-width:920px;background:var(--page);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;margin:40px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
p{margin:6px 0}.faint,figcaption,.legend{color:var(--faint)}.bad{color:var(--bad)}.good{color:var(--good)}
.wait{color:var(--wait)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(185px,1fr));gap:10px;margin:20px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.tile b{display:block;font-size:20px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--faint);font-size:12px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--faint);text-align:left}
th,td{padding:5px 14px 5px 0;vertical-align:top;border-bottom:1px solid var(--line)}
.w{min-width:230px}.n{text-align:right;white-space:nowrap}td.k{white-space:nowrap;color:var(--faint)}td.v{overflow-wrap:anywhere}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(120px,1fr));gap:12px}
.gallery figure{margin:0;break-inside:avoid}
.gallery img{width:100%;border-radius:6px;display:block;background:var(--card)}
.gallery .none{aspect-ratio:1;border-radius:6px;border:1px dashed var(--bad);color:var(--bad);padding:8px;
font-size:11px;overflow:hidden;overflow-wrap:anywhere}
figcaption{font-size:11px;line-height:1.35;margin-top:4px;overflow:hidden;display:-webkit-box;-webkit-line-clamp:2;
-webkit-box-orient:vertical;overflow-wrap:anywhere}
footer{margin-top:48px;color:var(--faint);font-size:12px}
details summary{cursor:pointer;color:var(--faint)}
@media print{body{max-width:none;padding:0}h2{break-after:avoid}}
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the gallery: a ``data:`` URL, or None where the item failed and ``note`` says why."""

    url: str | None
    caption: str
    note: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the page says. Times are seconds since the epoch; ``written`` are (time, items) of the commits."""

    status: RunStatus
    kind: str
    item_shape: tuple[int, ...]
    about: Mapping[str, Any]
    stage_seconds: Mapping[str, tuple[float, int]]
    written: tuple[tuple[float, int], ...]
    history: History
    pictures: tuple[Picture, ...]
    failures: tuple[tuple[str, str], ...]
    spec: tuple[tuple[str, str], ...]
    model: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    made: str


def page(facts: Facts) -> str:
    """The whole document. Every text from outside is escaped, and the page may not load or run anything."""
    sections = [
        _head(facts),
        _gallery(facts.pictures, facts.kind),
        _speed(facts),
        _workers(facts.history),
        _decisions(facts.history),
        _predictions(facts.history),
        _cost(facts),
        _failures(facts),
        _table("Job", facts.spec),
        _table("Model", facts.model),
        _table("Versions", (*facts.versions, ("created", str(facts.about.get("created", "unknown"))))),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(facts.status.run)}: dfdask report</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}<footer>Written {text(facts.made)} by dfdask {text(__version__)}.</footer></body></html>\n"
    )


def _head(facts: Facts) -> str:
    status = facts.status
    done = status.ok_items + status.failed_items
    complete = status.committed_shards == status.shards
    state = (
        '<span class="good">complete</span>' if complete else f'<span class="wait">{percent(done, status.items)}</span>'
    )
    shape = " × ".join(str(length) for length in facts.item_shape[:-1])
    span = _span(facts)
    when = (
        datetime.datetime.fromtimestamp(facts.written[-1][0], datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        if span
        else ""
    )
    line = [f"{facts.kind}s of {shape}", f"last written {when}" if when else "", status.output]
    left_out = ", pauses left out" if facts.history.pauses else ""
    device_seconds = sum(seconds for seconds, _ in facts.stage_seconds.values())
    tiles = [
        (f"{status.ok_items:,}", f"of {count(status.items, 'item')} made"),
        (f"{status.failed_items:,}", "failed"),
        (duration(span), f"from first work to last commit{left_out}") if span else ("?", "time"),
        (rate(done / span), "on average") if span else ("?", "speed"),
        (duration(device_seconds), "of device time"),
        (f"{device_seconds / done:.3g} s" if done else "?", "device time an item"),
        (f"{len(facts.history.workers):,}" if facts.history.workers else "?", "workers seen"),
        (size(status.stored_bytes), "stored"),
    ]
    cells = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in tiles)
    return (
        f"<h1>{text(status.run)} {state}</h1>"
        f'<p class="faint">{" &middot; ".join(text(part) for part in line if part)}</p><div class="tiles">{cells}</div>'
    )


def _gallery(pictures: Sequence[Picture], kind: str) -> str:
    if not pictures:
        return _section("Pictures", "<p>Nothing is committed yet.</p>")
    figures = []
    for one in pictures:
        inside = (
            f'<img src="{one.url}" alt="{text(one.caption)}" title="{text(one.caption)}">'
            if one.url
            else f'<div class="none" title="{text(one.note)}">failed: {text(one.note)}</div>'
        )
        figures.append(f"<figure>{inside}<figcaption>{text(one.caption)}</figcaption></figure>")
    note = "" if kind == "image" else '<p class="faint">The middle frame of each video.</p>'
    return _section("Pictures", f'{note}<div class="gallery">{"".join(figures)}</div>')


def _speed(facts: Facts) -> str:
    history = facts.history
    if chart := charts.rates(history):
        names = [stage.name for stage in history.stages]
        return _section("Speed", f"{charts.legend(names)}{chart}")
    span = _span(facts)
    if not span or len(facts.written) < 3:
        return ""
    bins, first = 60, facts.written[0][0]
    counts = [0.0] * bins
    for when, items in facts.written[1:]:
        counts[min(int((when - first) / max(span, 1e-9) * bins), bins - 1)] += items * bins / span
    note = '<p class="faint">By the times of the commits: no events are stored with this run.</p>'
    return _section("Speed", note + charts.lines({"committed": counts}, span, "items/s"))


def _workers(history: History) -> str:
    chart = charts.timeline(history)
    if not chart:
        return ""
    there = sum(history.at(stop) - history.at(start) for spans in history.presence().values() for start, stop in spans)
    busy = sum(stage.seconds for stage in history.stages)
    loading = sum(stage.load_seconds for stage in history.stages)
    shown = min(len(history.workers), charts.MOST_LANES)
    facts = [
        f"{duration(there)} of workers' time",
        f"busy {busy / there:.0%}" if there else "",
        f"loading weights {loading / there:.1%}" if there else "",
        f"{shown:,} of {len(history.workers):,} workers shown" if shown < len(history.workers) else "",
    ]
    marks = "a triangle marks a decision" + (", a thick line a new start" if history.pauses else "")
    line = f'<p class="faint">{text(", ".join(fact for fact in facts if fact))}; {marks}.</p>'
    return _section("Workers", f"{line}{charts.legend([stage.name for stage in history.stages])}{chart}")


def _decisions(history: History) -> str:
    title = "What the scheduler decided"
    if not history.events:
        return _section(title, f"<p>{text(NO_EVENTS)}</p>")
    remarks = history.of_kind("WorkerLeft", "ItemQuarantined", "EventsDropped")
    more = "".join(f"<p>{text(remark(event, history))}</p>" for event in remarks[:_DECISIONS])
    if not history.decisions:
        return _section(title, f"<p>No roles were changed.</p>{more}")
    rows = "".join(_decision(decision, history) for decision in history.decisions[:_DECISIONS])
    names = ("at", "why", "who moved", "left", "predicted", "came", "gain", "items/s")
    head = _row("th", names, _DECISION_CELLS)
    note = (
        '<p class="faint">Time left until the end: if nothing had changed (left), by prediction with the change, and '
        "as it came, later decisions included. The gain is the first less the last: against an "
        "estimate, for nobody ran it. Items a second: in the half minute before and after.</p>"
    )
    hidden = len(history.decisions) - _DECISIONS
    rest = f"<p>{hidden:,} later decisions are left out; see dfdask explain.</p>" if hidden > 0 else ""
    return _section(title, f'{note}<div class="scroll"><table>{head}{rows}</table></div>{rest}{more}')


def _decision(decision: Decision, history: History) -> str:
    times = (decision.stay_seconds, decision.predicted_seconds, decision.actual_seconds)
    speeds = (decision.rate_before, decision.rate_after)
    cells = (
        text(duration(history.at(decision.when))),
        text(why(decision)),
        "<br>".join(text(line) for line in moved(decision)),
        *("?" if seconds is None else text(duration(seconds)) for seconds in times),
        text(gain(decision.actual_gain_seconds)),
        " &rarr; ".join("?" if speed is None else text(rate(speed).removesuffix(" items/s")) for speed in speeds),
    )
    return _row("td", cells, _DECISION_CELLS)


def _predictions(history: History) -> str:
    chart = charts.predictions(history)
    if not chart:
        return ""
    return _section("Predicted against measured", f"{charts.legend([s.name for s in history.stages])}{chart}")


def _cost(facts: Facts) -> str:
    if not facts.stage_seconds:
        return ""
    sums = {stage.name: stage for stage in facts.history.stages}
    total = sum(seconds for seconds, _ in facts.stage_seconds.values())
    rows = []
    for name, (seconds, items) in facts.stage_seconds.items():
        stage = sums.get(name)
        predicted = stage.predicted_item_seconds if stage else None
        error = stage.error if stage else None
        cells = (
            text(name),
            f"{items:,}",
            text(duration(seconds)),
            f"{seconds / total:.0%}" if total else "?",
            f"{seconds / items:.4g}" if items else "?",
            "?" if predicted is None else f"{predicted:.4g}",
            "?" if error is None else f"{error:.0%}",
        )
        rows.append(_row("td", cells, ("", *["n"] * 6)))
    head = _row("th", ("stage", "items", "device time", "share", "s/item", "predicted", "mean error"), ("", *["n"] * 6))
    return _section("Cost", f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>')


def _failures(facts: Facts) -> str:
    if not facts.failures:
        return ""
    hidden = facts.status.failed_items - len(facts.failures)
    rest = f"<p>{hidden:,} more are in the dataset.</p>" if hidden > 0 else ""
    return _table("Failures", facts.failures) + rest


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f'<tr><td class="k">{text(key)}</td><td class="v">{text(value)}</td></tr>' for key, value in rows)
    return _section(title, f'<div class="scroll"><table>{body}</table></div>')


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{text(title)}</h2>{inside}</section>"


def _row(tag: str, cells: Sequence[str], classes: Sequence[str]) -> str:
    """Cells are HTML already."""
    inside = "".join(
        f'<{tag} class="{name}">{cell}</{tag}>' if name else f"<{tag}>{cell}</{tag}>"
        for cell, name in zip(cells, classes, strict=True)
    )
    return f"<tr>{inside}</tr>"


def _span(facts: Facts) -> float:
    """Seconds from the first work that is known of to the last commit without the pauses, 0 where nothing is known."""
    if not facts.written:
        return 0.0
    first = facts.written[0][0]
    if facts.history.work:
        first = min(first, facts.history.work[0].start)
    return max(facts.history.at(facts.written[-1][0]) - facts.history.at(first), 0.0)
