"""What the cost model has learnt, kept on the scheduler's machine between runs: ``costs.json`` in the cache folder.

The folder is ``$DFDASK_CACHE``, else ``~/.cache/dfdask``. A file that cannot be read or written costs only what it
would have told: no job stops for it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from dfdask.cost import CostModel

_logger = logging.getLogger("dfdask")


def cache_folder() -> Path:
    base = os.environ.get("DFDASK_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "dfdask"


def load_costs() -> list[dict[str, Any]]:
    """What `CostModel.to_json` gave, or nothing."""
    path = cache_folder() / "costs.json"
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError("not a list")
        CostModel().learn(found)
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        _logger.warning("costs of earlier runs are not used: %s cannot be read (%s)", path, error)
        return []


@lru_cache  # each only once, for it is tried again at the end of every job
def _warn(problem: str) -> None:
    _logger.warning("costs are not kept for later runs: %s", problem)


def save_costs(costs: list[dict[str, Any]]) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    folder = cache_folder()
    try:
        text = json.dumps(costs, allow_nan=False)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix="costs-", suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.replace(file.name, folder / "costs.json")
            except OSError:
                os.unlink(file.name)
                raise
    except (OSError, ValueError) as error:
        _warn(str(error))
