"""Encodings that later jobs find again: a safetensors file for each kind of input, beside the runs.

What cannot be read, written or understood is computed as if it had never been there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dfdask.errors import StorageError
from dfdask.stages.batch import Rows
from dfdask.stages.state import Calls, Parts
from dfdask.store_objects import Objects, storage_errors

if TYPE_CHECKING:
    from dfdask.stages.model import ModelRef
    from dfdask.targets import Location

logger = logging.getLogger(__name__)
FOLDER = ".encodings"
"""Beside the runs, of which none can have this name."""
_LIBRARIES = ("torch", "diffusers", "transformers")
_THREADS = 8
_MOST_PENDING = 64
_PLAIN = (bool, int, float, str)


class Shelf:
    """The kept encodings of one model, at one dtype and with the same versions of its libraries."""

    def __init__(self, location: Location, ref: ModelRef) -> None:
        same = repr(replace(ref, source="", scheduler=None, encodings=None)), *map(version, _LIBRARIES)
        self._prefix = hashlib.sha256("\n".join(same).encode()).hexdigest()[:16]
        self._objects = Objects(replace(location, name=FOLDER))
        self._threads = ThreadPoolExecutor(_THREADS, "dfdask-encodings")
        self._room = threading.Semaphore(_MOST_PENDING)

    def get(self, keys: Sequence[str]) -> list[Any]:
        """What was kept under each of ``keys``, or None."""
        return list(self._threads.map(self._get, keys))

    def put(self, key: str, state: Any) -> None:
        """Keep it, soon: what computes does not wait for the storage."""
        try:
            data = packed(state)
        except TypeError as error:
            logger.debug("not kept: %s", error)
            return
        if self._room.acquire(blocking=False):  # storage that is too slow for all gets a part
            self._threads.submit(self._put, key, data)

    def flush(self) -> None:
        """Wait for what is being written."""
        self._threads.shutdown()
        self._threads = ThreadPoolExecutor(_THREADS, "dfdask-encodings")

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _get(self, key: str) -> Any:
        try:
            with storage_errors(FOLDER):
                data = self._objects.get(self._path(key))
            return None if data is None else unpacked(data)
        except StorageError:
            return None
        except ValueError as error:
            logger.warning("%s in %s is not what it should be and is made again: %s", self._path(key), FOLDER, error)
            return None

    def _put(self, key: str, data: bytes) -> None:
        try:
            with storage_errors(FOLDER):
                self._objects.put(self._path(key), data)
        except StorageError as error:
            logger.debug("not kept: %s", error)
        finally:
            self._room.release()


def packed(state: Any) -> bytes:
    """As a safetensors file, whose metadata say how the tensors hang together. Raises TypeError."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            order = sorted(range(value.dim()), key=value.stride, reverse=True)  # kernels round by it
            tensors[str(len(tensors))] = value.detach().cpu().permute(order).contiguous().clone()
            return ["tensor", str(len(tensors) - 1), order]
        if isinstance(value, Rows):
            return ["rows", described(value.value)]
        if isinstance(value, Calls):
            return ["calls", described(value.each)]
        if isinstance(value, Parts):
            return ["parts", _class_name(value.kind), described(value.attributes)]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            kind = None if type(value) is dict else _class_name(type(value))
            return ["dict", kind, [[key, described(entry)] for key, entry in value.items()]]
        if type(value) in (list, tuple):
            return [type(value).__name__, *map(described, value)]
        if value is None or type(value) in _PLAIN:
            return ["value", value]
        raise TypeError(f"an encoding holds a {type(value).__name__}")

    tree = json.dumps(described(state))
    return save(tensors, {"tree": tree})


def unpacked(data: bytes) -> Any:
    """What ``packed`` made a file of. Raises ValueError where it is none, or of classes that are not loaded here."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        return _rebuilt(json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["tree"]), tensors)
    except (SafetensorError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"not a kept encoding: {type(error).__name__}: {error}") from None


def _rebuilt(tree: Any, tensors: dict[str, Any]) -> Any:
    kind, *rest = tree
    if kind == "tensor":
        name, order = rest
        return tensors[name].permute(sorted(range(len(order)), key=order.__getitem__))
    if kind == "rows":
        return Rows(_rebuilt(rest[0], tensors))
    if kind == "calls":
        return Calls(_rebuilt(rest[0], tensors))
    if kind == "parts":
        return Parts(_class(rest[0]), _rebuilt(rest[1], tensors))
    if kind == "dict":
        named = {str(key): _rebuilt(entry, tensors) for key, entry in rest[1]}
        return named if rest[0] is None else _class(rest[0], dict)(**named)
    if kind in ("list", "tuple"):
        entries = [_rebuilt(entry, tensors) for entry in rest]
        return entries if kind == "list" else tuple(entries)
    if kind == "value" and (rest[0] is None or type(rest[0]) in _PLAIN):
        return rest[0]
    raise ValueError(f"an unknown part, {str(kind)[:40]!r}")


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str, base: type = object) -> Any:
    """Of the libraries' own, and loaded already: a file imports nothing."""
    module, _, qualified = name.partition(":")
    if not module.startswith("diffusers.") and not (module.startswith("transformers.") and base is dict):
        raise ValueError(f"{name[:80]!r} is no class that encodings are made of")
    found = getattr(sys.modules.get(module), qualified, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name[:80]!r} is not known here")
    return found
