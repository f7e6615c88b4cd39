"""What jobs that wait for workers and a cluster that starts some tell each other. Pure: times are given."""

from __future__ import annotations

STALE_SECONDS = 60.0
"""A word that is not repeated for so long holds no more."""


class Newcomers:
    """Whether a worker is wanted for a job that cannot begin without one, and how many are under way."""

    def __init__(self) -> None:
        self._wanted_at = self._told_at = float("-inf")
        self._starting = 0

    def want(self, now: float) -> int:
        """A job waits for a first worker, which its model is looked at on. Returns how many are under way."""
        self._wanted_at = now
        return self.starting(now)

    def wanted(self, now: float) -> bool:
        return now - self._wanted_at < STALE_SECONDS

    def tell(self, starting: int, now: float) -> None:
        """So many are asked for and not there."""
        self._starting, self._told_at = starting, now

    def starting(self, now: float) -> int:
        return self._starting if now - self._told_at < STALE_SECONDS else 0
