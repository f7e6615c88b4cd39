"""The parts of the page that are text and pictures, as HTML. Every text from outside is escaped."""

from __future__ import annotations

import time
from base64 import b64encode
from html import escape
from math import isfinite
from typing import TYPE_CHECKING

from dfdask.dashboard.history import History, worker_text
from dfdask.dashboard.palette import MARK_COLOURS, USE_COLOURS, Palette
from dfdask.dashboard.records import USES, Failure, Mark
from dfdask.words import brief, clipped, count, duration, percent, printable, rate, share, size

if TYPE_CHECKING:
    from dfdask.events import JobEnded, JobState, StageState

JOBS_SHOWN = 8
LINES_SHOWN = 8


def headline(history: History) -> str:
    """One line: jobs, workers, speed, end; and how the fleet spends its time."""
    state = history.state
    if state is None:
        return '<p class="quiet">Waiting for the gate.</p>'
    number, unit = f"{len(state.jobs)}", "job" if len(state.jobs) == 1 else "jobs"
    facts = [_fact(number, unit, "jobs") if state.jobs else _fact("No", "job is running", "jobs")]
    facts.append(_fact(f"{len(state.workers):,}", "worker" if len(state.workers) == 1 else "workers", "workers"))
    left = [seconds for job in state.jobs if (seconds := _forecast(job)) is not None]
    if left and len(left) == len(state.jobs):
        facts.append(_fact(duration(max(left)), f"left, until {_clock(state.when + max(left), state.when)}", "left"))
    runs = [job.run for job in state.jobs] or [past.run for past in history.ended]
    spent = sum(history.device_seconds.get(run, 0.0) for run in runs)
    if spent:
        facts.append(_fact(duration(spent), "device time", "device"))
    if history.memory_bytes:
        facts.append(_fact(size(history.memory_bytes), "of the workers' memory", "memory"))
    uses = history.uses.since(history.uses.count - 10)
    if uses:
        means = {name: sum(use.shares[name] for use in uses) / len(uses) for name in USES}
        means["idle"] = 1 - sum(means.values())
        for name, mean in means.items():
            if mean >= 0.005 or name == "busy":
                facts.append(_fact(f"{mean:.0%}", _USE_WORDS[name][0], name))
    return f'<div class="facts">{"".join(facts)}</div>'


def lanes(history: History, palette: Palette) -> str:
    """A table: one head per job, one row per stage."""
    state = history.state
    if state is None:
        return ""
    jobs = sorted(state.jobs, key=lambda job: (-job.priority, job.started))
    ended = _ended(history)[::-1]
    if not jobs and not ended:
        return '<p class="quiet">No job is running. Start one with <code>dfdask run JOB.yaml</code>.</p>'
    rows = ["".join(_job(job, history, palette) for job in jobs[:JOBS_SHOWN])]
    if len(jobs) > JOBS_SHOWN:
        rows.append(f'<tr><td colspan="11" class="quiet">and {len(jobs) - JOBS_SHOWN} more jobs</td></tr>')
    for past in ended[: max(JOBS_SHOWN - len(jobs), 0)]:
        done = f"{past.committed_items:,} of {count(past.items, 'item')}"
        spent = history.device_seconds.get(past.run)
        if spent:
            done += f" &middot; {duration(spent)} device time"
        failed = f' &middot; <span class="bad">{past.failed_items:,} failed</span>' if past.failed_items else ""
        rows.append(
            f'<tr class="job ended" data-run="{_text(past.run)}"><td colspan="11"><b>{_name(history, past.run)}</b> '
            f"{_text(past.reason)} at {time.strftime('%H:%M:%S', time.localtime(past.when))} "
            f'<span class="quiet">{done}</span>{failed}</td></tr>'
        )
    head = "".join(
        f"<th{' class=wide' if name == 'items' else ''} title='{escape(why)}'>{name}</th>" for name, why in _HEADS
    )
    head = f"<thead><tr>{head}</tr></thead>" if jobs else ""  # ended jobs have none of these columns
    return f'<div class="scroll"><table class="lanes">{head}<tbody>{"".join(rows)}</tbody></table></div>'


_HEADS = (
    ("stage", "a step of the job's pipeline"),
    ("items", "done, waiting for the next stage, running, queued"),
    ("queued", "items at the gate, ready to run"),
    ("running", "items assigned to workers"),
    ("waiting", "done, their results held in memory for the next stage"),
    ("done", "items"),
    ("items/s", "over the last minute"),
    ("workers", "that have this role"),
    ("device time", "spent so far"),
    ("per item", "measured, and what was predicted"),
    ("held", "bytes of results that wait for the next stage"),
)


