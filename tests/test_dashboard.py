"""The page's history, its texts, its place on the scheduler, and the metrics."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import urllib.request
from base64 import b64encode
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from fleet import until
from watcher import Watcher

from dfdask.dashboard import Dashboard, cards
from dfdask.dashboard.history import BAR_SECONDS, CALLS_A_LOOK, WINDOW_SECONDS, History, roles_text, worker_text
from dfdask.dashboard.palette import OTHERS, SLOTS, Palette
from dfdask.dashboard.records import BIN_SECONDS, USES, Tail
from dfdask.errors import JobStopped
from dfdask.events import (
    ClusterState,
    Event,
    ItemQuarantined,
    JobEnded,
    JobState,
    RolesChanged,
    ShardWritten,
    StageState,
    TaskDone,
    WorkerLeft,
    WorkerState,
)
from dfdask.plugins import scheduler_plugins
from dfdask.run import submit

ROOT = Path(__file__).parents[1]
NOW = 1_000_000.0
STAGE = StageState("denoise", 10, 4, 6, 80, 2, 40.0, 1_500_000, 0.5, 0.55, 0.1)
JOB = JobState("r1", "apples", "runs/apples", NOW, 1.0, 100, 70, 1, (STAGE,), 90.0)


def worker(number: int, running: str | None = None, **seconds: float) -> WorkerState:
    spent = {f"{use}_seconds": seconds.get(use, 0.0) for use in ("busy", "load", "starving", "blocked")}
    return WorkerState(f"tcp://h:{number}", str(number), "l4", 1, {"denoise": 1.0}, running, 2, NOW, **spent)


def state(when: float = NOW, *workers: WorkerState, jobs: tuple[JobState, ...] = (JOB,)) -> ClusterState:
    return ClusterState(when, jobs, workers or (worker(0), worker(1)), 0.0)


def call(start: float, seconds: float = 1.0, stage: str = "denoise", on: int = 0, items: int = 4) -> TaskDone:
    return TaskDone(start + seconds, "r1", stage, f"tcp://h:{on}", items, start, seconds, 0.0, 0.9, 1000)


def numbered(*events: Event, first: int = 0) -> list[tuple[int, Event]]:
    return list(enumerate(events, first))


def seen(*events: Event, when: float = NOW) -> History:
    history = History()
    history.observe(state(when), numbered(*events))
    return history


def test_a_tail_gives_each_reader_what_is_new() -> None:
    tail: Tail[int] = Tail(3)
    for number in range(5):
        tail.append(number)
    assert tail.since(0) == [2, 3, 4] and tail.since(4) == [4] and tail.since(5) == []


def test_events_are_taken_in_once() -> None:
    history = History()
    events = numbered(call(NOW), call(NOW + 1))
    history.observe(state(NOW + 2), events)
    history.observe(state(NOW + 3), [*events, *numbered(call(NOW + 2), first=2)])
    assert sum(bar.items for bar in [*history.bars.since(0), *history.growing()]) == 12
    assert history.rate("r1", "denoise") == pytest.approx(12 / 2)


def test_calls_in_a_row_are_one_bar_until_it_is_long() -> None:
    calls = [call(NOW + step) for step in range(10)]
    history = seen(*calls, call(NOW + 10, stage="decode"), when=NOW + 11)
    bars = [*history.bars.since(0), *history.growing()]
    assert all(bar.end - bar.start <= BAR_SECONDS for bar in bars)
    assert sum(bar.calls for bar in bars) == 11 and len(bars) == 4
    assert [bar.stage for bar in history.growing()] == ["decode"]
    history.observe(state(NOW + 20), numbered(*calls))
    assert not history.growing() and history.bars.count == 4


def test_a_pause_ends_a_bar() -> None:
    history = seen(call(NOW), call(NOW + 1.5), when=NOW + 2.5)
    assert [bar.end - bar.start for bar in [*history.bars.since(0), *history.growing()]] == [1.0, 1.0]


def test_running_calls_are_known_from_the_state() -> None:
    history = seen(call(NOW))
    history.observe(state(NOW + 4, worker(0, "decode"), worker(1)), [])
    (bar,) = history.running()
    assert (bar.stage, bar.start, bar.end, bar.calls) == ("decode", NOW + 1, NOW + 4, 0)


def test_after_a_pause_a_call_runs_from_when_it_came() -> None:
    history = seen(call(NOW))
    history.observe(state(NOW + 60), [])
    history.observe(state(NOW + 61, worker(0, "decode"), worker(1)), [])
    (bar,) = history.running()
    assert (bar.start, bar.end) == (NOW + 60, NOW + 61), "it had no task for a minute"


def test_what_was_shown_as_running_before_it_computed_stays() -> None:
    history = seen(call(NOW - 1), when=NOW)
    history.observe(state(NOW + 9, worker(0, "decode"), worker(1)), [])
    history.observe(state(NOW + 12), numbered(call(NOW + 10, stage="decode"), call(NOW + 11, stage="decode"), first=1))
    bars = [*history.bars.since(0), *history.growing()]
    assert [(bar.start - NOW, bar.end - NOW, bar.calls) for bar in bars] == [(-1, 0, 1), (0, 10, 0), (10, 12, 2)]
    assert sum(sum(one.stage_seconds.values()) for one in history.bins) == 13
    assert sum(bar.items for bar in bars) == 12


def test_what_a_call_loaded_is_drawn_before_it() -> None:
    history = seen(replace(call(NOW), load_seconds=3.0), when=NOW + 1)
    bars = [*history.bars.since(0), *history.growing()]
    assert [(bar.start - NOW, bar.end - NOW, bar.calls) for bar in bars] == [(-3, 0, 0), (0, 1, 1)]


def test_bins_hold_the_seconds_of_all_calls() -> None:
    start = NOW // BIN_SECONDS * BIN_SECONDS
    history = seen(call(start + 1, 4.0), call(start, 1.0, on=1), when=start + 6)
    assert {one.start - start: dict(one.stage_seconds) for one in history.bins} == {
        0: {"denoise": 2.0},
        2: {"denoise": 2.0},
        4: {"denoise": 1.0},
    }
    history.observe(state(start + 10_000), numbered(call(start + 9_999), first=2))
    assert len(history.bins) <= WINDOW_SECONDS // BIN_SECONDS
    assert sum(sum(one.stage_seconds.values()) for one in history.bins) == 1.0


def test_a_page_that_is_opened_late_takes_the_latest_calls_and_all_that_is_rare() -> None:
    retag = RolesChanged(NOW, "tcp://h:1", {}, {"r1/decode": 1.0}, "why", "split", 10.0, 20.0)
    calls = [call(NOW + number / 100, 0.01) for number in range(CALLS_A_LOOK + 500)]
    history = seen(retag, *calls, when=NOW + 200)
    assert sum(bar.calls for bar in [*history.bars.since(0), *history.growing()]) == CALLS_A_LOOK
    assert [mark.kind for mark in history.marks.since(0)] == ["retag"]
    assert history.points.count <= 41


def test_uses_are_shares_of_the_fleet() -> None:
    history = History()
    history.observe(state(NOW, worker(0), worker(1), worker(2), worker(3)), [])
    now = worker(0, "denoise", load=0.5), worker(1, starving=1.0), worker(2, blocked=1.0), worker(3)
    history.observe(state(NOW + 1, *now), [])
    (use,) = history.uses.since(0)
    assert use.shares == {"busy": 0.125, "load": 0.125, "blocked": 0.25, "starving": 0.25}
    assert "<b>25%</b> starving" in cards.headline(history) and "<b>25%</b> idle" in cards.headline(history)


def test_without_a_job_the_fleet_is_idle() -> None:
    history = History()
    history.observe(state(NOW, worker(0), jobs=()), [])
    history.observe(state(NOW + 1, worker(0, starving=1.0), jobs=()), [])
    assert "<b>100%</b> idle" in cards.headline(history) and "starving" not in cards.headline(history)


def test_failures_are_kept_once_by_their_message() -> None:
    written = ShardWritten(NOW, "r1", 0, 8, 1, ("denoise: too long",))
    history = seen(written, written, ItemQuarantined(NOW, "r1", 7, "denoise", 3), WorkerLeft(NOW, "tcp://h:1", 2))
    assert [(one.text, one.times) for one in history.failures.values()] == [
        ("denoise: too long", 2),
        ("item 7 killed its worker 3 times in denoise and is given up", 1),
    ]
    many = [replace(written, errors=(f"problem {number}",)) for number in range(500)]
    history.observe(state(NOW + 1), numbered(*many, first=4))
    assert len(history.failures) == 50 and ("r1", "problem 499") in history.failures
    text = cards.failures(history)
    assert "problem 499" in text and text.count("data-failure") == cards.LINES_SHOWN


def test_a_job_that_ended_stays_for_a_while() -> None:
    history = seen()
    history.observe(state(NOW + 2, jobs=()), numbered(JobEnded(NOW + 1, "r1", "finished", 100, 98, 3)))
    text = cards.lanes(history, Palette())
    assert "<b>apples</b> finished at" in text and "98 of 100 items" in text and "3 failed" in text
    assert "3 failed items" in cards.failures(history)
    assert "40 s device time" in text and "<th" not in text, "the heads are those of running jobs"
    headline = cards.headline(history)
    assert "<b>No</b> job is running" in headline and "<b>40 s</b> device time" in headline


def test_what_a_job_spent_after_the_last_look_counts() -> None:
    history = seen()
    history.observe(state(NOW + 2, jobs=()), numbered(call(NOW), JobEnded(NOW + 1, "r1", "finished", 100, 98, 3)))
    assert history.device_seconds == {"r1": 41.0}


def test_a_device_time_that_is_not_known_is_not_shown() -> None:
    history = History()
    history.observe(state(NOW, jobs=()), numbered(call(NOW - 1), JobEnded(NOW, "r1", "finished", 100, 98, 3)))
    assert "device time" not in cards.headline(history) + cards.lanes(history, Palette())


def test_a_workers_number_does_not_read_like_a_count() -> None:
    retag = RolesChanged(
        NOW, "tcp://h:1", {}, {"r1/decode": 1.0}, "2 joined; tcp://h:3 left; x began", "split", 1.0, 1.0
    )
    history = seen(retag, WorkerLeft(NOW, "tcp://h:1", 2))
    assert "<b>worker 1</b> worker 2 joined; worker h:3 left; x began: nothing" in cards.decisions(history)
    assert "<b>worker 1</b> left; 2 tasks go elsewhere" in cards.failures(history)
    assert worker_text("dfdask-worker-a1b2") == "dfdask-worker-a1b2"


def test_the_legends_name_all_that_is_drawn() -> None:
    stages, uses = cards.timeline_legend(Palette()), cards.uses_legend()
    assert all(f"</i>{name}<" in stages for name in ("changed its role", "joined", "left"))
    assert [name for name in (*USES, "idle") if f'title="{cards._USE_WORDS[name][1]}"' in uses] == [*USES, "idle"]


def test_roles_as_text() -> None:
    names = {"r1": "apples", "r2": "pears"}
    assert roles_text({"r1/decode": 1.0, "r1/encode": 0.0}, names) == "decode"
    assert roles_text({"r1/decode": 0.2, "r1/denoise": 0.8}, names) == "denoise 80% + decode 20%"
    assert roles_text({"r1/decode": 0.5, "r2/decode": 0.5}, names) == "decode of pears 50% + decode of apples 50%"
    assert roles_text({f"r1/s{part}": part / 15 for part in range(1, 6)}, names).endswith("+ 2 more")
    assert roles_text({}, names) == "nothing"


def test_what_the_lanes_say() -> None:
    text = cards.lanes(seen(), Palette())
    assert 'data-stage="denoise" data-queued="10" data-running="4" data-waiting="6" data-done="80"' in text
    assert 'data-committed="70" data-items="100" data-failed="1"' in text
    assert "550 ms" in text and "of 500 ms" in text and "1.50 MB" in text and "1 min 30 s left" in text


def test_texts_from_outside_are_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>"
    job = replace(JOB, name=evil, output=evil, run=evil, stages=(replace(STAGE, name=evil),))
    history = History()
    events = [
        ShardWritten(NOW, evil, 0, 8, 1, (evil,), {3: b"jpeg"}),
        RolesChanged(NOW, evil, {}, {f"{evil}/{evil}": 1.0}, evil, evil, 0.0, 0.0),
        WorkerLeft(NOW, evil, 1),
    ]
    history.observe(state(jobs=(job,)), numbered(*events))
    palette = Palette()
    texts = [cards.headline(history), cards.lanes(history, palette), cards.failures(history)]
    texts += [cards.decisions(history), cards.pictures(history), cards.timeline_legend(palette)]
    history.observe(state(NOW + 1, jobs=()), numbered(JobEnded(NOW, evil, evil), first=3))
    texts.append(cards.lanes(history, palette))
    for text in texts:
        assert "<img src=x" not in text


def test_each_stage_keeps_its_colour() -> None:
    palette = Palette()
    names = ["upscale", "decode", *(f"step{number}" for number in range(10))]
    slots = [palette.slot(name) for name in names]
    assert slots == [palette.slot(name) for name in names]
    assert palette.slot("encode") == 0 and slots[1] == 2 and slots[-1] == OTHERS
    assert len(set(SLOTS)) == len(SLOTS)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


def address(client: Client) -> str:
    return str(client.dashboard_link).removesuffix("/status")


def fake_job(folder: Path, items: int = 24, **fake: Any) -> dict[str, Any]:
    prompts = [{"prompt": f"prompt {number}", "id": str(number)} for number in range(items)]
    return {"model": {"fake": fake}, "prompts": prompts, "batch": 4, "shard": 8, "output": str(folder / "run")}


def test_the_page_is_a_tab_of_dasks_dashboard(client: Client) -> None:
    assert '<a href="dfdask">' in fetch(f"{address(client)}/status")
    page = fetch(f"{address(client)}/dfdask")
    assert '<a href="status">' in page and 'id="dfdask"' in page


def test_a_page_follows_a_job(client: Client, tmp_path: Path) -> None:
    with Watcher(f"{address(client)}/dfdask") as watcher:
        run = submit(fake_job(tmp_path, fail=["5"]), client=client).wait()
        until(lambda: "24 of 24 items" in watcher.text(), 30, "the page to show the end of the job")
        (failure,) = run.failures()
        assert failure["error"] in watcher.text()
        assert "data:image/jpeg;base64," in watcher.text()


def test_pages_that_break_stop_no_job(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watcher(f"{address(client)}/dfdask"):
        monkeypatch.setattr(cards, "lanes", lambda history, palette: 1 / 0)
        run = submit(fake_job(tmp_path), client=client).wait()
    assert run.progress.committed_items == 24


class Drawing(SchedulerPlugin):
    """In the gate's place: at each look there are 48 new pictures of 60 kB."""

    name = "dfdask-gate"

    def __init__(self) -> None:
        self.events: deque[tuple[int, Event]] = deque(maxlen=1)

    def state(self) -> ClusterState:
        number = self.events[-1][0] + 1 if self.events else 0
        pictures = {row: os.urandom(60_000) for row in range(48)}
        self.events.append((number, ShardWritten(NOW + number, "r1", number, 48, 0, (), pictures)))
        return state(NOW + number)


