"""Costs are kept from run to run, and a file that is damaged, foreign or out of reach stops nobody."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfdask.cost import CostModel, TaskWork
from dfdask.cost_file import cache_folder, load_costs, save_costs

STAGES = ("encode", "denoise", "decode")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DFDASK_CACHE", str(tmp_path / "cache" / "dfdask"))
    return tmp_path / "cache" / "dfdask"


def learnt(seconds: float = 2.0, model: str = "m") -> CostModel:
    costs = CostModel()
    for stage in STAGES:
        for _ in range(9):
            costs.observe(model, stage, "h100", TaskWork(4), seconds)
    return costs


def put(folder: Path, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "costs.json").write_bytes(data)


def test_what_was_learnt_is_known_to_the_next_run() -> None:
    before, after = learnt(), CostModel()
    save_costs(before.to_json())
    after.learn(load_costs())
    for stage in STAGES:
        assert after.predict("m", stage, "h100", TaskWork(8)) == before.predict("m", stage, "h100", TaskWork(8))
        assert after.count("m", stage, "h100") == 9


def test_the_first_run_finds_nothing_and_is_not_warned(caplog: pytest.LogCaptureFixture) -> None:
    assert load_costs() == [] and not caplog.records


def test_the_folder_is_the_users_cache_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DFDASK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "dfdask"


def test_a_save_replaces_what_was_there(folder: Path) -> None:
    save_costs(learnt(2.0).to_json())
    save_costs(learnt(5.0).to_json())
    assert load_costs() == learnt(5.0).to_json()
    assert [path.name for path in folder.iterdir()] == ["costs.json"]


ENTRY = learnt().to_json()[0]
FOREIGN = {
    "empty": b"",
    "cut short": json.dumps(learnt().to_json()).encode()[:-20],
    "no text": b"\xff\xfe\x00",
    "a mapping": b'{"version": 2, "costs": []}',
    "null": b"null",
    "names": b'["encode", "denoise"]',
    "other keys": b'[{"model": "m", "seconds": 3.0}]',
    "other shape": json.dumps([{**ENTRY, "mean": [1.0, 2.0]}]).encode(),
    "not a number": json.dumps([{**ENTRY, "precision": [[float("nan")] * 4] * 4}]).encode(),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_none_of_ours_is_no_use_and_no_harm(
    folder: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(folder, data)
    with caplog.at_level(logging.WARNING, "dfdask"):
        found = load_costs()
    CostModel().learn(found)
    assert found == [] and "costs of earlier runs are not used" in caplog.text
    save_costs(learnt().to_json())
    assert load_costs() == learnt().to_json()


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*ENTRY, "x"]), inner, max_size=9),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_whatever_the_file_holds_a_cost_model_can_take_it(folder: Path, data: bytes) -> None:
    put(folder, data)
    CostModel().learn(load_costs())


def test_a_file_that_cannot_be_read_warns(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "costs.json").mkdir(parents=True)
    assert load_costs() == [] and "cannot be read" in caplog.text


def test_a_folder_that_cannot_be_made_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DFDASK_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        save_costs(learnt().to_json())
    assert caplog.text.count("costs are not kept for later runs") == 1 and load_costs() == []


def test_a_file_that_cannot_be_replaced_leaves_no_other_behind(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "costs.json").mkdir(parents=True)
    save_costs(learnt().to_json())
    assert "costs are not kept for later runs" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["costs.json"]


def test_numbers_that_json_lacks_keep_the_old_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_costs(learnt().to_json())
    save_costs([{**ENTRY, "mean": [float("nan")] * 4}])
    assert load_costs() == learnt().to_json() and "costs are not kept for later runs" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["costs.json"]


def test_who_reads_while_others_save_finds_one_whole_file(folder: Path) -> None:
    versions = [learnt(float(number), f"m{number}").to_json() for number in range(1, 5)]
    save_costs(versions[0])
    problems: list[Any] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            found = load_costs()
            if found not in versions:
                problems.append(found)

    def save(version: list[dict[str, Any]]) -> None:
        for _ in range(20):
            save_costs(version)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=save, args=(version,)) for version in versions]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert not problems and [path.name for path in folder.iterdir()] == ["costs.json"]