def _job(job: JobState, history: History, palette: Palette) -> str:
    done = share(job.committed_items, job.items) * 100
    facts = [f"{job.committed_items:,} of {count(job.items, 'item')} ({percent(job.committed_items, job.items)})"]
    left = _forecast(job)
    if left is not None and history.state is not None:
        facts.append(f"{duration(left)} left, until {_clock(history.state.when + left, history.state.when)}")
    if job.failed_items:
        facts.append(f'<span class="bad">{job.failed_items:,} failed</span>')
    if job.priority not in (0, 1):
        facts.append(f"weight {job.priority:g}")
    facts.append(f'<span class="quiet">{_text(clipped(job.output, 80))}</span>')
    head = (
        f'<tr class="job" data-run="{_text(job.run)}" data-name="{_text(job.name)}" '
        f'data-committed="{job.committed_items}" data-items="{job.items}" data-failed="{job.failed_items}">'
        f'<td colspan="11"><b>{_text(clipped(job.name, 60))}</b> {" &middot; ".join(facts)}'
        f'<div class="bar"><i style="width:{done:.2f}%"></i></div></td></tr>'
    )
    return head + "".join(_stage(job, stage, history, palette) for stage in job.stages)


def _forecast(job: JobState) -> float | None:
    """Seconds until it ends; None where no prediction says."""
    seconds = job.forecast_seconds
    return seconds if seconds is not None and isfinite(seconds) and seconds > 0 else None


def _stage(job: JobState, stage: StageState, history: History, palette: Palette) -> str:
    colour = palette.colour(stage.name)
    # Waiting items are done ones, too: the bar shows each item once.
    parts = [
        ("done", stage.done - stage.waiting, 1.0),
        ("waiting", stage.waiting, 0.72),
        ("running", stage.running, 0.5),
        ("queued", stage.queued, 0.25),
    ]
    bar = "".join(
        f'<i title="{number:,} {name}" style="width:{share(number, job.items) * 100:.2f}%;'
        f'background:{colour};opacity:{opacity}"></i>'
        for name, number, opacity in parts
        if number > 0
    )
    speed = history.rate(job.run, stage.name)
    cells = [
        f'<td><i class="dot" style="background:{colour}"></i>{_text(stage.name)}</td>',
        f'<td class="wide"><div class="lane">{bar}</div></td>',
        *(f"<td>{number:,}</td>" for number in (stage.queued, stage.running, stage.waiting, stage.done)),
        f"<td>{rate(speed).replace(' items', '').replace('/s', '') if speed is not None else ''}</td>",
        f"<td>{stage.workers:,}</td>",
        f"<td>{duration(stage.device_seconds)}</td>",
        f'<td class="cost">{_cost(stage)}</td>',
        f"<td>{size(stage.waiting_bytes) if stage.waiting_bytes else ''}</td>",
    ]
    data = " ".join(
        f'data-{name}="{number}"'
        for name, number in (
            ("queued", stage.queued),
            ("running", stage.running),
            ("waiting", stage.waiting),
            ("done", stage.done),
        )
    )
    return f'<tr data-run="{_text(job.run)}" data-stage="{_text(stage.name)}" {data}>{"".join(cells)}</tr>'


def _cost(stage: StageState) -> str:
    if stage.measured_seconds is None:
        return f'<span class="quiet">{brief(stage.predicted_seconds)}?</span>' if stage.predicted_seconds else ""
    text = f"<span>{brief(stage.measured_seconds)}</span>"
    if stage.predicted_seconds is not None:
        text += f' <span class="quiet">of {brief(stage.predicted_seconds)}</span>'
    if stage.error is not None:
        kind = "bad" if stage.error > 0.5 else "quiet"
        text += f' <span class="{kind}" title="mean error of the predictions">&plusmn;{stage.error:.0%}</span>'
    return text


