"""The store of a job: made once the model has been seen to take the job, or found and seen to be the same job's."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dfdask.batching import default_shard_items, even_batch
from dfdask.errors import DfdaskError, RunChangedError, SpecError
from dfdask.prompts import ItemTable
from dfdask.spec import JobSpec, diff_specs
from dfdask.store import RunStore
from dfdask.store_layout import Layout
from dfdask.targets import Location, resolve_output

if TYPE_CHECKING:
    from dfdask.job_cluster import JobCluster
    from dfdask.stages.model import ModelRef

FORMAT_VERSION = 1


def create_store(
    location: Location, spec: JobSpec, ref: ModelRef, table: ItemTable, facts: dict[str, Any], cluster: JobCluster
) -> RunStore:
    """A new store, once the model has been seen to take the job."""
    from dfdask.driver import inspect_on_worker
    from dfdask.stages.check import check_job

    client = cluster.client()  # no store is made for a job that cannot start
    checked = check_job(ref, table, partial(inspect_on_worker, client))
    check_roles(spec, checked.stages, cluster)
    batch = batch_size(spec, len(table), cluster.worker_count())
    layout = Layout(
        kind=checked.output.kind,
        item_shape=checked.output.item_shape,
        items=len(table),
        shard_items=spec.shard or _shard_items(len(table), batch, checked.output.item_shape),
    )
    attributes = {
        "version": FORMAT_VERSION,
        **facts,
        "stages": list(checked.stages),
        "batch": batch,
        **({"uncut": checked.uncut} if checked.uncut else {}),
        "model": {"source": ref.source, "revision": ref.revision, "digest": ref.digest},
        "lossy": list(spec.speed.lossy),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    columns = {**table.columns(), **_size_columns(checked.output.sizes)}
    return RunStore.create(location, layout, columns, {"dfdask": attributes})


def batch_size(spec: JobSpec, items: int, workers: int) -> int:
    """What the job says, or else so many that all workers have equally much to do."""
    return spec.batch if "batch" in spec.model_fields_set else even_batch(items, workers, most=spec.batch)


def check_roles(spec: JobSpec, stages: Sequence[str], cluster: JobCluster) -> None:
    """Raise SpecError where the job starts its own workers and leaves a stage to nobody."""
    if not cluster.is_local or not isinstance(spec.workers, list) or any(not group.stages for group in spec.workers):
        return
    staffed = {stage for group in spec.workers for stage in group.stages or ()}
    missing = [stage for stage in stages if stage not in staffed]
    if missing:
        raise SpecError(
            f"workers: no group runs {', '.join(missing)}, the groups run {', '.join(sorted(staffed))}; "
            f"the stages of this model are {', '.join(stages)}"
        )


def check_same(store: RunStore, canonical: Mapping[str, Any], table: ItemTable, identity: str) -> None:
    stored = store.attributes.get("dfdask", {})
    if stored.get("fingerprint") == identity:
        return
    changes = diff_specs(stored.get("spec", {}), canonical)
    there, here = store.layout.items, len(table)
    if there != here:
        changes.append(f"prompts: {there} items in the stored run, {here} now")
    elif not changes and stored.get("items_digest") != table.digest():  # which has the job's arguments in it too
        changes.append("prompts: their texts, ids, seeds or arguments differ from the stored run's")
    lines = "".join(f"\n  {change}" for change in changes)
    unused = "" if store.committed() else f"; nothing of it is done yet: {store.location} may be deleted as well"
    raise RunChangedError(
        f"{store.location} was made from a different job:{lines}\n"
        "Undo the change to go on with it, choose another output, or start afresh with --new-run (new_run=True)"
        f"{unused}"
    )


def unoccupied(location: Location) -> Location:
    candidate, number = location, 2
    while RunStore.exists(candidate):
        candidate, number = replace(location, name=f"{location.name}-{number}"), number + 1
    return candidate


def _shard_items(items: int, batch: int, item_shape: tuple[int, ...]) -> int:
    size = 1
    for extent in item_shape:
        size *= extent
    return default_shard_items(items, batch, size)


def _size_columns(sizes: tuple[tuple[int, int], ...] | None) -> dict[str, Any]:
    if sizes is None:
        return {}
    import numpy as np

    pixels = np.array(sizes, np.int64)
    return {"height": pixels[:, 0], "width": pixels[:, 1]}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("dfdask", "torch", "diffusers", "transformers", "distributed", "zarr", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def seems_complete(spec: JobSpec) -> bool:
    """Whether there is a run of that name on a disk with every shard: then no cluster has to start, most likely."""
    with suppress(DfdaskError):
        location = resolve_output(spec.output) if spec.output else None
        if location is not None and location.kind == "local" and RunStore.exists(location):
            store = RunStore.open(location)
            return len(store.committed()) == store.layout.shards
    return False
