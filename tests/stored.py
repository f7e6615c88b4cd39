"""Small runs with known content, and the S3 server's names, for the tests of what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfdask.store import FAILED, OK, Commit, Layout, RunStore
from dfdask.targets import Location

BUCKET, REGION = "pictures", "eu-west-1"
KEYS = {
    "AWS_ACCESS_KEY_ID": "loopback-key",
    "AWS_SECRET_ACCESS_KEY": "loopback-secret",
    "AWS_DEFAULT_REGION": REGION,
}

TEXT = np.dtypes.StringDType()


def columns(items: int, **more: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What every run has: ``id``, ``prompt``, ``seed``; and ``more``."""
    return {
        "id": np.array([f"id-{item}" for item in range(items)], dtype=TEXT),
        "prompt": np.array([f"prompt {item}: café, 猫" for item in range(items)], dtype=TEXT),
        "seed": np.arange(items, dtype=np.uint32) * 7,
        **more,
    }


def new_run(
    location: Location, items: int = 7, shard_items: int = 3, shape: tuple[int, ...] = (6, 5, 3), **more: NDArray[Any]
) -> RunStore:
    layout = Layout("image" if len(shape) == 3 else "video", shape, items, shard_items)
    return RunStore.create(location, layout, columns(items, **more), {"dfdask": {"spec": {"seed": 1}}})


def pixels(store: RunStore, shard: int, salt: int = 0) -> NDArray[np.uint8]:
    """(n, *item_shape) uint8, always the same for a shard."""
    rows, shape = store.layout.rows(shard), store.layout.item_shape
    return np.random.default_rng([shard, salt]).integers(0, 256, (len(rows), *shape), dtype=np.uint8)


def put(store: RunStore, shard: int, failed: tuple[int, ...] = (), salt: int = 0) -> Commit:
    """Commit a shard; ``failed`` are rows of the run, which stay black."""
    rows, data = store.layout.rows(shard), pixels(store, shard, salt)
    status = np.array([FAILED if row in failed else OK for row in rows], dtype=np.uint8)
    data[status == FAILED] = 0
    errors = [f"denoise: row {row} ✗" if row in failed else "" for row in rows]
    return store.write_shard(shard, data, status, errors, {"stage_seconds": {"denoise": 0.5}})


def everything(location: Location) -> dict[str, bytes]:
    """All objects of a run as they are stored, by key."""
    import obstore

    store = location.object_store()
    keys = [entry["path"] for page in obstore.list(store) for entry in page]
    return {key: bytes(obstore.get(store, key).bytes()) for key in keys}
