"""Creating a run so that it is there completely or not at all, whoever else tries and whoever dies.

The first creator leaves a claim, ``creating-0.json``. Those with the same columns put the same objects and go on
beside it; others stop, until the claim is old and its owner must be dead: then one of them claims
``creating-1.json``, and so on. Claims are create-only and stay until the run is there, so the last one is never in
doubt, and an owner that was only slow sees it and stops. The root's metadata is put last.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from dfdask.errors import StorageError
from dfdask.store_layout import encode, object_key, object_rows
from dfdask.store_objects import Objects, TakenError

ROOT_KEY = "zarr.json"
CLAIM_SECONDS = 120.0
FOLDERS = ("commits", "report")
_ATTEMPTS = 5

Documents = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Claim:
    number: int
    data: bytes


def create_run(
    objects: Objects, root: Mapping[str, Any], documents: Documents, columns: Mapping[str, NDArray[Any]]
) -> None:
    """Put everything that a new run is made of; where the run is there already, nothing. Raises StorageError."""
    claim = _claim(objects, {"columns": root["attributes"]["dfdask"]["columns"], "arrays": documents})
    if claim is None:
        return
    if objects.get(ROOT_KEY) is None:
        if claim.number:
            _clear(objects, claim, documents)
        _put_arrays(objects, claim, documents, columns)
        data = json.dumps(root, ensure_ascii=False, allow_nan=False).encode()
        if _is_last(objects, claim):
            with suppress(TakenError):  # someone with the same columns was faster
                objects.put(ROOT_KEY, data, create=True)
    objects.delete(map(_key, range(claim.number + 1)))


def _claim(objects: Objects, wanted: Mapping[str, Any]) -> _Claim | None:
    """The claim to go on with, alone or beside creators with the same columns; None: the run has appeared."""
    same = json.dumps(wanted).encode()
    for _ in range(_ATTEMPTS):
        if objects.get(ROOT_KEY) is not None:
            return None
        there = _claims(objects)
        if there == [same]:
            objects.put(_key(0), same)  # it is young again
            return _Claim(0, same)
        number, data = len(there), same
        if there:
            try:
                _check_dead(objects, number - 1)
            except FileNotFoundError:
                continue  # its owner is done
            # Nobody joins this one: its owner deletes what the dead left before it puts its own.
            data = json.dumps({**wanted, "owner": secrets.token_hex(8)}).encode()
        elif (other := next((key for key in objects.listing() if key != ROOT_KEY), None)) is not None:
            if _claims(objects) or objects.get(ROOT_KEY) is not None:
                continue
            raise StorageError(
                f"{objects.location} holds things that are no run ({other}); choose another name or move them away"
            )
        with suppress(TakenError):
            objects.put(_key(number), data, create=True)
            return _Claim(number, data)
    raise StorageError(f"{objects.location} is being created by several processes; try again")


def _claims(objects: Objects) -> list[bytes]:
    found: list[bytes] = []
    while (data := objects.get(_key(len(found)))) is not None:
        found.append(data)
    return found


def _check_dead(objects: Objects, number: int) -> None:
    """Raises StorageError where the owner of a claim may be alive, FileNotFoundError where the claim is gone."""
    age_seconds = objects.age_seconds(_key(number))
    if age_seconds < CLAIM_SECONDS:
        raise StorageError(
            f"another process is creating {objects.location} from other items right now; choose another name, or "
            f"try again in {CLAIM_SECONDS - age_seconds:.0f} s if it has died"
        )


def _is_last(objects: Objects, claim: _Claim) -> bool:
    """False: the run has appeared. Raises StorageError where someone took this creator for dead."""
    if objects.get(_key(claim.number)) == claim.data and objects.get(_key(claim.number + 1)) is None:
        return True
    if objects.get(ROOT_KEY) is not None:
        return False
    raise StorageError(
        f"another process took over creating {objects.location}, for this one was silent for more than "
        f"{CLAIM_SECONDS:.0f} s; try again"
    )


def _clear(objects: Objects, claim: _Claim, documents: Documents) -> None:
    """Delete the arrays that the owners of earlier claims began."""
    names = set(documents)
    for data in _claims(objects)[: claim.number]:
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a damaged claim names none
            names.update(name for name in json.loads(data)["arrays"] if name.isidentifier())
    for name in sorted(names):
        objects.delete(objects.listing(name))


def _put_arrays(objects: Objects, claim: _Claim, documents: Documents, columns: Mapping[str, NDArray[Any]]) -> None:
    for name in FOLDERS:  # empty groups to Zarr, which would wonder about them otherwise
        _put(objects, claim, f"{name}/zarr.json", json.dumps(_GROUP).encode())
    for name, document in documents.items():
        _put(objects, claim, f"{name}/zarr.json", json.dumps(document).encode())
    for name, values in columns.items():
        step = object_rows(documents[name])
        for start in range(0, len(values), step):
            data = encode(documents[name], start, values[start : start + step])
            _put(objects, claim, f"{name}/{object_key(documents[name], start)}", data)


def _put(objects: Objects, claim: _Claim, key: str, data: bytes) -> None:
    """Replaces what is there only while the claim is the last: it may be a newer owner's."""
    try:
        objects.put(key, data, create=True)
    except TakenError:
        if objects.get(key) != data and _is_last(objects, claim):
            objects.put(key, data)


def _key(number: int) -> str:
    return f"creating-{number}.json"


_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
