"""From a job's prompts to its items: reads every source, checks every row."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfdask import prompt_files
from dfdask.arguments import check_argument, checked_text, plain, shown
from dfdask.errors import PromptError
from dfdask.images import Picture, find_picture, is_picture
from dfdask.item_table import ArgumentColumn, ItemTable, Kind, TextColumn
from dfdask.prompt_files import Row, as_whole, is_textual, read_rows, unit
from dfdask.seeds import SEEDS, seed_from_key, text_key
from dfdask.spec import ITEM_KEYS, JobSpec

__all__ = ["ItemTable", "read_items"]

_UNSET = object()


def read_items(spec: JobSpec) -> ItemTable:
    """All items of a job, in the order of its prompts. Raises PromptError."""
    path = spec.prompt_path()
    if isinstance(spec.prompts, list) or path is None:
        inline = enumerate(spec.prompts)
        rows = (Row(n, {"prompt": entry} if isinstance(entry, str) else entry) for n, entry in inline)
        return _Builder(spec, "prompts", "item", textual=False).build(rows)
    found = islice(read_rows(path, spec.prompts.columns), spec.prompts.limit)
    return _Builder(spec, str(path), unit(path), is_textual(path)).build(found)


def unused_columns(spec: JobSpec) -> list[str]:
    """Columns of the job's prompt file that ``read_items`` leaves alone."""
    path = spec.prompt_path()
    return (
        []
        if path is None or isinstance(spec.prompts, list)
        else prompt_files.unused_columns(path, spec.prompts.columns)
    )


