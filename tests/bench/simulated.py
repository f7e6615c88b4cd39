"""What the benchmarks that simulate workers share: three stages, how long their calls take, and workers' addresses."""

from __future__ import annotations

import random

STAGES = {"encode": 0.05, "denoise": 0.5, "decode": 0.2}  # seconds per item


def address_of(worker: int) -> str:
    return f"tcp://127.0.0.1:{20_000 + worker}"


def call_seconds(stage: str, items: int, rng: random.Random) -> float:
    """What one call of ``stage`` takes: its usual time, a fifth more or less."""
    return STAGES[stage] * items * rng.uniform(0.8, 1.2)
