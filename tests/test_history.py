"""What is read out of a run's events, and the charts of it."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from told import BEGAN, RUN, later, told

from dfdask import charts
from dfdask.charts import Axis
from dfdask.history import History, roles_text

STAGES = ["encode", "denoise", "decode"]


def test_totals_are_those_of_the_events() -> None:
    events = told()
    shuffled = random.Random(1).sample(events, len(events))
    history = History.of(shuffled, STAGES)
    assert history == History.of(events, STAGES)
    tasks = [event for event in events if event["event"] == "TaskDone"]
    assert [stage.name for stage in history.stages] == STAGES
    for stage in history.stages:
        own = [event for event in tasks if event["stage"] == stage.name]
        assert (stage.calls, stage.items) == (len(own), sum(event["items"] for event in own))
        assert stage.seconds == pytest.approx(sum(event["seconds"] for event in own))
        known = [event for event in own if event["predicted_seconds"]]
        wrong = sum(abs(event["predicted_seconds"] - event["seconds"]) for event in known)
        assert stage.error == pytest.approx(wrong / sum(event["seconds"] for event in known))
        made = sum(history.rates(stage.name, 70)) * history.seconds / 70
        assert made == pytest.approx(stage.items)
    assert (history.began, history.ended, history.job_ended) == (BEGAN, BEGAN + 300, BEGAN + 300)
    busy = sum(sum(cell.values()) for lane in history.busy(50).values() for cell in lane) * history.seconds / 50
    assert busy == pytest.approx(sum(event["seconds"] for event in tasks))


def test_pauses_between_starts_are_left_out() -> None:
    killed, resumed = told(ended=False), later(7200.0)
    last = max(event["when"] for event in killed if event["event"] in ("TaskDone", "ShardWritten"))
    history = History.of([*killed, *resumed], STAGES)
    assert history.pauses == ((last, BEGAN + 7200),)
    assert history.seconds == pytest.approx(last - BEGAN + 300)
    assert [history.at(BEGAN + when) for when in (0, 150, 7200, 7210)] == pytest.approx(
        [0, 150, last - BEGAN, last - BEGAN + 10]
    )
    rates, busy = history.rates("denoise", 40), history.busy(40)
    assert sum(rates) * history.seconds / 40 == pytest.approx(
        sum(w.items for w in history.work if w.stage == "denoise")
    )
    assert sum(sum(cell.values()) for cell in busy["tcp://10.0.0.3:4000"][18:22]) > 2, "no hole in the middle"
    before, _, after, _ = history.decisions
    assert before.actual_seconds == pytest.approx(history.seconds - 0.1)
    assert (after.rate_before, after.rate_after) == (None, History.of(told(), STAGES).decisions[0].rate_after)
    titles = [element.text for element in ET.fromstring(charts.timeline(history)).iter() if element.text]
    assert "4 min 59 s: started again after 1 h 55 min" in titles


def test_another_client_at_work_makes_no_pause() -> None:
    second = {"event": "JobStarted", "when": BEGAN + 100.03, "run": RUN}
    alone = [event for event in told() if event.get("worker") == "tcp://10.0.0.3:4000"]
    assert any(event["start"] < second["when"] < event["when"] for event in alone if event["event"] == "TaskDone")
    assert History.of([*alone, second]).pauses == ()


def test_sums_of_calls_read_like_calls() -> None:
    tasks = [event for event in told() if event["event"] == "TaskDone" and event["worker"] == "tcp://10.0.0.3:4000"]
    names = ("items", "seconds", "load_seconds", "nbytes")
    total: dict[str, Any] = {**tasks[-1], **{name: sum(event[name] for event in tasks) for name in names}}
    total |= {"start": tasks[0]["start"], "first": tasks[0]["when"], "events": len(tasks), "predicted_seconds": None}
    (stage,) = History.of([total]).stages
    assert (stage.calls, stage.error, stage.predicted_item_seconds) == (len(tasks), None, None)
    assert stage.measured_item_seconds == pytest.approx(History.of(tasks).stages[0].measured_item_seconds)


def test_decisions_and_what_came_of_them() -> None:
    first, second = History.of(told(), STAGES).decisions
    assert [len(decision.moves) for decision in (first, second)] == [6, 2]
    assert first.moves[0].before == {} and first.moves[0].after == {"denoise": 1.0}
    assert (second.stay_seconds, second.predicted_seconds, second.actual_seconds) == (200.0, 140.0, 150.0)
    assert (second.predicted_gain_seconds, second.actual_gain_seconds) == (60.0, 50.0)
    assert first.stay_seconds is None and first.actual_gain_seconds is None, "there was nothing to stay with"
    assert second.rate_before and second.rate_after and first.rate_before is None
    unended = History.of(told(ended=False)).decisions[1]
    assert (unended.actual_seconds, unended.actual_gain_seconds) == (None, None)


def test_stages_of_other_jobs_are_told_apart() -> None:
    event = {
        "event": "RolesChanged", "when": 2.0, "worker": "w", "before": {f"{RUN}/encode": 1.0},
        "after": {"ffff/encode": 0.5, f"{RUN}/encode": 0.5}, "reason": "", "policy": "",
    }  # fmt: skip
    history = History.of([{"event": "JobStarted", "when": 1.0, "run": RUN}, event])
    assert history.decisions[0].moves[0].after == {"encode of ffff": 0.5, "encode": 0.5}
    assert (history.decisions[0].stay_seconds, history.decisions[0].predicted_gain_seconds) == (None, None)


def test_presence_of_workers_that_come_and_go() -> None:
    events = [
        {"event": "WorkerJoined", "when": 1.0, "worker": "a"},
        {"event": "WorkerJoined", "when": 2.0, "worker": "b"},
        {"event": "WorkerLeft", "when": 4.0, "worker": "a"},
        {"event": "WorkerLeft", "when": 5.0, "worker": "stranger"},
        {"event": "WorkerJoined", "when": 6.0, "worker": "a"},
        {"event": "TaskDone", "when": 9.0, "start": 7.0, "worker": "c", "stage": "x", "items": 1, "seconds": 2.0},
    ]
    there = History.of(events).presence()
    assert there == {"a": [(1.0, 4.0), (6.0, 9.0)], "b": [(2.0, 9.0)], "c": [(7.0, 9.0)]}


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({}, "nothing"),
        ({"encode": 0.0}, "(encode)"),
        ({"encode": 0.3}, "encode"),
        ({"encode": 0.25, "decode": 0.75, "denoise": 0.0}, "encode 25% + decode 75%"),
    ],
)
def test_roles_in_words(roles: dict[str, float], words: str) -> None:
    assert roles_text(roles) == words


@pytest.mark.parametrize("workers", [1, 6, 400])
def test_charts_are_sound_and_small(workers: int) -> None:
    history = History.of(told(workers, seconds=60), STAGES)
    for chart in (charts.timeline(history), charts.rates(history), charts.predictions(history)):
        tree = ET.fromstring(chart)
        assert len(chart) < 2_000_000
        assert {element.tag.partition("}")[2] for element in tree.iter()} <= {
            "svg",
            "g",
            "path",
            "text",
            "title",
            "circle",
        }
    titles = [
        element.text for element in ET.fromstring(charts.timeline(history)).iter() if element.tag.endswith("title")
    ]
    assert any("encode is slower" in str(title) for title in titles)


def test_charts_of_nothing() -> None:
    nothing = History.of([])
    assert charts.timeline(nothing) == charts.rates(nothing) == charts.predictions(nothing) == ""
    assert nothing.seconds == 0 and nothing.presence() == {}


def test_texts_from_outside_do_not_become_markup() -> None:
    events = told(2, seconds=20)
    for event in events:
        if "worker" in event:
            event["worker"] = "<script>" + event["worker"]
        if "reason" in event:
            event["reason"] = '"><img src=x onerror=alert(1)>'
    history = History.of(events)
    for chart in (charts.timeline(history), charts.legend(["<b>"])):
        assert "<script" not in chart and "<img" not in chart and "<b>" not in chart


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 10, 0, 100), [0, 2, 4, 6, 8, 10]),
        (Axis(0, 100, 0, 100, time=True), [0, 30, 60, 90]),
        (Axis(0.3, 4, 0, 100, log=True), [0.5, 1, 2]),
        (Axis(0.005, 500, 0, 100, log=True), [0.01, 0.1, 1, 10, 100]),
    ],
)
def test_ticks(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)
    assert axis.px(axis.low) == pytest.approx(0) and axis.px(axis.high) == pytest.approx(100)


def test_a_run_that_was_stopped_and_went_on_is_told_start_by_start() -> None:
    later = 1000.0
    first = [{**event, "reason": "stopped"} if event["event"] == "JobEnded" else event for event in told(seconds=100.0)]
    second = [
        {**event, **{name: event[name] + later for name in ("when", "start") if name in event}}
        | ({"worker": f"{event['worker']}1"} if "worker" in event else {})
        for event in told(seconds=100.0)
    ]
    history = History.of([*first, *second], STAGES)
    halves = [[one for one in history.decisions if (one.when > BEGAN + later) == late] for late in (False, True)]
    assert all(one.actual_seconds is None for one in halves[0]), "its end never came"
    assert all(0 < one.actual_seconds <= 100 for one in halves[1] if one.actual_seconds is not None) and halves[1]
    presence = history.presence()
    assert presence["tcp://10.0.0.0:4000"] == [(BEGAN, BEGAN + 100)], "the first start's workers ended with it"
    assert presence["tcp://10.0.0.0:40001"] == [(BEGAN + later, BEGAN + later + 100)]
