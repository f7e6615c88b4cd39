"""The GPU benchmark runs from end to end on a CPU, with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("gpu_job.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["flux", "sdxl", "sd35", "wan"])
def test_dry_run(model: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--model", model, "--folder", str(tmp_path / "model"), "--tiny"]
    only = "residency,plain,job,group"
    options = ["--device", "cpu", "--prompts", "5", "--steps", "3", "--only", only, "--out", str(tmp_path)]
    subprocess.run([*command, *options], check=True, timeout=540)
    rows = json.loads((tmp_path / f"{model}.json").read_text())["rows"]
    assert not [row for row in rows if row.get("failed")]
    names = " ".join(row["variant"] for row in rows)
    for name in (
        "dfdask job, capped",
        "dfdask stage denoise",
        "plain, resident",
        "group offload",
        "all blocks streamed",
    ):
        assert name in names
    (done,) = [row for row in rows if row["variant"] == "dfdask job, capped"]
    assert done["failed"] == 0 and done["prompts"] == 5 and set(done["stages"]) == {"encode", "denoise", "decode"}
    assert all(stage["items"] == 5 for stage in done["stages"].values())
