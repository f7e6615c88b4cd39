"""Texts for people: every value reads well, whatever its size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import PROGRESS

from dfdask import words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.21, "4.2 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (390, "6 min 30 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_390, "1 d 0 h"),
        (273_600, "3 d 4 h"),
        (float("inf"), "?"),
        (float("nan"), "?"),
        (-1, "?"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.000052, "0.052 ms"), (0.0249, "24.9 ms"), (0.9996, "1.00 s"), (9.53, "9.53 s"), (145.2, "145 s")],
)
def test_brief(seconds: float, text: str) -> None:
    assert words.brief(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 items/s"),
        (2.104, "2.10 items/s"),
        (12.34, "12.3 items/s"),
        (9.996, "10.0 items/s"),
        (99.96, "100 items/s"),
        (12_345.6, "12,346 items/s"),
        (0.05, "3.00 items/min"),
        (0.001, "3.60 items/h"),
        (float("nan"), "? items/s"),
    ],
)
def test_rate(value: float, text: str) -> None:
    assert words.rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_900, "1.00 MB"), (10**18, "1,000 PB")],
)
def test_size(value: int, text: str) -> None:
    assert words.size(value) == text


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_hundred_percent_means_all(part: int, whole: int) -> None:
    shown = words.percent(part, whole)
    assert (shown == "100%") == (part >= whole)


@given(st.text())
def test_printable_text_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = words.printable(text)
    assert shown.isprintable()
    assert len(words.clipped(text, 20)) <= 20


def test_stages_without_workers_are_named_while_it_runs() -> None:
    waiting = replace(PROGRESS, phase="running", unserved=("denoise", "decode"))
    for said in (words.status_line(waiting), words.notes(waiting)):
        assert said.endswith("no workers for denoise, decode yet")
    assert words.notes(replace(waiting, starting=1200)).endswith("no workers for denoise, decode yet, 1,200 starting")
    assert "no workers" not in words.status_line(replace(waiting, phase="failed"))


def test_status_line_says_everything_once() -> None:
    assert words.status_line(PROGRESS) == (
        "running: 812 of 1,632 items (49%); 2.10 items/s, 6 min 30 s left; "
        "encode 0 queued 8 running 832 done, denoise 1,200 queued 16 running 820 done; 2 failed"
    )
    early = replace(PROGRESS, phase="preparing", items_per_second=None, eta_seconds=None, stages=())
    assert words.status_line(replace(early, committed_items=0, failed_items=0)) == ("preparing: 0 of 1,632 items (0%)")


def test_notes() -> None:
    assert words.notes(PROGRESS) == "16 were there already, 2 failed, 2 workers"
    assert words.notes(replace(PROGRESS, phase="finished", resumed_items=0, failed_items=0)) == ""
