"""How long a training loop runs, and what it writes down on the way."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import Tensor


class Budget:
    """A loop's end: a number of steps, exactly repeatable, or else minutes from the first step."""

    def __init__(self, minutes: float, steps: int | None = None) -> None:
        self._seconds, self._steps = minutes * 60, steps
        self._start: float | None = None

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end or after it."""
        if self._steps is not None:
            return step / self._steps if self._steps else 1.0
        if self._seconds <= 0:
            return 1.0
        # The first two steps compile: the schedule begins after them.
        if step < 2:
            return 0.0
        if self._start is None:
            self._start = time.monotonic()
        return (time.monotonic() - self._start) / self._seconds


class Log:
    """Mean losses every `every` steps, to the screen and to a JSON-lines file."""

    def __init__(self, path: Path, every: int = 200) -> None:
        self._path, self._every = path, every
        self._sums: dict[str, Tensor] = {}
        self._start = time.monotonic()

    def add(self, part: str, step: int, **losses: Tensor) -> None:
        """Counts one step in; reads the device only when it writes."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss.detach()
        if step % self._every == 0:
            means = {name: round(total.item() / self._every, 5) for name, total in self._sums.items()}
            self.write(part=part, step=step, **means)
            self._sums = {}

    def write(self, **facts: str | int | float) -> None:
        """One line, with the seconds since the start."""
        line = json.dumps({"seconds": round(time.monotonic() - self._start, 1), **facts})
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")
