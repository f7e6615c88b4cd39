"""What ``status`` and ``show`` say about a run, from its store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dfdask.store import Layout, RunStore
from dfdask.summary import failures, print_details, status_of, timings
from dfdask.targets import resolve_output

ITEMS, SHARD = 7, 3


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """Two of three shards committed; items 1 and 4 failed."""
    columns = {
        "id": np.array([f"id{n}" for n in range(ITEMS)], dtype=np.dtypes.StringDType()),
        "prompt": np.array([f"prompt {n}" for n in range(ITEMS)], dtype=np.dtypes.StringDType()),
        "seed": np.arange(ITEMS, dtype=np.uint32),
    }
    about = {
        "spec": {"batch": 3, "arguments": {"guidance_scale": 3.5}, "revision": None},
        "model": {"source": "bundled"},
        "versions": {"torch": "2.13.0"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    location = resolve_output(str(tmp_path / "demo"))
    store = RunStore.create(location, Layout("image", (8, 8, 3), ITEMS, SHARD), columns, {"dfdask": about})
    for shard, bad in ((0, 1), (1, 1)):
        status = np.ones(SHARD, dtype=np.uint8)
        status[bad] = 2
        errors = ["" if ok == 1 else "boom \x1b[2J\nsecond line" for ok in status]
        record = {"stage_seconds": {"encode": 0.5, "denoise": 3.0}, "worker": "w"}
        store.write_shard(shard, np.zeros((SHARD, 8, 8, 3), dtype=np.uint8), status, errors, record)
    return store


def test_status(store: RunStore) -> None:
    status = status_of(store)
    assert status.as_dict() | {"stored_bytes": 0, "output": ""} == {
        "run": "demo",
        "output": "",
        "items": 7,
        "ok_items": 4,
        "failed_items": 2,
        "shards": 3,
        "committed_shards": 2,
        "stored_bytes": 0,
        "complete": False,
    }
    files = [path for path in store.location.path.rglob("*") if path.is_file()]
    assert status.stored_bytes == sum(path.stat().st_size for path in files)
    rows = dict(status.rows())
    assert rows["items"] == "6 of 7 items committed (85%)"
    assert rows["shards"] == "2 of 3 committed"


def test_timings_are_per_stage_and_item(store: RunStore) -> None:
    assert timings(store.commits()) == [
        ("encode", "1.0 s, 0.1667 s an item"),
        ("denoise", "6.0 s, 1 s an item"),
    ]
    assert timings([]) == []


@pytest.mark.parametrize(("limit", "ids"), [(0, []), (1, ["id1"]), (20, ["id1", "id4"])])
def test_failures(store: RunStore, limit: int, ids: list[str]) -> None:
    found = list(failures(store, store.commits(), limit))
    assert [name for name, _ in found] == ids
    for name, text in found:
        assert text == f"boom \N{REPLACEMENT CHARACTER}[2J second line  [prompt {name[2:]}]"


def test_details(store: RunStore) -> None:
    console = Console(file=io.StringIO(), width=60)
    print_details(console, store, failures_limit=1)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in (
        "arguments.guidance_scale  3.5",
        "bundled",
        "torch",
        "2.13.0",
        "2026-01-01",
        "id1",
        "and 1 more",
    ):
        assert part in text, text
    assert "revision" not in text and "\x1b" not in text
