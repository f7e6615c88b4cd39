"""A snapshot of a job as HTML that needs nothing else: no script, no style sheet, no live kernel."""

from __future__ import annotations

from html import escape

from dfdask.events import Progress
from dfdask.words import ENDED, duration, notes, pace, percent, printable, share

_COLOURS = {"finished": "#2e8b57", "failed": "#c0392b", "stopped": "#b8860b", "stopping": "#b8860b"}
_BUSY = "#3b7dd8"
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
    style = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5;max-width:720px"
    return f'<div class="dfdask-run" style="{style}">{"".join(parts)}</div>'


def _stages(progress: Progress) -> str:
    head = _row("th", ("stage", "queued", "running", "done", "workers"))
    rows = [
        _row(
            "td",
            (_text(s.name), f"{s.queued:,}", f"{s.running:,}", f"{s.done:,}", f"{s.workers:,}"),
        )
        for s in progress.stages
    ]
    style = "border-collapse:collapse;margin:4px 0;background:transparent;color:inherit;font:inherit"
    return f'<table style="{style}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _row(tag: str, cells: tuple[str, ...]) -> str:
    faint = ";font-weight:normal;opacity:.7" if tag == "th" else ""
    sides = ["left", *["right"] * (len(cells) - 1)]
    inside = "".join(
        f'<{tag} style="{_CELL}{side}{faint}">{cell}</{tag}>' for side, cell in zip(sides, cells, strict=True)
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
