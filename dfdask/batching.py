"""Batching: which items are written together (shards) and which run together (micro-batches)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dfdask.arguments import canonical_json
from dfdask.images import Picture
from dfdask.items import Item

MAX_SHARD_ITEMS = 512
MAX_SHARD_BYTES = 64 * 2**20
SHARDS_WANTED = 16


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Items (row indices) that go through a stage in one call; ``index`` counts within the ``shard``."""

    shard: int
    index: int
    items: tuple[int, ...]


def shard_count(items: int, shard_items: int) -> int:
    """How many shards hold ``items`` rows; the last one may be partial."""
    if items < 0 or shard_items < 1:
        raise ValueError(f"shards need items >= 0 and shard_items >= 1, got {items} and {shard_items}")
    return -(-items // shard_items)


def shard_range(shard: int, shard_items: int, items: int) -> range:
    """The rows of ``shard``. Raises ValueError for a shard that the run does not have."""
    shards = shard_count(items, shard_items)
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} is not one of the {shards} of {items} items, {shard_items} each")
    return range(shard * shard_items, min((shard + 1) * shard_items, items))


def default_shard_items(items: int, batch: int, bytes_per_item: int) -> int:
    """A multiple of ``batch``: small enough to commit early and often, large enough to make few objects.

    Aims at 16 shards or more, of at most 512 items and 64 MiB of raw pixels; never less than one batch.
    """
    if items < 0 or batch < 1 or bytes_per_item < 0:
        raise ValueError(f"need items >= 0, batch >= 1, bytes_per_item >= 0, got {items}, {batch}, {bytes_per_item}")
    most_items = min(MAX_SHARD_ITEMS, MAX_SHARD_BYTES // max(1, bytes_per_item))
    batches_for_early_commits = -(-items // (SHARDS_WANTED * batch))
    return batch * max(1, min(batches_for_early_commits, most_items // batch))


def even_batch(items: int, workers: int, most: int) -> int:
    """So many items at once that all workers have equally much to do, in as few rounds as batches of ``most`` allow."""
    if items < 0 or workers < 1 or most < 1:
        raise ValueError(f"need items >= 0, workers >= 1, most >= 1, got {items}, {workers}, {most}")
    rounds = max(-(-items // (most * workers)), 1)
    return max(-(-items // (rounds * workers)), 1)


def is_batchable(name: str, value: Any) -> bool:
    """Whether items with different values of this argument can share a call, the values travelling as a list.

    diffusers pipelines take lists for texts: ``negative_prompt``, ``prompt_2`` and the like; and most of them for
    pictures. The encode stage finds out which, and takes the others one by one.
    """
    return isinstance(value, Picture) or ("prompt" in name and isinstance(value, str))


def micro_batches(shard: int, items: Sequence[Item], batch: int) -> list[MicroBatch]:
    """Cut the items of one shard into calls of at most ``batch`` items whose arguments go together.

    Items keep their order within a call, calls are ordered by their first item. Depends on the shard's items
    and ``batch`` alone, so a resumed shard runs in the same batches.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    groups: dict[str, list[int]] = {}
    keys: dict[int, str] = {}  # by identity: most items share one arguments object
    for item in items:
        key = keys.get(id(item.arguments))
        if key is None:
            key = keys[id(item.arguments)] = call_key(item)
        groups.setdefault(key, []).append(item.index)
    calls = [tuple(rows[i : i + batch]) for rows in groups.values() for i in range(0, len(rows), batch)]
    position = {item.index: place for place, item in enumerate(items)}
    calls.sort(key=lambda rows: position[rows[0]])
    return [MicroBatch(shard, index, rows) for index, rows in enumerate(calls)]


def call_key(item: Item, without: Collection[str] = ()) -> str:
    """Equal for items that fit in one call: same fixed values, same names of values that travel as lists.

    Pictures of different sizes do not fit: a pipeline stacks them. ``without``: arguments to leave out of account.
    """
    fixed: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for name, value in item.arguments.items():
        if name in without:
            continue
        if not is_batchable(name, value):
            fixed[name] = value
        else:
            listed[name] = (value.width, value.height) if isinstance(value, Picture) else None
    return canonical_json([fixed, listed])
