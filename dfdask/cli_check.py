"""``dfdask check``: is all that was committed still there, and as it was written?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dfdask.errors import StorageError
from dfdask.words import count

if TYPE_CHECKING:
    from dfdask.store import Damage, RunStore


def check_run(store: RunStore, repair: bool, as_json: bool) -> None:
    """List all damage. Raises StorageError where there is some that is not repaired.

    ``repair`` withdraws the commits of damaged shards. Columns cannot be made again.
    """
    damage = store.verify()
    shards = sorted({one.shard for one in damage if one.shard is not None})
    columns = [one.array for one in damage if one.shard is None]
    if repair:
        store.forget(shards)
    if as_json:
        click.echo(json.dumps(_as_dict(store, damage, shards if repair else []), ensure_ascii=False))
    else:
        for line in [str(one) for one in damage] or [_all_well(store)]:
            click.echo(line)
    lost = f"{count(len(shards), 'shard')} ({count(_items(store, shards), 'item')})"
    if repair and shards and not as_json:
        click.echo(f"withdrew the commits of {lost}: the same dfdask run command makes exactly those again")
    if columns:
        raise StorageError(
            f"{store.location} is damaged in what its items were made from ({', '.join(columns)}), which cannot be "
            "made again; run the job with --new-run"
        )
    if shards and not repair:
        raise StorageError(
            f"{store.location} is damaged in {lost}; to make them again: dfdask check {store.location} --repair, then "
            "the same dfdask run command"
        )


def _all_well(store: RunStore) -> str:
    committed = len(store.committed())
    return f"{committed:,} of {count(store.layout.shards, 'shard')} committed, all as they were written"


def _items(store: RunStore, shards: list[int]) -> int:
    return sum(len(store.layout.rows(shard)) for shard in shards)


def _as_dict(store: RunStore, damage: list[Damage], repaired: list[int]) -> dict[str, object]:
    return {
        "run": store.location.name,
        "output": str(store.location),
        "shards": store.layout.shards,
        "committed_shards": len(store.committed()),
        "damage": [asdict(one) for one in damage],
        "repaired_shards": repaired,
    }