def test_one_who_does_not_read_holds_up_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """More would pile up in the scheduler's memory for as long as a browser hangs."""
    monkeypatch.setattr("dfdask.dashboard.sampler.EVERY_SECONDS", 0.05)
    monkeypatch.setattr("dfdask.dashboard.sampler.MOST_OF_CPU", 1.0)

    def connect(port: int) -> socket.socket:
        page = fetch(f"http://127.0.0.1:{port}/dfdask")
        token = re.search(r'"token":"([^"]+)"', page)
        assert token is not None
        reader = socket.create_connection(("127.0.0.1", port), 20)
        lines = ["GET /dfdask/ws HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Key: " + b64encode(os.urandom(16)).decode(), "Sec-WebSocket-Version: 13"]
        lines += [f"Sec-WebSocket-Protocol: bokeh, {token[1]}", "", ""]
        reader.sendall("\r\n".join(lines).encode())
        assert b"101" in reader.recv(20)
        return reader

    async def watch() -> tuple[int, int]:
        plugins = [Drawing(), Dashboard()]
        async with Scheduler(
            host="127.0.0.1", port=0, dashboard=True, dashboard_address="127.0.0.1:0", plugins=plugins
        ) as scheduler:
            sampler = scheduler.plugins[Dashboard.name].sampler
            with await asyncio.to_thread(connect, scheduler.http_server.port):
                (view,) = sampler._views
                changes = 0

                def count(event: Any) -> None:
                    nonlocal changes
                    changes += getattr(getattr(event, "model", None), "name", None) == "pictures"

                view._document().on_change(count)
                while sampler.looks < 15:
                    await asyncio.sleep(0.05)
            return sampler.looks, changes

    looks, changes = asyncio.run(watch())
    assert looks >= 15
    # 3.8 MB each in base64, into buffers of the system that take a few MB.
    assert 1 <= changes <= 6


