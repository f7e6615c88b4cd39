"""Objects of one run: whole bytes under a key, on a disk or in S3, through obstore."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dfdask.targets import SECRET_VARIABLES, Location, probe_key, storage_error


class TakenError(Exception):
    """A create-only put found an object of that key."""


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects below ``location``. Methods raise what obstore raises; see ``storage_errors``.

    ``quick``: without an answer they raise it after seconds, where others ride out an outage of a minute.
    """

    location: Location
    quick: bool = False

    def get(self, key: str) -> bytes | None:
        """None where there is no such object, or no such folder."""
        import obstore

        if self.location.kind == "local" and not self.location.path.is_dir():
            return None
        try:
            return bytes(obstore.get(self._backend, key).bytes())
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Store all of ``data`` or nothing; ``create``: only where there is no object yet, else TakenError.

        One request, never a multipart upload: those cannot be create-only, and leave parts when killed.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self._backend, key, data, mode="create" if create else "overwrite", use_multipart=False)
        except AlreadyExistsError:
            raise TakenError(key) from None
        if self.location.kind == "local":
            _to_disk(os.path.join(self.location.path, key))

    def listing(self, prefix: str = "") -> Iterator[str]:
        """The keys below ``prefix``, which is a whole folder; temporary files are left out."""
        import obstore

        if self.location.kind == "local" and not self.location.path.is_dir():
            return
        for page in obstore.list(self._backend, prefix or None):
            yield from (entry["path"] for entry in page)

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        for key in list(keys):
            try:
                obstore.delete(self._backend, key)
            except FileNotFoundError:
                continue

    def age_seconds(self, key: str) -> float:
        """By the clock of the storage, which need not be ours. Raises FileNotFoundError."""
        import obstore

        changed = obstore.head(self._backend, key)["last_modified"]
        # Beside the run: within it, it would be taken for a part of it, or for something of someone else.
        beside, probe = backend(replace(self.location, name="")), probe_key()
        obstore.put(beside, probe, b"now")
        try:
            now = obstore.head(beside, probe)["last_modified"]
        finally:
            obstore.delete(beside, probe)
        return (now - changed).total_seconds()

    def zarr(self) -> Any:
        """The run as a read-only Zarr store."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._backend, read_only=True)

    @property
    def _backend(self) -> Any:
        return backend(self.location, quick=self.quick)


def backend(location: Location, *, quick: bool = False) -> Any:
    """The obstore store of a run; connections are shared within the process."""
    return _backend(location, quick, tuple(os.environ.get(name) for name in SECRET_VARIABLES))


@lru_cache(maxsize=64)
def _backend(location: Location, quick: bool, _keys: tuple[str | None, ...]) -> Any:
    return location.object_store(create=True, quick=quick)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns what obstore and the system raise into a StorageError that starts with ``what``."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        raise storage_error(what, error) from None


def _to_disk(path: str) -> None:
    """A commit must not outlive its data when the machine loses power: a rename alone does not promise that.

    What another process has deleted since needs no promise: whether that matters, its readers find out.
    """
    for name in (path, os.path.dirname(path)):
        try:
            descriptor = os.open(name, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
