"""Numbers and texts as people read them: pure functions, the same in terminal, log and notebook."""

from __future__ import annotations

import math

from dfdask.events import Progress, StageProgress

ENDED = frozenset({"finished", "stopped", "failed"})
"""The phases after which nothing changes any more."""


def duration(seconds: float) -> str:
    """``4.2 s``, ``45 s``, ``6 min 30 s``, ``2 h 05 min`` or ``3 d 4 h``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def brief(seconds: float) -> str:
    """Of one task or item: ``25 ms``, ``9.53 s``, ``145 s``."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{_digits(seconds)} s"


def rate(items_per_second: float) -> str:
    """Items per second with three significant digits, per minute or hour where that reads better."""
    if not math.isfinite(items_per_second) or items_per_second < 0:
        return "? items/s"
    if items_per_second >= 0.1 or items_per_second == 0:
        return f"{_digits(items_per_second)} items/s"
    if items_per_second * 60 >= 0.1:
        return f"{_digits(items_per_second * 60)} items/min"
    return f"{_digits(items_per_second * 3600)} items/h"


def size(count_bytes: int) -> str:
    """Bytes in decimal units: ``812 B``, ``1.63 MB``."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{count_bytes} B" if unit == "B" else f"{_digits(value)} {unit}"
        value /= 1000
    return f"{_digits(value)} PB"


def count(number: int, noun: str) -> str:
    """``1 item``, ``1,632 items``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share(part: int, whole: int) -> float:
    """``part / whole`` within 0 and 1; a job without items is done."""
    return min(max(part / whole, 0.0), 1.0) if whole else 1.0


def percent(part: int, whole: int) -> str:
    """Whole percent, rounded down: 100% means all."""
    return f"{math.floor(share(part, whole) * 100)}%"


def printable(text: str) -> str:
    """``text`` on one line and without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def clipped(text: str, width: int) -> str:
    """``printable(text)``, cut to ``width`` characters."""
    line = printable(text)
    return line if len(line) <= width else f"{line[: max(width - 3, 0)]}..."


def pace(progress: Progress) -> str:
    """Speed and time left: ``2.1 items/s, 6 min 30 s left``; empty while nothing is known."""
    parts = []
    if progress.items_per_second is not None:
        parts.append(rate(progress.items_per_second))
    if progress.eta_seconds is not None and progress.phase not in ENDED:
        parts.append(f"{duration(progress.eta_seconds)} left")
    return ", ".join(parts)


def notes(progress: Progress) -> str:
    """What else matters: items from before, failures, workers."""
    parts = []
    if progress.resumed_items:
        parts.append(f"{progress.resumed_items:,} were there already")
    if progress.failed_items:
        parts.append(f"{progress.failed_items:,} failed")
    if progress.phase not in ENDED:
        parts.append(count(progress.workers, "worker"))
        parts.append(_waiting(progress))
    return ", ".join(filter(None, parts))


def status_line(progress: Progress) -> str:
    """All of a snapshot on one line, for logs."""
    done = f"{progress.committed_items:,} of {count(progress.items, 'item')}"
    parts = [
        f"{done} ({percent(progress.committed_items, progress.items)})",
        pace(progress),
        "" if progress.phase in ENDED else ", ".join(_stage(stage) for stage in progress.stages),
        f"{progress.failed_items:,} failed" if progress.failed_items else "",
        "" if progress.phase in ENDED else _waiting(progress),
    ]
    return f"{progress.phase}: {'; '.join(part for part in parts if part)}"


def _waiting(progress: Progress) -> str:
    if not progress.unserved:
        return ""
    coming = f", {progress.starting:,} starting" if progress.starting else ""
    return f"no workers for {printable(', '.join(progress.unserved))} yet{coming}"


def _stage(stage: StageProgress) -> str:
    return f"{printable(stage.name)} {stage.queued:,} queued {stage.running:,} running {stage.done:,} done"


def _digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
