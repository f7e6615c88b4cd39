"""Is what is stored what was committed? Reads every object, decodes it and compares checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfdask.store_layout import checksum, decode, object_key, object_rows
from dfdask.store_objects import Objects

Documents = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Damage:
    """Stored data that is not what was committed; ``shard`` is None for the columns written at creation."""

    shard: int | None
    array: str
    what: str

    def __str__(self) -> str:
        where = "the run" if self.shard is None else f"shard {self.shard}"
        return f"{where}, {self.array}: {self.what}"


class _BadObject(Exception):
    """An object is missing or cannot be decoded; the message says which."""


def check_shard(
    objects: Objects, documents: Documents, rows: range, shard: int, record: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], list[Damage]]:
    """The arrays of a committed shard that are as in ``record``, and what is wrong with the others."""
    found, damage = {}, []
    for name, wanted in record["checksums"].items():
        try:
            values = _read(objects, documents[name], name, rows.start, rows.stop)
        except _BadObject as error:
            damage.append(Damage(shard, name, str(error)))
            continue
        if checksum(values) == wanted:
            found[name] = values
        else:
            damage.append(Damage(shard, name, "is not what was committed (checksum)"))
    return found, damage


def check_columns(objects: Objects, documents: Documents, items: int, sums: Mapping[str, str]) -> list[Damage]:
    """What is wrong with the columns that were written at creation."""
    damage = []
    for name, wanted in sums.items():
        step = object_rows(documents[name])
        try:
            pieces = [
                _read(objects, documents[name], name, start, min(start + step, items))
                for start in range(0, items, step)
            ]
        except _BadObject as error:
            damage.append(Damage(None, name, str(error)))
            continue
        if checksum(np.concatenate(pieces)) != wanted:
            damage.append(Damage(None, name, "is not what was stored (checksum)"))
    return damage


def _read(objects: Objects, document: Mapping[str, Any], name: str, start: int, stop: int) -> NDArray[Any]:
    data = objects.get(f"{name}/{object_key(document, start)}")
    if data is None:
        raise _BadObject(f"the object of item {start} onwards is not there")
    try:
        return decode(document, start, stop, data)
    except Exception as error:  # the codecs raise all sorts of things for bad bytes
        raise _BadObject(
            f"the object of item {start} onwards cannot be decoded: {str(error) or type(error).__name__}"
        ) from None
