"""``dfdask check``: what was lost or damaged is listed, and withdrawn where that is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stored import new_run, put

from dfdask.cli import main
from dfdask.store import RunStore
from dfdask.targets import Location


@pytest.fixture
def store(local: Location) -> RunStore:
    store = new_run(local, items=7, shard_items=3)
    for shard in range(3):
        put(store, shard)
    return store


def check(store: RunStore, *options: str) -> Result:
    return CliRunner().invoke(main, ["check", str(store.location.path), *options])


def test_a_sound_run(store: RunStore) -> None:
    result = check(store)
    assert result.exit_code == 0 and "3 of 3 shards committed, all as they were written" in result.output
    (store.location.path / "commits/00000001.json").unlink()
    assert "2 of 3 shards committed" in check(store).output, "what is not there yet is no damage"


@pytest.mark.parametrize("lost", ["image", "image/c/1"])
def test_lost_pictures_are_made_again(store: RunStore, lost: str) -> None:
    shutil.rmtree(store.location.path / lost)
    shards = {0, 1, 2} if lost == "image" else {1}
    result = check(store)
    assert result.exit_code == 3, result.output
    for shard in range(3):
        assert (f"shard {shard}" in result.output) == (shard in shards), result.output
    assert f"Error: {store.location}" in result.output and "--repair" in result.output
    repaired = check(store, "--repair")
    assert repaired.exit_code == 0 and "the same dfdask run command" in repaired.output, repaired.output
    assert store.committed() == {0, 1, 2} - shards
    for shard in shards:
        put(store, shard)
    assert check(store).exit_code == 0


@pytest.mark.parametrize("text", ['{"shard": 1}', "{", '{"shard": 1, "start": 3, "stop": 6, "failed": 0}', "5"])
def test_a_damaged_commit_is_told_by_all_and_withdrawn(store: RunStore, text: str) -> None:
    path: Path = store.location.path
    (path / "commits/00000001.json").write_text(text)
    for command in ("status", "show"):
        result = CliRunner().invoke(main, [command, str(path)])
        assert result.exit_code == 3 and "commits/00000001.json is damaged" in result.output, result.output
    found = check(store, "--json")
    assert found.exit_code == 3
    damage = json.loads(found.stdout)["damage"]
    assert [one["shard"] for one in damage] == [1]
    assert check(store, "--repair").exit_code == 0 and store.committed() == {0, 2}
