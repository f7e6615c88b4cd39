"""The commands that need a cluster and a store, as processes of their own, with fake stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from click.testing import CliRunner

from dfdask.cli import main

ROOT = Path(__file__).parents[1]
JOB = """
model: {fake: {stages: {encode: 0.0, denoise: %s, decode: 0.0}, fail: ["000002"]}}
prompts: prompts.txt
batch: 2
shard: 2
workers: 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB % 0.0)
    (tmp_path / "slow.yaml").write_text(JOB % 0.2)
    (tmp_path / "seen.yaml").write_text(JOB % 0.08)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(40)))
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dfdask", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def call(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def status(folder: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(folder, "status", run, "--json").stdout)
    return found


def test_a_run_from_start_to_export(folder: Path) -> None:
    first = call(folder, "run", "job.yaml", "--limit", "6").stdout
    for part in (
        "model",
        "fake stages",
        "6 of 6 items committed",
        "finished:",
        "contact-sheet.png",
        "dashboard",
    ):
        assert part in first, first
    assert (folder / "runs/job/report/contact-sheet.png").stat().st_size

    found = status(folder, "job.yaml")
    assert found == status(folder, "local/job") == status(folder, "./runs/job")
    assert (found["items"], found["ok_items"], found["failed_items"], found["complete"]) == (6, 5, 1, True)
    assert found["stored_bytes"] > 0
    assert "3 of 3 committed" in call(folder, "status", "local/job").stdout

    details = call(folder, "show", "local/job").stdout
    for part in ("batch", "versions", "denoise", "000002", "prompt 2"):
        assert part in details, details

    again = call(folder, "run", "job.yaml", "--limit", "6").stdout
    assert "6 of them were there already" in again

    exported = call(folder, "export", "local/job", "out", "--format", "png").stdout
    assert "wrote 5 items" in exported
    assert len((folder / "out/metadata.jsonl").read_text().splitlines()) == 5
    call(folder, "export", "local/job", "out", code=3)

    changed = call(folder, "run", "job.yaml", "--limit", "5", code=3).stderr
    assert "--new-run" in changed


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(folder: Path) -> None:
    process = subprocess.Popen(
        command("run", "slow.yaml"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 60
        while not list((folder / "runs").glob("slow/commits/0*.json")) and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the job
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert "Stopping:" in out, out + err
    assert "the same command goes on" in err and "Traceback" not in err
    done = status(folder, "slow.yaml")
    assert 0 < done["committed_shards"] < done["shards"]
    call(folder, "run", "slow.yaml")
    assert status(folder, "slow.yaml")["complete"]
    assert int((xr.open_zarr(folder / "runs/slow").status == 1).sum()) == 39


def test_every_item_failed_is_an_error(folder: Path) -> None:
    fake = {"fail": ["000000", "000001"]}
    (folder / "bad.yaml").write_text(json.dumps({"model": {"fake": fake}, "prompts": ["a", "b"], "workers": 1}))
    assert "every item failed" in call(folder, "run", "bad.yaml", code=1).stderr


@pytest.mark.parametrize("arguments", [("status",), ("show",), ("export", "out")])
@pytest.mark.parametrize("run", ["local/nothing", "./nothing", "job.yaml"])
def test_a_run_that_is_not_there(folder: Path, arguments: tuple[str, ...], run: str) -> None:
    result = call(folder, arguments[0], run, *arguments[1:], code=3)
    assert result.stderr.startswith("Error: ")


def test_a_scheduler_that_is_not_there(folder: Path) -> None:
    error = call(folder, "run", "job.yaml", "--scheduler", "tcp://127.0.0.1:9", code=4).stderr
    assert error.startswith("Error: ") and "127.0.0.1:9" in error
    assert not (folder / "runs/job").exists()


def test_a_run_that_others_watch_and_explain(folder: Path) -> None:
    """JSON lines of the run itself and of somebody who watches it; then what it leaves to explain."""
    process = subprocess.Popen(
        command("run", "seen.yaml", "--json"), cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        first = json.loads(process.stdout.readline())
        assert (first["event"], first["phase"], first["run"]) == ("Progress", "running", "seen")
        watched = call(folder, "status", "seen.yaml", "--watch", "--json").stdout.splitlines()
        rest = process.stdout.read().splitlines()
    finally:
        process.stdout.close()
        if process.wait(60):
            process.kill()
    assert process.returncode == 0
    own, seen = json.loads(rest[-1]), json.loads(watched[-1])
    for last in (own, seen):
        assert (last["phase"], last["committed_items"], last["failed_items"]) == ("finished", 40, 1)

    place = str(folder / "runs/seen")
    explained = json.loads(CliRunner().invoke(main, ["explain", place, "--json"]).output)
    assert explained["complete"] and explained["decisions"] and len(explained["workers"]) == 1
    assert {stage["name"]: stage["items"] for stage in explained["stages"]} == dict.fromkeys(
        ("encode", "denoise", "decode"), 40
    )
    assert "denoise" in CliRunner().invoke(main, ["explain", place]).output
    page = CliRunner().invoke(main, ["report", place]).output.strip()
    assert page.endswith("runs/seen/report/report.html") and "000002" in Path(page).read_text()
