"""Items: one prompt with its seed and arguments, one row of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dfdask.images import Picture


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the output.

    ``index`` is its row; ``arguments`` are the keyword arguments of the pipeline call besides the prompt and
    the generator: the job's, overridden by the item's own, pictures as ``Picture``. ``seed`` is in [0, 2**32).
    """

    index: int
    id: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any]

    def without_pictures(self) -> Item:
        """The same item for stages that need no more than the size of its pictures."""
        if not any(map(pictures_in, self.arguments.values())):
            return self
        return replace(self, arguments={name: _emptied(value) for name, value in self.arguments.items()})


def pictures_in(value: Any) -> list[Picture]:
    """The pictures that an argument is made of."""
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, Picture)]


def _emptied(value: Any) -> Any:
    if isinstance(value, Picture):
        return replace(value, data=b"")
    return [_emptied(entry) for entry in value] if isinstance(value, list) else value
