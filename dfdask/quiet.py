"""Preloaded by the workers of a local fleet: keeps off the terminal what is no news when a job ends."""

from __future__ import annotations

import logging
from typing import Any


def dask_setup(worker: Any) -> None:
    """A worker that is closed in the middle of a heartbeat logs a traceback about it."""
    logging.getLogger("distributed.worker").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to communicate with scheduler during heartbeat")
