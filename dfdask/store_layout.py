"""The Zarr side of a run: which arrays it has, how they are cut and how a piece of them becomes bytes.

Nothing here reads or writes storage: pieces are encoded and decoded in memory, so that a shard is one put.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PENDING, OK, FAILED = 0, 1, 2
"""The values of ``status``."""

STATUS_MEANINGS = ("pending", "ok", "failed")
RESERVED_NAMES = frozenset({"image", "video", "status", "error", "commits", "report", "events"})
_CHUNK_BYTES = 1 << 20
_MAX_CHUNK_BYTES = 4 << 20
_COLUMN_CHUNK_ROWS = 1024
_COLUMN_CHUNKS_AN_OBJECT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a run. ``item_shape`` is (y, x, channel) or (frame, y, x, channel), in uint8."""

    kind: Literal["image", "video"]
    item_shape: tuple[int, ...]
    items: int
    shard_items: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_shape", tuple(int(length) for length in self.item_shape))
        if self.kind not in ("image", "video"):
            raise ValueError(f"kind must be image or video, got {self.kind!r}")
        if len(self.item_shape) != len(self.dimensions) - 1 or min(self.item_shape) < 1:
            raise ValueError(f"an {self.kind} has the shape {self.dimensions[1:]}, got {self.item_shape}")
        if self.items < 1 or self.shard_items < 1:
            raise ValueError(f"items and shard_items must be at least 1, got {self.items}, {self.shard_items}")

    @property
    def dimensions(self) -> tuple[str, ...]:
        return ("item", *(("frame",) if self.kind == "video" else ()), "y", "x", "channel")

    @property
    def item_bytes(self) -> int:
        return int(np.prod(self.item_shape, dtype=np.int64))

    @property
    def shards(self) -> int:
        return -(-self.items // self.shard_items)

    def rows(self, shard: int) -> range:
        """The items of ``shard``. Raises IndexError."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of a run with {self.shards}")
        start = shard * self.shard_items
        return range(start, min(start + self.shard_items, self.items))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "item_shape": list(self.item_shape)}


def array_documents(layout: Layout, columns: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    """The metadata (``zarr.json``) of every array by name. Raises ValueError for columns that do not fit."""
    import zarr
    from zarr.codecs import ZstdCodec

    rows, shard = (layout.items,), (layout.shard_items,)
    flags = {"flag_values": list(range(len(STATUS_MEANINGS))), "flag_meanings": " ".join(STATUS_MEANINGS)}
    wanted: dict[str, dict[str, Any]] = {
        layout.kind: {
            "shape": (*rows, *layout.item_shape),
            "chunks": _inner_chunk(layout),
            "shards": (*shard, *layout.item_shape),
            "dtype": "uint8",
            "dimension_names": layout.dimensions,
        },
        "status": {"shape": rows, "chunks": shard, "dtype": "uint8", "attributes": flags},
        "error": {"shape": rows, "chunks": shard, "dtype": str},
    }
    inner = layout.shard_items * -(-_COLUMN_CHUNK_ROWS // layout.shard_items)
    outer = inner * min(_COLUMN_CHUNKS_AN_OBJECT, -(-layout.items // inner))
    for name, values in columns.items():
        _check_column(name, values, layout.items)
        dtype: Any = str if _is_text(values) else values.dtype
        wanted[name] = {"shape": rows, "chunks": (inner,), "shards": (outer,), "dtype": dtype}
    documents = {}
    for name, settings in wanted.items():
        made: dict[str, Any] = {}
        zarr.create_array(
            zarr.storage.MemoryStore(made),
            zarr_format=3,
            compressors=ZstdCodec(level=1, checksum=True),
            fill_value="" if settings["dtype"] is str else 0,
            **{"dimension_names": ("item",), **settings},
        )
        documents[name] = json.loads(made["zarr.json"].to_bytes())
    return documents


def root_document(attributes: Mapping[str, Any], arrays: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The group's ``zarr.json``, with the metadata of all arrays inside: readers list nothing."""
    inline = {"kind": "inline", "must_understand": False, "metadata": dict(arrays)}
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": inline,
    }


def object_rows(document: Mapping[str, Any]) -> int:
    """How many rows one stored object of an array holds."""
    return int(document["chunk_grid"]["configuration"]["chunk_shape"][0])


def object_key(document: Mapping[str, Any], start: int) -> str:
    """The key, below the array, of the object whose first row is ``start``."""
    zeros = ["0"] * (len(document["shape"]) - 1)
    return "/".join(["c", str(start // object_rows(document)), *zeros])


def encode(document: Mapping[str, Any], start: int, values: NDArray[Any]) -> bytes:
    """The object that holds rows ``start`` onwards of an array: all of its rows, at most ``object_rows``."""
    array, kept = _in_memory(document, {})
    array[start : start + len(values)] = values
    return bytes(kept[object_key(document, start)].to_bytes())


def decode(document: Mapping[str, Any], start: int, stop: int, data: bytes) -> NDArray[Any]:
    """Rows ``start`` to ``stop`` (exclusive) out of their object. Raises whatever Zarr raises for bad bytes."""
    from zarr.core.buffer import cpu

    if not data:
        raise ValueError("the object is empty")
    array, _ = _in_memory(document, {object_key(document, start): cpu.Buffer.from_bytes(data)})
    return np.asarray(array[start:stop])


def checksum(values: NDArray[Any]) -> str:
    """SHA-256 hex of the content, the same however it is compressed; texts as UTF-8 with their lengths."""
    if _is_text(values):
        texts = [str(text).encode() for text in values]
        digest = hashlib.sha256(np.array([len(text) for text in texts], dtype="<i8").tobytes())
        digest.update(b"".join(texts))
        return digest.hexdigest()
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()


def _in_memory(document: Mapping[str, Any], kept: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A Zarr array over ``kept``. Chunks that are all zero are written too: absence means "not there"."""
    import zarr
    from zarr.core.buffer import cpu

    kept["zarr.json"] = cpu.Buffer.from_bytes(json.dumps(document).encode())
    array = zarr.open_array(zarr.storage.MemoryStore(kept), mode="r+")
    return array.with_config({"write_empty_chunks": True}), kept


def _inner_chunk(layout: Layout) -> tuple[int, ...]:
    """What is read at once: about 1 MB of whole items; a part of an item only where it exceeds 4 MB."""
    whole = layout.item_shape
    if layout.item_bytes <= _MAX_CHUNK_BYTES:
        return (_divisor(layout.shard_items, _CHUNK_BYTES // layout.item_bytes), *whole)
    if layout.kind == "video":
        frame = layout.item_bytes // whole[0]
        return (1, _divisor(whole[0], _MAX_CHUNK_BYTES // frame), *whole[1:])
    line = layout.item_bytes // whole[0]
    return (1, _divisor(whole[0], _MAX_CHUNK_BYTES // line), *whole[1:])


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``, at least 1."""
    return next(size for size in range(max(1, min(most, number)), 0, -1) if number % size == 0)


def _check_column(name: str, values: NDArray[Any], items: int) -> None:
    if name in RESERVED_NAMES or not name.isidentifier():
        raise ValueError(f"a column of a run cannot be called {name!r}")
    if values.shape != (items,):
        raise ValueError(f"column {name!r} must have the shape ({items},), got {values.shape}")
    if not _is_text(values) and values.dtype.kind not in "biuf":
        raise ValueError(f"column {name!r} must hold numbers, booleans or texts, got {values.dtype}")


def _is_text(values: NDArray[Any]) -> bool:
    return values.dtype.kind in "TU"
