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
from dfdask.notebook import html, register, watch


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