def test_a_scheduler_without_a_dashboard_works() -> None:
    async def start() -> tuple[list[str], bool]:
        async with Scheduler(
            host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0", plugins=scheduler_plugins()
        ) as scheduler:
            plugin = scheduler.plugins[Dashboard.name]
            return [type(app).__name__ for app in scheduler.http_application.applications], plugin.sampler is not None

    applications, samples = asyncio.run(start())
    assert samples and not applications


def test_a_users_own_cluster_gets_the_page(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        pages = f"http://127.0.0.1:{cluster.scheduler.http_server.port}"
        assert '<a href="dfdask">' not in fetch(f"{pages}/status")
        submit(fake_job(tmp_path), client=client).wait()
        assert '<a href="dfdask">' in fetch(f"{pages}/status")
        assert 'id="dfdask"' in fetch(f"{pages}/dfdask")


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bdfdask_\w+", text))


@pytest.fixture(scope="module")
def exported(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Metric lines of scheduler and workers after a job, while another one is on the cluster."""
    loads = {"weights": {"denoise": 1000}, "load_seconds": 0.05}
    run = submit(fake_job(tmp_path_factory.mktemp("done"), **loads), client=client)
    run.wait()
    slow = fake_job(tmp_path_factory.mktemp("slow"), 400, stages={"encode": 0.0, "denoise": 0.05, "decode": 0.0})
    running = submit(slow, client=client)
    until(lambda: running.progress.committed_items, 60, "the second job to run")
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    places = [f"http://{info['host']}:{info['services']['dashboard']}/metrics" for info in workers]
    texts = {"scheduler": fetch(f"{address(client)}/metrics"), "workers": "".join(map(fetch, places))}
    running.stop()
    with suppress(JobStopped):
        running.wait(60)
    until(lambda: not any(client.processing().values()), 20, "the workers to be idle")
    return texts


def test_metrics_are_those_that_are_documented(exported: dict[str, str]) -> None:
    lines = [line for text in exported.values() for line in text.splitlines() if not line.startswith("#")]
    there = {name for name in names_in("\n".join(lines)) if not name.endswith("_created")}
    documented = set(re.findall(r"^\| `(dfdask_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert there == documented


def test_metrics_count_what_was_done(exported: dict[str, str]) -> None:
    done = sum(
        float(value)
        for value in re.findall(r'^dfdask_worker_items_total{stage="denoise"} (\S+)', exported["workers"], re.MULTILINE)
    )
    assert done >= 24
    assert re.search(r"^dfdask_worker_resident_bytes [1-9]", exported["workers"], re.MULTILINE)
    assert re.search(r'^dfdask_job_items{name="run",run="\w+"} 400.0$', exported["scheduler"], re.MULTILINE)
    assert re.search(r'^dfdask_events_total{event="ShardWritten"} [1-9]', exported["scheduler"], re.MULTILINE)


def test_the_grafana_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    documented = names_in((ROOT / "docs" / "metrics.md").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [entry["query"]["query"] for entry in board["templating"]["list"] if entry["type"] == "query"]
    assert len(asked) > 20
    for expression in asked:
        names = names_in(expression)
        assert names and names <= documented, expression
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
    identifiers = [panel["id"] for panel in board["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in board["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
