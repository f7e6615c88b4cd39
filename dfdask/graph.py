"""The Dask tasks of a job's shards: a chain of stages for each micro-batch, one write for each shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfdask.batching import micro_batches, shard_range
from dfdask.gate import WRITE
from dfdask.tags import stage_resource, task_key
from dfdask.worker import run_stage, write_shard

if TYPE_CHECKING:
    from dfdask.driver import Work


class Graph:
    """Dask tasks for a few shards, one layer per stage so that each has its resource and its priority."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._layers: dict[str, dict[Any, Any]] = {stage: {} for stage in (*work.stages, WRITE)}
        self.receipts: dict[Any, int] = {}

    def add(self, shard: int) -> int:
        """The tasks of ``shard``; returns how many micro-batches it has."""
        from dask._task_spec import List, Task, TaskRef

        work = self._work
        rows = shard_range(shard, work.store.layout.shard_items, work.store.layout.items)
        items = work.table.items(rows.start, rows.stop)
        last = []
        replaced = work.replaced.get(shard, "")
        # A worker that is given a task once more looks there for what another one has committed meanwhile.
        place = None if replaced else work.store.location
        batches = micro_batches(shard, items, work.batch)
        for micro in batches:
            feed: Any = tuple(items[row - rows.start] for row in micro.items)
            for stage in work.stages:
                key = task_key(stage, work.token, shard, micro.index, len(micro.items))
                self._layers[stage][key] = Task(key, run_stage, work.ref, stage, feed, place, shard)
                feed = TaskRef(key)
            last.append(feed)
        key = task_key(WRITE, work.token, shard, 0, len(items))
        self._layers[WRITE][key] = Task(
            key, write_shard, work.store.location, shard, work.provenance, List(*last), replaced
        )
        self.receipts[key] = len(batches)
        return len(batches)

    def build(self) -> Any:
        from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

        names = list(self._layers)
        layers = {
            stage: MaterializedLayer(
                self._layers[stage],
                # Later stages first: they free memory, earlier ones fill it.
                annotations={"resources": stage_resource(stage), "priority": place},
            )
            for place, stage in enumerate(names)
        }
        dependencies = {stage: set(names[max(place - 1, 0) : place]) for place, stage in enumerate(names)}
        return HighLevelGraph(layers, dependencies)