def failures(history: History) -> str:
    """The latest failures, newest first, equal ones once."""
    latest: list[Failure] = list(history.failures.values())[::-1][:LINES_SHOWN]
    lost = [mark for mark in history.marks.since(0) if mark.kind == "left"]
    failed = sum(job.failed_items for job in history.state.jobs) if history.state else 0
    failed += sum(past.failed_items for past in _ended(history))
    title = f"<h2>Failures <span class=quiet>{count(failed, 'failed item')}</span></h2>"
    lines = [
        f'<li data-failure="{_text(one.run)}"><time>{_time(one.when)}</time> <b>{_name(history, one.run)}</b> '
        f"{_text(clipped(one.text, 240))}{f' <span class=bad>&times;{one.times}</span>' if one.times > 1 else ''}</li>"
        for one in latest
    ]
    lines += [_mark(mark, history) for mark in lost[::-1][: max(LINES_SHOWN - len(lines), 0)]]
    return title + (f"<ul>{''.join(lines)}</ul>" if lines else '<p class="quiet">None.</p>')


def decisions(history: History) -> str:
    """The latest role changes and why, newest first."""
    retags = [mark for mark in history.marks.since(0) if mark.kind == "retag"]
    lines = [_mark(mark, history) for mark in retags[::-1][:LINES_SHOWN]]
    title = "<h2>Decisions <span class=quiet>why workers changed roles</span></h2>"
    return title + (f"<ul>{''.join(lines)}</ul>" if lines else '<p class="quiet">No worker changed its role.</p>')


def pictures(history: History) -> str:
    """The newest pictures first."""
    newest = history.pictures.since(0)[::-1]
    title = f"<h2>Newest pictures <span class=quiet>{count(history.pictures.count, 'preview')} so far</span></h2>"
    if not newest:
        return title + '<p class="quiet">They appear as shards are written.</p>'
    names = {run: _name(history, run) for run in {one.run for one in newest}}
    images = "".join(
        f'<img alt="row {one.row}" title="{names[one.run]}, row {one.row:,}" data-run="{_text(one.run)}" '
        f'data-row="{one.row}" src="data:image/jpeg;base64,{b64encode(one.jpeg).decode()}">'
        for one in newest
    )
    return f'{title}<div class="pictures">{images}</div>'


def timeline_legend(palette: Palette) -> str:
    """The stages' colours, and what else the timeline draws."""
    keys = [_key(name, style=f"background:{colour}") for name, colour in palette.known()]
    keys.append(_key("pale: runs now, or loaded or waited first", "dot pale"))
    keys += [_key(name, "sign", f"color:{MARK_COLOURS[kind]}", sign) for kind, sign, name in _SIGNS]
    return "".join(keys)


_SIGNS = (
    ("retag", "\N{BLACK DOWN-POINTING TRIANGLE}", "changed its role"),
    ("joined", "\N{HEAVY GREEK CROSS}", "joined"),
    ("left", "\N{HEAVY MULTIPLICATION X}", "left"),
)


def uses_legend() -> str:
    """What the fleet spends its time with."""
    keys = []
    for use, (word, why) in _USE_WORDS.items():
        colour = USE_COLOURS.get(use)
        kind, style = ("dot", f"background:{colour}") if colour else ("dot hollow", "")
        keys.append(_key(word, kind, style, why=why))
    return "".join(keys)


_USE_WORDS = {
    "busy": ("busy", "has a task"),
    "load": ("loading", "brings weights to its device"),
    "blocked": ("blocked", "too many results wait for the next stage"),
    "starving": ("starving", "nothing of its roles is ready"),
    "idle": ("idle", "there is no work for it"),
}


def _key(name: str, kind: str = "dot", style: str = "", sign: str = "", why: str = "") -> str:
    return f'<span class="key" title="{why}"><i class="{kind}" style="{style}">{sign}</i>{_text(name)}</span>'


def _mark(mark: Mark, history: History) -> str:
    worker = worker_text(history.label(mark.worker))
    return (
        f'<li data-mark="{mark.kind}"><time>{_time(mark.when)}</time> <b>{_text(worker)}</b> '
        f"{_text(clipped(mark.text, 240))}</li>"
    )


def _ended(history: History) -> list[JobEnded]:
    """The jobs that ended of late and did not begin again, oldest first."""
    running = {job.run for job in history.state.jobs} if history.state else set()
    return [past for past in history.ended if past.run not in running]


def _fact(value: str, unit: str, name: str) -> str:
    return f'<span data-fact="{name}"><b>{value}</b> {unit}</span>'


def _name(history: History, run: str) -> str:
    return _text(clipped(history.names.get(run, run), 40))


def _clock(when: float, now: float) -> str:
    """``14:32``, with the day where it is not within a day."""
    return time.strftime("%H:%M" if when - now < 20 * 3600 else "%a %d %b %H:%M", time.localtime(when))


def _time(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


def _text(value: str) -> str:
    return escape(printable(value))
