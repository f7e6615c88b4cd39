"""The notebook view: sound HTML on its own, and updates in a real IPython."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import ENDED, PROGRESS

from dfdask.events import Progress, StageProgress
from dfdask.markup import fleet_html
from dfdask.notebook import Controls, html, register, watch
from dfdask.spec import JobSpec


class Reader(HTMLParser):
    """Collects text and links, and checks that what is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_whole_and_says_everything() -> None:
    page = Reader(html(PROGRESS))
    text = " ".join(page.text)
    assert page.open == []
    for part in (
        "demo",
        "running",
        "812 of 1,632 items (49%)",
        "2.10 items/s",
        "2 failed",
        "denoise",
        "1,200",
    ):
        assert part in text
    assert page.links == ["http://127.0.0.1:8787/status"]


def test_html_of_an_ended_job_links_no_dashboard_that_is_gone() -> None:
    page = Reader(html(ENDED))
    assert page.links == []
    assert "table" not in page.tags
    assert "runs/demo" in page.text


@given(st.text(), st.text(), st.text())
def test_no_text_from_outside_becomes_markup(name: str, output: str, dashboard: str) -> None:
    stage = StageProgress(f"<script>{name}", 0, 0, 0, 0)
    odd = replace(PROGRESS, run=f"<img src=x>{name}", output=f"</code>{output}", stages=(stage,))
    page = Reader(html(replace(odd, dashboard=f"javascript:{dashboard}")))
    assert page.open == []
    assert not page.tags & {"script", "img", "a"}


class Job:
    """Three states, a new one each time somebody looks."""

    def __init__(self, *states: Progress) -> None:
        self.states = list(states)

    @property
    def progress(self) -> Progress:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@pytest.fixture
def shell() -> Iterator[Any]:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def outputs(shell: Any, job: Job) -> list[dict[str, Any]]:
    """What IPython publishes while the job is watched, until its last state was shown."""
    from IPython.utils.capture import capture_output

    with capture_output() as captured:
        watch(job, interval_seconds=0.01)
        end = time.monotonic() + 20
        while "finished" not in str(captured._outputs[-1]) and time.monotonic() < end:
            time.sleep(0.01)
    return list(captured._outputs)


def test_view_follows_the_job_in_ipython(shell: Any) -> None:
    half = replace(PROGRESS, committed_items=1000)
    shown = outputs(shell, Job(PROGRESS, half, half, ENDED))
    assert [("1,000 of" in str(s["data"]), s.get("update", False)) for s in shown] == [
        (False, False),
        (True, True),
        (False, True),
    ]
    assert len({s["transient"]["display_id"] for s in shown}) == 1
    assert shown[-1]["data"]["text/html"] == html(ENDED)
    assert shown[-1]["data"]["text/plain"].startswith("finished: 1,632 of 1,632")


def test_an_ended_job_is_shown_once(shell: Any) -> None:
    assert len(outputs(shell, Job(ENDED))) == 1


def test_ipython_shows_runs_by_themselves(shell: Any) -> None:
    register()
    formatter = shell.display_formatter.ipython_display_formatter
    assert formatter.lookup_by_type("dfdask.run.Run") is watch


def test_ipython_shows_jobs_as_tables(shell: Any) -> None:
    register()
    spec = JobSpec(model="bundled", prompts=["<b>apple</b>", {"prompt": "pear", "seed": 1}, *["x"] * 50], batch=4)
    data, _ = shell.display_formatter.format(spec)
    text = " ".join(Reader(data["text/html"]).text)
    assert "52 prompts: <b>apple</b>, pear, x, x, ..." in text and "bundled" in text and "batch" in text
    assert "... 52 in all" in data["text/plain"], "not all prompts"
    file = JobSpec(model="bundled", prompts="prompts.txt")
    assert "prompts.txt" in " ".join(Reader(shell.display_formatter.format(file)[0]["text/html"]).text)


STATE: dict[str, Any] = {
    "when": 100.0,
    "gate_seconds": 0.0,
    "workers": [
        {"name": f"<w{n}>", "device_class": "cpu", "memory_bytes": n * 10**9, "running": "encode" if n else None,
         "roles": {"run/encode": 0.25, "run/decode": 0.75, "run/write": 0.0}, "joined": 0.0, "busy_seconds": 40.0}
        for n in range(60)
    ],
    "jobs": [
        {"name": "demo<", "committed_items": 1200, "items": 5000, "failed_items": 3, "forecast_seconds": 61.0},
        {"name": "other", "committed_items": 0, "items": 1, "failed_items": 0, "forecast_seconds": None},
    ],
}  # fmt: skip


def test_fleets_as_html() -> None:
    text = " ".join(Reader(fleet_html(STATE)).text)
    for part in ("60 workers", "2 jobs", "<w3>", "encode 25%, decode 75%", "40%", "and 10 more", "3.00 GB", "demo<",
                 "1,200 of 5,000", "1 min 01 s"):  # fmt: skip
        assert part in text
    assert Reader(fleet_html({**STATE, "workers": [], "jobs": []})).text


class Steered(Job):
    """A run that does as it is told."""

    def __init__(self) -> None:
        super().__init__(PROGRESS)

    def pause(self) -> None:
        self.states = [replace(PROGRESS, phase="paused")]

    def resume(self) -> None:
        self.states = [PROGRESS]

    def stop(self) -> None:
        self.states = [replace(PROGRESS, phase="stopped")]


def test_buttons_steer_the_run() -> None:
    run = Steered()
    panel = Controls(run, interval_seconds=0.01)
    assert [button.disabled for button in (panel.pause, panel.resume, panel.stop)] == [False, True, False]
    panel.pause.click()
    assert run.progress.phase == "paused" and [panel.pause.disabled, panel.resume.disabled] == [True, False]
    panel.resume.click()
    assert run.progress.phase == "running" and [panel.pause.disabled, panel.resume.disabled] == [False, True]
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "812 of" in bundle["text/html"]
    panel.stop.click()
    assert run.progress.phase == "stopped"
    assert [button.disabled for button in (panel.pause, panel.resume, panel.stop)] == [True, True, True]


def test_without_ipython_a_line_is_printed() -> None:
    script = textwrap.dedent(
        """
        import sys
        sys.modules["IPython"] = None
        from dfdask.events import Progress
        from dfdask.notebook import register, watch

        class Job:
            progress = Progress("r", "o", "running", 9, 3, 0, 0, 3, 1, 1.0, None, None, (), 1, None)

        register()
        watch(Job())
        """
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "running: 3 of 9 items (33%)\n"
