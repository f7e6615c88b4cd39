"""Creating a run so that it is there completely or not at all, whoever else tries and whoever dies.

The columns are put first and the root's metadata, create-only, last. Two creators with the same columns put
the same objects and need not know of each other. Different ones must not mix theirs: the first leaves a claim,
the others stop, until the claim is old and its owner must be dead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray

from dfdask.errors import StorageError
from dfdask.store_layout import encode, object_key, object_rows
from dfdask.store_objects import Objects, TakenError

ROOT_KEY = "zarr.json"
CLAIM_KEY = "creating.json"
CLAIM_SECONDS = 120.0
FOLDERS = ("commits", "report")
_ATTEMPTS = 5

Documents = Mapping[str, Mapping[str, Any]]


def create_run(
    objects: Objects, root: Mapping[str, Any], documents: Documents, columns: Mapping[str, NDArray[Any]]
) -> None:
    """Put everything that a new run is made of; where the run is there already, nothing. Raises StorageError."""
    about = root["attributes"]["dfdask"]
    claim = {"columns": about["columns"], "layout": about["layout"], "arrays": list(documents)}
    data = json.dumps(root, ensure_ascii=False, allow_nan=False).encode()
    if _claim(objects, claim):
        _put_arrays(objects, documents, columns)
        with suppress(TakenError):  # someone with the same columns was faster
            objects.put(ROOT_KEY, data, create=True)
    objects.delete([CLAIM_KEY])


def _claim(objects: Objects, claim: Mapping[str, Any]) -> bool:
    """Whether to go on, alone or beside creators with the same columns; False: the run has appeared."""
    for _ in range(_ATTEMPTS):
        try:
            objects.put(CLAIM_KEY, json.dumps(claim).encode(), create=True)
        except TakenError:
            if not _joined(objects, claim):
                continue
        if objects.get(ROOT_KEY) is not None:
            return False
        ours = {CLAIM_KEY, *(f"{name}/zarr.json" for name in FOLDERS)}
        for key in objects.listing():
            if key not in ours and key.split("/")[0] not in claim["arrays"]:
                if objects.get(ROOT_KEY) is not None:
                    return False
                objects.delete([CLAIM_KEY])
                raise StorageError(
                    f"{objects.location} holds things that are no run ({key}); choose another name or move them away"
                )
        return True
    raise StorageError(f"{objects.location} is being created by several processes; try again")


def _joined(objects: Objects, claim: Mapping[str, Any]) -> bool:
    """Whether the claim that is there says the same as ours; a dead one that does not is removed."""
    try:
        there = json.loads(objects.get(CLAIM_KEY) or b"null")
    except ValueError:
        there = None
    if there == claim:
        return True
    try:
        age_seconds = objects.age_seconds(CLAIM_KEY)
    except FileNotFoundError:
        return False  # its owner is done
    if age_seconds < CLAIM_SECONDS:
        raise StorageError(
            f"another process is creating {objects.location} from other items right now; choose another name, or "
            f"try again in {CLAIM_SECONDS - age_seconds:.0f} s if it has died"
        )
    arrays = there.get("arrays") if isinstance(there, dict) else None
    for name in arrays if isinstance(arrays, list) else ():
        if name and isinstance(name, str):
            objects.delete(objects.listing(name))
    objects.delete([CLAIM_KEY])
    return False


def _put_arrays(objects: Objects, documents: Documents, columns: Mapping[str, NDArray[Any]]) -> None:
    for name in FOLDERS:  # empty groups to Zarr, which would wonder about them otherwise
        objects.put(f"{name}/zarr.json", json.dumps(_GROUP).encode())
    for name, document in documents.items():
        objects.put(f"{name}/zarr.json", json.dumps(document).encode())
    for name, values in columns.items():
        step = object_rows(documents[name])
        for start in range(0, len(values), step):
            key = f"{name}/{object_key(documents[name], start)}"
            objects.put(key, encode(documents[name], start, values[start : start + step]))


_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
