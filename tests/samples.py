"""States of a job that several tests draw."""

from __future__ import annotations

from dataclasses import replace

from dfdask.events import Progress, StageProgress

PROGRESS = Progress(
    run="demo",
    output="runs/demo",
    phase="running",
    items=1632,
    committed_items=812,
    resumed_items=16,
    failed_items=2,
    shards=51,
    committed_shards=25,
    elapsed_seconds=400.2,
    items_per_second=2.104,
    eta_seconds=389.7,
    stages=(StageProgress("encode", 0, 8, 832, 2), StageProgress("denoise", 1200, 16, 820, 2)),
    workers=2,
    dashboard="http://127.0.0.1:8787/status",
)
ENDED = replace(PROGRESS, phase="finished", committed_items=1632, eta_seconds=None)