class _Builder:
    """Checks rows one by one and collects their columns."""

    def __init__(self, spec: JobSpec, source: str, unit: str, textual: bool) -> None:
        self.spec, self.source, self.unit, self.textual = spec, source, unit, textual
        self.numbers = array("q")
        self.prompts = TextColumn()
        self.ids: TextColumn | None = None
        self.keys = array("Q")
        self.seeds = array("q")  # -1: none given
        self.own: dict[str, list[Any]] = {}

    def build(self, rows: Iterable[Row]) -> ItemTable:
        for row in rows:
            self.numbers.append(row.number)
            self._add(row.values)
        if not len(self.prompts):
            raise PromptError(f"{self.source}: there are no prompts in it; add at least one")
        self._check_ids()
        own = {name: self._column(name, values) for name, values in self.own.items()}
        pictures = self._pictures(own)
        copies, arguments = self.spec.images_per_prompt, self.spec.arguments
        return ItemTable(self.prompts, self.ids, self._seeds(), copies, arguments, own, pictures)

    def _pictures(self, own: Mapping[str, ArgumentColumn]) -> dict[str, tuple[Path, Picture]]:
        """Every picture file that the job or a row names, looked at once."""
        found: dict[str, tuple[Path, Picture]] = {}
        home, allowed = self.spec.picture_folders()
        for name, value in self.spec.arguments.items():
            if is_picture(name):
                try:
                    _find(value, home, allowed, found)
                except ValueError as error:
                    raise PromptError(f"arguments.{name}: {error}") from None
        for name, column in own.items():
            if is_picture(name):
                for row in column.given.nonzero()[0].tolist():
                    self._checked(row, name, _find, column.value(row), home, allowed, found)
        return found

    def _add(self, values: dict[str, Any]) -> None:
        row = len(self.prompts)
        prompt = values.get("prompt")
        if not isinstance(prompt, str):
            raise self._error(row, "prompt", f"must be text, got {shown(prompt)}; put it in quotes")
        if not prompt.strip():
            raise self._error(row, "prompt", f"must not be empty, got {prompt!r}; remove the row or fill it in")
        self.prompts.append(self._checked(row, "prompt", checked_text, prompt))
        name = self._id(row, values)
        if name is not None and self.ids is None:
            self.ids = TextColumn()
            for earlier in range(row):
                self.ids.append(f"{earlier:06d}")
        if self.ids is not None:
            self.ids.append(f"{row:06d}" if name is None else name)
        # Ids and prompts hold no NUL: an id never counts as an equal prompt.
        self.keys.append(text_key(prompt if name is None else f"id\0{name}"))
        self.seeds.append(self._seed(row, values.get("seed")))
        for key, value in values.items():
            if key in ITEM_KEYS:
                continue
            column = self.own.setdefault(key, [])
            column.extend([_UNSET] * (row - len(column)))
            column.append(value if self.textual else self._checked(row, key, check_argument, key, value))

    def _id(self, row: int, values: dict[str, Any]) -> str | None:
        if "id" not in values:
            return None
        name = values["id"]
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str):
            raise self._error(row, "id", f"must be text, got {shown(name)}; put it in quotes")
        if not name.strip() or not name.isprintable():
            raise self._error(row, "id", f"must be visible text without control characters, got {shown(name)}")
        self._checked(row, "id", checked_text, name)
        return name

    def _seed(self, row: int, value: Any) -> int:
        if value is None:
            return -1
        if self.textual and re.fullmatch(r"[0-9]{1,10}(\.0*)?", value):
            value = int(value.partition(".")[0])
        value = self._checked(row, "seed", plain, value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < SEEDS:
            raise self._error(row, "seed", f"must be a whole number from 0 to {SEEDS - 1}, got {shown(value)}")
        return value

    def _seeds(self) -> NDArray[np.uint32]:
        keys = np.frombuffer(self.keys, dtype=np.uint64)
        occurrences = _occurrences(keys)
        base = self.spec.seed
        return np.fromiter(
            (
                given if given >= 0 else seed_from_key(base, key, occurrence, 0)
                for given, key, occurrence in zip(self.seeds, self.keys, occurrences, strict=True)
            ),
            dtype=np.uint32,
            count=len(keys),
        )

    def _check_ids(self) -> None:
        if self.ids is None:
            return
        keys = np.fromiter((hash(self.ids[row]) for row in range(len(self.ids))), np.int64, len(self.ids))
        suspects = np.flatnonzero(_occurrences(keys))
        if not len(suspects):
            return
        wanted = set(keys[suspects].tolist())
        first: dict[str, int] = {}
        for row in np.flatnonzero(np.isin(keys, list(wanted))).tolist():
            name = self.ids[row]
            if name in first:
                raise PromptError(
                    f"{self.source}: the id {name!r} is there twice, in {self._place(first[name])} and "
                    f"{self._place(row)}; make ids unique, or leave them out (columns: {{id: null}})"
                )
            first[name] = row

    def _column(self, name: str, values: list[Any]) -> ArgumentColumn:
        values.extend([_UNSET] * (len(self.prompts) - len(values)))
        if self.textual:
            values = _typed(name, values)
            for row, value in enumerate(values):
                if value is not _UNSET:
                    values[row] = self._checked(row, name, check_argument, name, value)
        given = np.fromiter((value is not _UNSET for value in values), np.bool_, len(values))
        kinds = {type(value) for value in values if value is not _UNSET}
        kind: Kind = "json"
        if len(kinds) == 1 and next(iter(kinds)) in _DTYPES:
            dtype, kind = _DTYPES[next(iter(kinds))]
            try:
                return ArgumentColumn(
                    kind, np.array([0 if value is _UNSET else value for value in values], dtype), given
                )
            except OverflowError:
                kind = "json"
        elif kinds == {str}:
            kind = "str"
        texts = TextColumn()
        for value in values:
            texts.append("" if value is _UNSET else value if kind == "str" else json.dumps(value))
        return ArgumentColumn(kind, texts, given)

    def _checked(self, row: int, key: str, check: Any, *values: Any) -> Any:
        try:
            return check(*values)
        except ValueError as error:
            raise self._error(row, key, str(error)) from None

    def _place(self, row: int) -> str:
        return f"{self.unit} {self.numbers[row]}"

    def _error(self, row: int, key: str, what: str) -> PromptError:
        return PromptError(f"{self.source}: {self._place(row)}: {key}: {what}")


_DTYPES: dict[type, tuple[Any, Kind]] = {
    int: (np.int64, "int"),
    float: (np.float64, "float"),
    bool: (np.bool_, "bool"),
}


def _find(value: Any, home: Path, allowed: Any, found: dict[str, tuple[Path, Picture]]) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and text not in found:
            found[text] = find_picture(text, home, allowed)


def _occurrences(keys: NDArray[Any]) -> NDArray[np.int64]:
    """For each key, how many equal ones stand before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    place = np.arange(len(keys))
    result = np.empty(len(keys), dtype=np.int64)
    result[order] = place - place[new][np.cumsum(new) - 1]
    return result


def _typed(name: str, values: list[Any]) -> list[Any]:
    """Cells of a text table as the whole column reads best: all ints, numbers, true/false, else text."""
    if "prompt" in name:
        return values
    if any("_" in value for value in values if value is not _UNSET):
        return values  # Python would read 1_000 as a number
    parsers: tuple[Callable[[str], Any], ...] = (int, float, {"true": True, "false": False}.__getitem__)
    for parse in parsers:
        try:
            return [v if v is _UNSET else as_whole(name, parse(v.strip().lower())) for v in values]
        except (ValueError, KeyError):
            continue
    return values
