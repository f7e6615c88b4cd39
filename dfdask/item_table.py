"""The items of a job as a table of columns that a million rows fit in."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dfdask.arguments import canonical_json
from dfdask.errors import PromptError
from dfdask.images import Picture, is_picture
from dfdask.items import Item
from dfdask.seeds import explicit_seed

Kind = Literal["int", "float", "bool", "str", "json"]


class TextColumn:
    """Texts as one UTF-8 buffer with end offsets: 8 bytes a text on top of the characters."""

    __slots__ = ("_data", "_ends")

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        self._data += text.encode()
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._data[start : self._ends[row]].decode()

    def update(self, digest: Any) -> None:
        """Feed everything that this column says to a hashlib object."""
        digest.update(np.asarray(self._ends, dtype="<i8").tobytes())
        digest.update(self._data)


@dataclass(frozen=True, slots=True)
class ArgumentColumn:
    """What the items set for one argument; ``json`` holds any plain data as JSON text."""

    kind: Kind
    values: NDArray[Any] | TextColumn
    given: NDArray[np.bool_]  # (prompts,)

    def value(self, row: int) -> Any:
        value = self.values[row]
        if isinstance(value, str):
            return json.loads(value) if self.kind == "json" else value
        return value.item()


@dataclass(frozen=True, slots=True)
class ItemTable:
    """The items: row ``r`` is image ``r % images_per_prompt`` of prompt ``r // images_per_prompt``."""

    prompts: TextColumn
    ids: TextColumn | None  # None: row numbers
    seeds: NDArray[np.uint32]  # (prompts,), of image 0
    images_per_prompt: int
    arguments: Mapping[str, Any]  # the job's
    own: Mapping[str, ArgumentColumn] = field(default_factory=dict)
    pictures: Mapping[str, tuple[Path, Picture]] = field(default_factory=dict)  # by their paths as the job has them

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def __getitem__(self, index: int) -> Item:
        """Item of row ``index``; negative counts from the end. Raises IndexError."""
        return self._item(range(len(self))[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)))

    def items(self, start: int, stop: int) -> list[Item]:
        """Rows ``start`` to ``stop`` (exclusive), cut to what is there, as in a slice, with their pictures' data.

        Raises PromptError where a picture cannot be read any more.
        """
        data: dict[str, Picture] = {}
        return [self._item(index, data) for index in range(len(self))[start:stop]]

    def columns(self) -> dict[str, NDArray[Any]]:
        """One array of len(self) a column.

        ``id`` and ``prompt`` (StringDType), ``seed`` (uint32), ``image_index`` (uint16), and every argument
        that some item sets itself, with the job's value where an item does not: int64, float64 (NaN where
        there is no value), bool, or StringDType ("" where there is none; JSON text for data that is none of
        these). Paths of pictures are in ``input_...`` columns: ``image`` is the output.
        """
        copies = self.images_per_prompt
        image_index = np.tile(np.arange(copies, dtype=np.uint16), len(self.prompts))
        return {
            "id": _strings(self._id(index) for index in range(len(self))),
            "prompt": np.repeat(_strings(map(self.prompts.__getitem__, range(len(self.prompts)))), copies),
            "seed": np.repeat(self.seeds, copies) + image_index.astype(np.uint32),
            "image_index": image_index,
            **{_column_name(name): np.repeat(self._effective(name), copies) for name in self.own},
        }

    def digest(self) -> str:
        """SHA-256 hex of everything that determines the rows, the job's arguments included."""
        digest = hashlib.sha256(b"dfdask items 1\n")
        digest.update(canonical_json([len(self.prompts), self.images_per_prompt, dict(self.arguments)]).encode())
        self.prompts.update(digest)
        if self.ids is not None:
            digest.update(b"ids")
            self.ids.update(digest)
        digest.update(self.seeds.astype("<u4").tobytes())
        for name, column in sorted(self.own.items()):
            digest.update(f"\n{name} {column.kind}\n".encode())
            digest.update(column.given.tobytes())
            if isinstance(column.values, TextColumn):
                column.values.update(digest)
            else:
                digest.update(column.values.tobytes())
        for name, (_, picture) in sorted(self.pictures.items()):
            digest.update(f"\npicture {name} {picture.digest}\n".encode())
        return digest.hexdigest()

    def _item(self, index: int, data: dict[str, Picture] | None = None) -> Item:
        """``data`` collects the pictures that are loaded; None: load none."""
        row, image = divmod(index, self.images_per_prompt)
        seed = explicit_seed(int(self.seeds[row]), image)
        own = {name: column.value(row) for name, column in self.own.items() if column.given[row]}
        arguments = {**self.arguments, **own} if own else self.arguments
        if self.pictures:
            arguments = {name: self._pictured(name, value, data) for name, value in arguments.items()}
        return Item(index, self._id(index), self.prompts[row], seed, arguments)

    def _pictured(self, name: str, value: Any, data: dict[str, Picture] | None) -> Any:
        if not is_picture(name):
            return value
        if isinstance(value, list):
            return [self._pictured(name, entry, data) for entry in value]
        if not isinstance(value, str) or value not in self.pictures:
            return value
        path, picture = self.pictures[value]
        if data is None:
            return picture
        if value not in data:
            try:
                data[value] = picture.loaded(path)
            except OSError as error:
                raise PromptError(f"{path}: cannot be read any more: {error.strerror or error}") from None
            except ValueError as error:
                raise PromptError(str(error)) from None
        return data[value]

    def _id(self, index: int) -> str:
        row, image = divmod(index, self.images_per_prompt)
        name = f"{row:06d}" if self.ids is None else self.ids[row]
        return f"{name}-{image}" if self.images_per_prompt > 1 else name

    def _effective(self, name: str) -> NDArray[Any]:
        column = self.own[name]
        default = self.arguments.get(name)
        if column.given.all() and not isinstance(column.values, TextColumn):
            return column.values
        rows = range(len(self.prompts))
        values: list[Any] = [column.value(row) if column.given[row] else default for row in rows]
        kinds = {type(value) for value in values}
        if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values):
            return np.array(values, dtype=np.int64)
        if kinds <= {int, float, type(None)} and kinds != {type(None)}:
            with suppress(OverflowError):  # a whole number of hundreds of digits
                return np.array([np.nan if value is None else float(value) for value in values])
        if kinds == {bool}:
            return np.array(values)
        if kinds <= {str, type(None)}:
            return _strings("" if value is None else value for value in values)
        return _strings(canonical_json(value) for value in values)


def _column_name(argument: str) -> str:
    return f"input_{argument}" if is_picture(argument) else argument


def _strings(texts: Iterable[str]) -> NDArray[Any]:
    """(n,) StringDType, made in pieces so that only 65536 Python strings live at once."""
    remaining, pieces = iter(texts), []
    while piece := list(islice(remaining, 65536)):
        pieces.append(np.array(piece, dtype=np.dtypes.StringDType()))
    return np.concatenate(pieces)
