"""Items: one prompt with its seed and arguments, one row of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the output.

    ``index`` is its row; ``arguments`` are the keyword arguments of the pipeline call besides the prompt and
    the generator: the job's, overridden by the item's own. ``seed`` is in [0, 2**32).
    """

    index: int
    id: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any]
