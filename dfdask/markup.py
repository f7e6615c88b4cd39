"""Jobs, runs and fleets as HTML that needs nothing else: no script, no style sheet, no live kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dfdask.events import Progress
from dfdask.words import ENDED, clipped, count, duration, notes, pace, percent, printable, share, size

_COLOURS = {"finished": "#2e8b57", "failed": "#c0392b"} | dict.fromkeys(("stopped", "stopping", "paused"), "#b8860b")
_BUSY = "#3b7dd8"
_NO_LIMIT_BYTES = 1 << 60
_CELL = "padding:1px 14px 1px 0;border:0;text-align:"


def html(progress: Progress) -> str:
    """One ``<div>``; every text from outside is escaped. It reads well on light and dark pages."""
    colour = _COLOURS.get(progress.phase, _BUSY)
    done = share(progress.committed_items, progress.items) * 100
    title = (
        f'<div><b>{_text(progress.run)}</b> <span style="color:{colour}">{_text(progress.phase)}</span> '
        f'<span style="opacity:.7">{duration(progress.elapsed_seconds)}</span></div>'
    )
    bar = (
        f'<div role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{done:.0f}" '
        'style="height:8px;margin:6px 0;border-radius:4px;background:rgba(128,128,128,.25);overflow:hidden">'
        f'<div style="width:{done:.2f}%;height:100%;background:{colour}"></div></div>'
    )
    done_percent = percent(progress.committed_items, progress.items)
    facts = [
        f"{progress.committed_items:,} of {progress.items:,} items ({done_percent})",
        pace(progress),
        notes(progress),
    ]
    parts = [title, bar, f"<div>{' &middot; '.join(_text(fact) for fact in facts if fact)}</div>"]
    if progress.stages and progress.phase not in ENDED:
        parts.append(_stages(progress))
    parts.append(_places(progress))
    return _box("run", parts)


def job_html(fields: Mapping[str, Any]) -> str:
    """A job's keys and values, one line each; ``prompts`` may be long."""
    prompts = fields.get("prompts", ())
    items = f"{count(len(prompts), 'prompt')}: " if isinstance(prompts, (list, tuple)) else ""
    first = (
        ", ".join(clipped(str(p.get("prompt", p) if isinstance(p, Mapping) else p), 40) for p in prompts[:4])
        if items
        else clipped(str(prompts), 200)
    )
    shown = {**fields, "prompts": f"{items}{first}{', ...' if items and len(prompts) > 4 else ''}"}
    rows = [(_text(name), _text(clipped(str(value), 200))) for name, value in shown.items() if value not in (None, {})]
    return _box("job", ["<div><b>dfdask job</b></div>", _table(("", ""), rows, "left")])


def fleet_html(state: Mapping[str, Any], most: int = 50) -> str:
    """A ClusterState as a dict: its workers (at most so many) and jobs."""
    workers, jobs, now = state["workers"], state["jobs"], float(state["when"])
    rows = [
        (
            _text(str(w["name"])),
            _text(w["device_class"]),
            _roles(w),
            _text(w["running"] or ""),
            f"{_busy(w, now):.0%}",
            size(int(w["memory_bytes"])) if 0 < w["memory_bytes"] < _NO_LIMIT_BYTES else "",
        )
        for w in workers[:most]
    ]
    parts = [
        f"<div><b>{count(len(workers), 'worker')}</b>, {count(len(jobs), 'job')}</div>",
        _table(("worker", "device", "roles", "running", "busy", "memory"), rows, "left"),
    ]
    if len(workers) > most:
        parts.append(f"<div>and {len(workers) - most:,} more</div>")
    if jobs:
        done = [
            (
                _text(job["name"]),
                f"{job['committed_items']:,} of {job['items']:,}",
                f"{job['failed_items']:,}",
                "" if job["forecast_seconds"] is None else duration(job["forecast_seconds"]),
            )
            for job in jobs
        ]
        parts.append(_table(("job", "committed", "failed", "left"), done))
    return _box("fleet", parts)


def _roles(worker: Mapping[str, Any]) -> str:
    """``encode 25%, decode 75%``; the events' names of roles are ``run/stage``."""
    roles: dict[str, float] = {}
    for role, part in worker["roles"].items():
        stage = str(role).rpartition("/")[2]
        roles[stage] = roles.get(stage, 0.0) + float(part)
    own = {stage: part for stage, part in roles.items() if part > 0}
    return ", ".join(_text(stage) if part > 0.995 else f"{_text(stage)} {part:.0%}" for stage, part in own.items())


def _busy(worker: Mapping[str, Any], now: float) -> float:
    return min(float(worker["busy_seconds"]) / max(now - float(worker["joined"]), 1e-9), 1.0)


def _box(kind: str, parts: Sequence[str]) -> str:
    style = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5;max-width:720px"
    return f'<div class="dfdask-{kind}" style="{style}">{"".join(parts)}</div>'


def _stages(progress: Progress) -> str:
    rows = [
        (_text(s.name), f"{s.queued:,}", f"{s.running:,}", f"{s.done:,}", f"{s.workers:,}") for s in progress.stages
    ]
    return _table(("stage", "queued", "running", "done", "workers"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "right") -> str:
    """Cells are HTML; all but the first column are aligned to ``sides``."""
    style = "border-collapse:collapse;margin:4px 0;background:transparent;color:inherit;font:inherit"
    title = f"<thead>{_row('th', head, sides)}</thead>" if any(head) else ""
    body = "".join(_row("td", row, sides) for row in rows)
    return f'<table style="{style}">{title}<tbody>{body}</tbody></table>'


def _row(tag: str, cells: Sequence[str], side: str) -> str:
    faint = ";font-weight:normal;opacity:.7" if tag == "th" else ""
    sides = ["left", *[side] * (len(cells) - 1)]
    inside = "".join(
        f'<{tag} style="{_CELL}{align}{faint}">{cell}</{tag}>' for align, cell in zip(sides, cells, strict=True)
    )
    return f'<tr style="background:transparent">{inside}</tr>'


def _places(progress: Progress) -> str:
    places = [f"output <code>{_text(progress.output)}</code>"]
    url = progress.dashboard
    if url and progress.phase not in ENDED:
        link = url.startswith(("http://", "https://"))  # any other scheme could run code in the page
        places.append(
            f'<a style="color:inherit" href="{_text(url)}">dashboard</a>' if link else f"dashboard {_text(url)}"
        )
    return f'<div style="opacity:.85">{" &middot; ".join(places)}</div>'


def _text(value: str) -> str:
    return escape(printable(value))
