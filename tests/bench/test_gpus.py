"""The benchmark of several GPUs runs on a CPU, with tiny models and dfdask's own commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("gpus.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--folder", str(tmp_path / "model"), "--tiny", "--device", "cpu"]
    options = ["--gpus", "2", "--prompts", "200", "--steps", "8", "--only", "kill,shift", "--out", str(tmp_path)]
    subprocess.run([*command, *options], check=True, timeout=540)
    rows = {row["variant"]: row for row in json.loads((tmp_path / "gpus-flux.json").read_text())["rows"]}
    killed, shift = rows["dfdask, a worker killed"], rows["dfdask, shift"]
    assert killed["failed"] == shift["failed"] == 0
    assert killed["committed"] == 100 and shift["committed"] == 200
    assert {stage: told["items"] for stage, told in shift["stages"].items()} == dict.fromkeys(shift["stages"], 200)
    assert all(f"dfdask, shift: the half of {steps} steps" in rows for steps in (8, 4))
    assert rows["dfdask, a worker killed: after the kill"]["rate_after"] > 0
