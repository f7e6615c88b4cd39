"""The run in storage: one Zarr group with one commit a shard. The store alone decides what is done.

Every object is put whole, and only once all arrays of a shard were read back is its commit put, create-only.
Whatever dies, at any moment: a shard with a commit is complete, one without is as good as absent. The root
group's metadata comes last when a run is created, so a run is there completely or not at all.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dfdask.errors import RunNotFoundError, StorageError
from dfdask.store_check import Damage, check_columns, check_shard
from dfdask.store_create import ROOT_KEY, create_run
from dfdask.store_events import event_log, last_end, read_events
from dfdask.store_layout import (
    FAILED,
    OK,
    PENDING,
    Layout,
    array_documents,
    checksum,
    encode,
    object_key,
    root_document,
)
from dfdask.store_objects import Objects, TakenError, storage_errors
from dfdask.targets import Location, storage_error

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["FAILED", "OK", "PENDING", "Commit", "Damage", "Layout", "RunStore"]

_COMMIT_KEY = re.compile(r"commits/(\d{8,})\.json")
_MAX_ERROR_CHARACTERS = 4000
_ATTEMPTS = 5
_READERS = 16


@dataclass(frozen=True, slots=True)
class Commit:
    """The record that a shard is done. ``stale``: another writer had committed it first."""

    shard: int
    record: dict[str, Any]
    stale: bool


@dataclass(frozen=True, slots=True)
class RunStore:
    """A run that exists. Cheap to pickle and to open: it holds the run's metadata, no connection, no secret."""

    location: Location
    layout: Layout
    attributes: dict[str, Any]
    _documents: dict[str, dict[str, Any]] = field(repr=False)

    @classmethod
    def create(
        cls,
        location: Location,
        layout: Layout,
        columns: Mapping[str, NDArray[Any]],
        attributes: Mapping[str, Any],
    ) -> RunStore:
        """Create the run, or open the one that is there or that another process creates meanwhile.

        ``columns`` hold one value an item: (items,) of numbers, booleans or texts. ``attributes`` are JSON; the
        layout and the columns' checksums join its ``dfdask`` part. Raises StorageError, ValueError.
        """
        if not cls.exists(location):
            documents = array_documents(layout, columns)
            sums = {name: checksum(values) for name, values in columns.items()}
            about = {**attributes.get("dfdask", {}), "layout": layout.as_dict(), "columns": sums}
            root = root_document({**attributes, "dfdask": about}, documents)
            with storage_errors(f"cannot create the run {location}"):
                create_run(Objects(location), root, documents, columns)
        return cls.open(location)

    @classmethod
    def open(cls, location: Location, *, quick: bool = False) -> RunStore:
        """Raises RunNotFoundError, or StorageError where something else is in its place.

        ``quick``: where the storage may never have been there, and somebody waits for the answer.
        """
        with storage_errors(f"cannot open the run {location}"):
            data = Objects(location, quick).get(ROOT_KEY)
        if data is None:
            raise RunNotFoundError(f"there is no run {location.address}; start it with dfdask run, or check the name")
        try:
            root = json.loads(data)
            about = root["attributes"]["dfdask"]["layout"]
            layout = Layout(**{**about, "item_shape": tuple(about["item_shape"])})
            return cls(location, layout, root["attributes"], root["consolidated_metadata"]["metadata"])
        except (ValueError, KeyError, TypeError):
            raise StorageError(
                f"{location} is no dfdask run ({ROOT_KEY} says something else); use another name"
            ) from None

    @staticmethod
    def exists(location: Location) -> bool:
        """Whether there is a run, or anything else with a ``zarr.json``. Raises StorageError."""
        with storage_errors(f"cannot look at {location}"):
            return Objects(location).get(ROOT_KEY) is not None

    def committed(self) -> set[int]:
        """The shards that are done."""
        with storage_errors(f"cannot list the commits of {self.location}"):
            return {int(found[1]) for key in self._objects.listing("commits") if (found := _COMMIT_KEY.fullmatch(key))}

    def commits(self) -> list[dict[str, Any]]:
        """The commit records, in the order of shards."""
        with (
            storage_errors(f"cannot read the commits of {self.location}"),
            ThreadPoolExecutor(_READERS) as pool,
        ):
            return [record for record in pool.map(self.commit, sorted(self.committed())) if record]

    def commit(self, shard: int) -> dict[str, Any] | None:
        """The commit record of a shard, None where there is none."""
        with storage_errors(f"cannot read the commit of shard {shard} of {self.location}"):
            data = self._objects.get(commit_key(shard))
        try:
            return None if data is None else _record(data, {*self._documents} - {*self.columns})
        except (ValueError, TypeError, KeyError):
            raise _DamagedCommit(
                f"{self.location}: {commit_key(shard)} is damaged; delete it and run the job again"
            ) from None

    def write_shard(
        self,
        shard: int,
        pixels: NDArray[np.uint8],
        status: NDArray[np.uint8],
        errors: Sequence[str],
        record: Mapping[str, Any],
        replaced: str = "",
    ) -> Commit:
        """Write, read back and commit a whole shard; where it has a commit already, write nothing.

        But a commit of the writer ``replaced`` gives way: only now that what takes its place is there.

        ``pixels`` (n, *item_shape) uint8, ``status`` (n,) of 1 = ok and 2 = failed, ``errors`` n texts; ``record``
        is JSON and becomes a part of the commit. Raises StorageError, ValueError.
        """
        rows = self.layout.rows(shard)
        values = self._checked(rows, pixels, status, errors)
        writer = secrets.token_hex(8)
        # Encoding takes longest: done before the look at the commit, so that races stay short.
        objects = {
            f"{name}/{object_key(self._documents[name], rows.start)}": encode(self._documents[name], rows.start, array)
            for name, array in values.items()
        }
        sums = {name: checksum(array) for name, array in values.items()}
        full = {
            **record,
            "shard": shard,
            "start": rows.start,
            "stop": rows.stop,
            "failed": int((values["status"] == FAILED).sum()),
            "checksums": sums,
            "stored_bytes": sum(map(len, objects.values())),
            "writer": writer,
        }
        data = json.dumps(full, ensure_ascii=False, allow_nan=False).encode()
        found = self.commit(shard)
        if found and found.get("writer", "") != replaced:
            return Commit(shard, found, stale=True)
        with storage_errors(f"cannot write shard {shard} of {self.location}"):
            if found:
                self._objects.delete([commit_key(shard)])
            self._put_and_read_back(objects)
            try:
                self._objects.put(commit_key(shard), data, create=True)
                return Commit(shard, full, stale=False)
            except TakenError:
                return self._settle(shard, objects, data, writer)

    def read(self, start: int, stop: int, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Rows ``start`` to ``stop`` (exclusive) of the named arrays (None: all), committed or not."""
        import zarr

        with storage_errors(f"cannot read {self.location}"):
            group: Any = zarr.open_group(self._objects.zarr(), mode="r")
            wanted = self._documents if names is None else names
            try:
                return {name: np.asarray(group[name][start:stop]) for name in wanted}
            except (ValueError, RuntimeError) as error:  # what the codecs raise for bytes that are not theirs
                raise storage_error(f"{self.location} is damaged in the items {start} to {stop - 1}", error) from None

    def read_shard(self, shard: int, record: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """All arrays of a committed shard, compared with the checksums of ``record``. Raises StorageError."""
        rows = self.layout.rows(shard)
        with storage_errors(f"cannot read shard {shard} of {self.location}"):
            found, damage = check_shard(self._objects, self._documents, rows, shard, record)
        if damage:
            raise StorageError(
                f"{self.location} is damaged: {damage[0]}; delete {commit_key(shard)} in it and run the job again"
            )
        return {**found, **self.read(rows.start, rows.stop, self.columns)}

    @property
    def columns(self) -> list[str]:
        """The names of the columns that were written at creation."""
        return [name for name in self._documents if name not in (self.layout.kind, "status", "error")]

    def dataset(self) -> xr.Dataset:
        """The run as xarray sees it, lazily: one Dask chunk a shard. Items not done yet have status 0."""
        import xarray as xr

        with storage_errors(f"cannot open {self.location}"):
            found: xr.Dataset = xr.open_zarr(self._objects.zarr(), chunks=None, consolidated=True, zarr_format=3)
            return found.chunk({"item": self.layout.shard_items})

    def verify(self, shards: Iterable[int] | None = None) -> list[Damage]:
        """Compare what is stored with the checksums of the commits (None: all, and the columns)."""
        with storage_errors(f"cannot verify {self.location}"):
            problems = [] if shards is not None else self._damaged_columns()
            for shard in sorted(self.committed()) if shards is None else shards:
                try:
                    record = self.commit(shard)
                except _DamagedCommit:
                    problems.append(Damage(shard, "commit", "is damaged"))
                    continue
                problems += self._damage(shard, record) if record else [Damage(shard, "commit", "is not there")]
        return problems

    def forget(self, shards: Iterable[int]) -> None:
        """Delete the commits of ``shards``: the next start of the job makes these again. Raises StorageError."""
        with storage_errors(f"cannot delete commits of {self.location}"):
            self._objects.delete(map(commit_key, shards))

    def sweep(self, older_than_seconds: float = 3600.0) -> int:
        """Delete the temporary files that killed writers left on a disk. Returns how many."""
        if self.location.kind != "local":
            return 0
        removed, now = 0, time.time()
        for folder, _, names in os.walk(self.location.path):
            for name in names:
                path = os.path.join(folder, name)
                # What obstore's LocalStore calls a file until it is complete: "<name>#<number>".
                if re.search(r"#\d+$", name):
                    try:
                        if now - os.stat(path).st_mtime >= older_than_seconds:
                            os.unlink(path)
                            removed += 1
                    except OSError:
                        continue  # finished or swept by someone else, or not ours to delete
        return removed

    def put_report(self, name: str, data: bytes) -> str:
        """Store something for people below ``report/``; returns its path or URL. Raises StorageError."""
        with storage_errors(f"cannot write {name} of {self.location}"):
            self._objects.put(f"report/{name}", data)
        return f"{self.location}/report/{name}"

    def append_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Keep what happened (``Event.as_dict()``) beside the data; where that fails, warn. See ``store_events``."""
        event_log(self.location).append(events)

    def events(self) -> list[dict[str, Any]]:
        """What happened, by time: ``Event.as_dict()``, or sums of many, whose ``events`` says how many they stand for.

        Objects that cannot be read are left out with a warning. Raises StorageError.
        """
        return read_events(self._objects)

    def last_end(self) -> dict[str, Any] | None:
        """The JobEnded event that no start of this run came after; None while it goes on, or where none was told.

        Raises StorageError.
        """
        return last_end(self._objects)

    @property
    def _objects(self) -> Objects:
        return Objects(self.location)

    def _checked(
        self, rows: range, pixels: NDArray[np.uint8], status: NDArray[np.uint8], errors: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        shape = (len(rows), *self.layout.item_shape)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8 {shape}, got {pixels.dtype} {pixels.shape}")
        if status.shape != shape[:1] or not np.isin(status, (OK, FAILED)).all():
            raise ValueError(f"status must be {shape[:1]} of {OK} (ok) and {FAILED} (failed), got {status!r}")
        if len(errors) != len(rows):
            raise ValueError(f"errors must be {len(rows)} texts, got {len(errors)}")
        texts = [text[:_MAX_ERROR_CHARACTERS].encode("utf-8", "replace").decode() for text in errors]
        return {
            self.layout.kind: pixels,
            "error": np.array(texts, dtype=np.dtypes.StringDType()),
            "status": status.astype(np.uint8),  # last: who sees it set while the run grows sees the rest too
        }

    def _put_and_read_back(self, objects: Mapping[str, bytes]) -> None:
        """Raises StorageError where what is read is not what was written, several times in a row."""
        for _ in range(_ATTEMPTS):
            for key, data in objects.items():
                self._objects.put(key, data)
            wrong = [key for key, data in objects.items() if self._objects.get(key) != data]
            if not wrong:
                return
            time.sleep(random.uniform(0.01, 0.2))  # another writer of this shard: let it finish
        raise StorageError(
            f"{self.location}: {wrong[0]} reads back different from what was written, {_ATTEMPTS} times; the "
            "storage cannot be trusted"
        )

    def _settle(self, shard: int, objects: Mapping[str, bytes], data: bytes, writer: str) -> Commit:
        """Two writers wrote this shard, and the other one has the commit.

        As a rule both wrote the same pixels. Where they did not (another kind of GPU), its arrays lie below
        ours or are mixed with them, so ours are put whole once more, with our commit. Who acts last looks last.
        """
        stale = False
        for _ in range(_ATTEMPTS * 4):
            found = self.commit(shard)
            # An own commit at the first look: the put had succeeded, only its answer was lost on the way.
            stale = stale or not found or found.get("writer") != writer
            if found and not self._damage(shard, found):
                return Commit(shard, found, stale)
            self._put_and_read_back(objects)
            self._objects.put(commit_key(shard), data)
            time.sleep(random.uniform(0.01, 0.1))
        raise StorageError(f"{self.location}: several writers fight over shard {shard}; stop all but one")

    def _damage(self, shard: int, record: Mapping[str, Any]) -> list[Damage]:
        return check_shard(self._objects, self._documents, self.layout.rows(shard), shard, record)[1]

    def _damaged_columns(self) -> list[Damage]:
        sums = self.attributes["dfdask"].get("columns", {})
        return check_columns(self._objects, self._documents, self.layout.items, sums)


class _DamagedCommit(StorageError):
    """A commit that is there and is none."""


def _record(data: bytes, arrays: set[str]) -> dict[str, Any]:
    """A commit record with all that is read of it, or an empty one. Raises ValueError, TypeError or KeyError."""
    found = dict(json.loads(data))
    if found and not (
        all(type(found[name]) is int for name in ("shard", "start", "stop", "failed"))
        and isinstance(found["checksums"], dict)
        and found["checksums"].keys() == arrays
    ):
        raise ValueError
    return found


def commit_key(shard: int) -> str:
    return f"commits/{shard:08d}.json"
