"""Submit jobs and look at runs: the Python face of dfdask."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfdask.batching import shard_count
from dfdask.errors import DfdaskError, JobStopped, SpecError
from dfdask.events import Phase, Progress, ShardCommitted, StageProgress
from dfdask.job_cluster import JobCluster
from dfdask.leaving import before_exit
from dfdask.prepare import check_roles, check_same, create_store, seems_complete, unoccupied, versions
from dfdask.prompts import ItemTable, read_items
from dfdask.spec import JobSpec, fingerprint
from dfdask.stages.model import ModelRef, model_ref, with_defaults
from dfdask.stages.weights import component_bytes, cost_key
from dfdask.store import RunStore
from dfdask.targets import Location, resolve_output

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client

    from dfdask.driver import Work

LEAVE_SECONDS = 60.0  # for a job to stop when its program ends


def submit(
    job: JobSpec | Mapping[str, Any] | str | Path | None = None,
    *,
    client: Client | None = None,
    scheduler: str | Mapping[str, Any] | None = None,
    new_run: bool = False,
    retry_failed: bool = False,
    on_commit: Callable[[ShardCommitted], None] | None = None,
    **fields: Any,
) -> Run:
    """Start a job, or go on with it, and return at once.

    ``job`` is a JobSpec, a mapping, the path of a YAML file, or None with the job's keys as ``fields``. It runs on
    ``client``'s cluster, on the one at the address ``scheduler`` (a mapping is the job's key of that name, the noise
    scheduler), or else on worker processes of this machine. With ``new_run`` a run of its own is made where one of
    that name exists; with ``retry_failed`` items of the run that failed are done again, with the others of their
    shards. ``on_commit`` is called for each shard that is committed; an Exception that it raises becomes a warning.
    A program that ends before its job stops it: see ``Run.wait``.

    Raises SpecError, PromptError, ModelError, StorageError (RunChangedError where a run of that name was made from
    another spec) and ClusterError. What goes wrong later is raised by ``Run.wait``.
    """
    import dfdask.driver  # noqa: F401  two threads must not be the first to import distributed at once

    if isinstance(scheduler, Mapping):
        fields, scheduler = {**fields, "scheduler": scheduler}, None
    spec = with_defaults(_spec(job, fields))
    if client is not None and not hasattr(client, "register_plugin"):
        raise SpecError(f"client: must be a distributed.Client, got {client!r}; an address goes to `scheduler`")
    if client is not None and scheduler is not None:
        raise SpecError(f"scheduler: there is a client already, got {scheduler!r} too; leave one of them out")
    return _begin(spec, None, lambda: JobCluster(client, scheduler, spec), new_run, retry_failed, on_commit)


def _begin(
    spec: JobSpec,
    location: Location | None,
    make_cluster: Callable[[], JobCluster],
    new_run: bool,
    retry_failed: bool,
    on_commit: Callable[[ShardCommitted], None] | None,
) -> Run:
    """``location`` None: where ``spec`` says."""
    cluster = make_cluster()
    if new_run or retry_failed or not seems_complete(spec):
        cluster.start()  # while this thread reads and checks the job
    try:
        table = read_items(spec)
        ref = model_ref(spec)
        run = _prepare(spec, ref, table, location, new_run, retry_failed, cluster)
        if run.progress.committed_shards < run.progress.shards:
            cluster.client()  # raises where there is none
        run._again = lambda: _begin(spec, run.location, make_cluster, False, True, on_commit)
        run._start(cluster, on_commit)
    except BaseException:
        cluster.close()
        raise
    return run


def open_run(output: str | Path) -> Run:
    """A stored run, to read: ``output`` is TARGET/NAME or a path. Raises StorageError."""
    return Run(RunStore.open(resolve_output(str(output)), quick=True))


class Run:
    """A run: its progress while it is made here, and its data at any time."""

    def __init__(self, store: RunStore, commits: Iterable[Mapping[str, Any]] | None = None) -> None:
        """``commits`` are what counts as done; None: all that the store has."""
        self.store = store
        self._work: Work | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._over = threading.Event()  # a Thread whose join was interrupted says that it has ended (Python 3.11)
        self._stopping = threading.Event()
        self._pausing = threading.Event()
        self._paused_at = 0.0
        self._paused_seconds = 0.0
        self._again: Callable[[], Run] | None = None
        self._phase: Phase | None = None
        self._stages: tuple[StageProgress, ...] = ()
        self._workers = 0
        self._unserved: tuple[str, ...] = ()
        self._starting = 0
        self._dashboard: str | None = None
        self._began = time.monotonic()
        self._ended: float | None = None
        self._computed_items = 0
        self._first_commit: float | None = None
        self._count(store.commits() if commits is None else commits)
        self._resumed = self._committed

    @property
    def name(self) -> str:
        return str(self.store.location.name)

    @property
    def location(self) -> Location:
        return self.store.location

    @property
    def spec(self) -> dict[str, Any]:
        """What made the run, as its store says."""
        return dict(self.store.attributes["dfdask"]["spec"])

    @property
    def progress(self) -> Progress:
        """A snapshot."""
        layout = self.store.layout
        shards = shard_count(layout.items, layout.shard_items)
        now = self._ended if self._ended is not None else time.monotonic()
        phase: Phase = self._phase or ("finished" if len(self._shards) == shards else "stopped")
        if phase == "running" and self._pausing.is_set():
            phase = "paused"
        rate = eta = None
        # Shards are committed in lumps: how fast it goes is seen by what is through the last stage.
        todo = layout.items - self._resumed
        through = self._stages[-1].done - self._resumed if self._stages else 0
        made = min(max(self._computed_items, through), todo)
        worked = now - self._began - self._paused_seconds
        if made and worked > 0 and phase != "paused":
            rate = made / worked
            eta = (todo - made) / rate
        return Progress(
            run=self.name,
            output=str(self.location),
            phase=phase,
            items=layout.items,
            committed_items=self._committed,
            resumed_items=self._resumed,
            failed_items=self._failed,
            shards=shards,
            committed_shards=len(self._shards),
            elapsed_seconds=now - self._began,
            items_per_second=rate,
            eta_seconds=eta,
            stages=self._stages,
            workers=self._workers,
            dashboard=self._dashboard,
            unserved=self._unserved,
            starting=self._starting,
        )

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the job ends, at most ``timeout`` seconds. Raises what ended it, or TimeoutError."""
        if self._is_going_on and not self._over.wait(timeout):
            raise TimeoutError(f"{self.name} is still running after {timeout} s")
        if self._error is not None:
            raise self._error
        return self

    def stop(self) -> None:
        """Ask the job to stop; shards that are nearly done are finished first."""
        if self._phase == "running":
            self._phase = "stopping"
        self._stopping.set()

    def pause(self) -> None:
        """Hand out no more shards until ``resume``; those that were handed out are finished."""
        if not self._pausing.is_set():
            self._paused_at = time.monotonic()
        self._pausing.set()

    def resume(self) -> None:
        """Go on after ``pause``."""
        if self._pausing.is_set():
            self._paused_seconds += time.monotonic() - self._paused_at
        self._pausing.clear()

    def retry_failed(self) -> Run:
        """Do failed items again, with the others of their shards, as a new Run of the same data.

        Raises DfdaskError while this one has not ended and where it was not made here, else what ``submit`` raises.
        """
        if self._again is None:
            raise DfdaskError(f"{self.name} was only opened here; submit its job with retry_failed=True")
        if self._is_going_on:
            raise DfdaskError(f"{self.name} is {self._phase}; wait for it, or stop it, before failed items are retried")
        return self._again()

    def dataset(self) -> xr.Dataset:
        """The run as xarray opens it, lazily; rows that are not done yet have status 0."""
        return self.store.dataset()

    def failures(self) -> list[dict[str, Any]]:
        """The failed items: ``item`` (row), ``id``, ``prompt`` and ``error``."""
        found = []
        for commit in self.store.commits():
            if commit["failed"]:
                rows = self.dataset()[["id", "prompt", "status", "error"]]
                rows = rows.isel(item=slice(int(commit["start"]), int(commit["stop"]))).load()
                for row in (rows["status"].values == 2).nonzero()[0]:
                    entry = {name: str(rows[name].values[row]) for name in ("id", "prompt", "error")}
                    found.append({"item": int(commit["start"]) + int(row), **entry})
        return found

    def __repr__(self) -> str:
        progress = self.progress
        done = f"{progress.committed_items} of {progress.items} items"
        return f"<Run {self.name}: {progress.phase}, {done}, {progress.failed_items} failed, {self.location}>"

    def _repr_html_(self) -> str:
        from dfdask.markup import html

        return html(self.progress)

    @property
    def _is_going_on(self) -> bool:
        return self._thread is not None and not self._over.is_set()

    def _count(self, commits: Iterable[Mapping[str, Any]]) -> None:
        """These are done, and no others."""
        kept = list(commits)
        self._shards = {int(commit["shard"]) for commit in kept}
        self._committed = sum(int(c["stop"]) - int(c["start"]) for c in kept)
        self._failed = sum(int(commit["failed"]) for commit in kept)

    def _start(self, cluster: JobCluster, on_commit: Callable[[ShardCommitted], None] | None) -> None:
        self._phase = "running"
        self._on_commit = on_commit
        if cluster.ready:
            self._dashboard = cluster.dashboard
        self._thread = threading.Thread(target=self._follow, args=(cluster,), name="dfdask-driver", daemon=True)
        self._thread.start()
        before_exit(self._leave)

    def _leave(self) -> None:
        """The program ends: without this, the cluster would be taken apart while the job runs."""
        if self._is_going_on:
            print(f"{self.name}: the program ends before its job, which is stopped; call wait() to see it through",
                  file=sys.stderr, flush=True)  # fmt: skip
            self.stop()
            self._over.wait(LEAVE_SECONDS)

    def _follow(self, cluster: JobCluster) -> None:
        from dfdask.driver import Driver

        phase: Phase = "failed"
        try:
            if self._work is not None and self._work.shards:
                stop, paused = self._stopping.is_set, self._pausing.is_set
                Driver(cluster.client(), self._work, self._committed_shard, self._cluster_state, stop, paused).run()
            phase = "finished"
            everything = self.store.layout.items
            self._stages = tuple(replace(stage, queued=0, running=0, done=everything) for stage in self._stages)
        except JobStopped:
            phase = "stopped"
            self._recount()
        except DfdaskError as error:
            self._recount()
            self._error = type(error)(f"{error} ({self._saved()})")
        except BaseException as error:
            self._error = error
        finally:
            try:
                cluster.close()
            finally:  # whoever waits for the end has to see it
                self._ended = time.monotonic()
                self._phase = phase
                self._over.set()

    def _recount(self) -> None:
        """By the store: of what was to be replaced some is there still, and not all that was written was told."""
        with suppress(DfdaskError):
            self._count(self.store.commits())

    def _saved(self) -> str:
        progress = self.progress
        return f"{progress.committed_shards} of {progress.shards} shards are committed and kept"

    def _committed_shard(self, event: ShardCommitted) -> None:
        if event.shard not in self._shards:
            self._shards.add(event.shard)
            self._committed += event.items
            self._failed += event.failed_items
        self._computed_items += event.items
        if self._on_commit is not None:
            try:
                self._on_commit(event)
            except Exception as error:  # an observer never stops a job
                import warnings

                warnings.warn(f"on_commit raised {type(error).__name__}: {error}", stacklevel=1)

    def _cluster_state(self, state: Mapping[str, Any]) -> None:
        if self._work is None:
            return
        self._workers = int(state["workers"])
        self._unserved, self._starting = tuple(state["unserved"]), int(state["starting"])
        self._stages = tuple(
            StageProgress(
                name=stage,
                queued=state["queued"].get(stage, 0),
                running=state["running"].get(stage, 0),
                done=self._resumed + state["done"].get(stage, 0),
                workers=state["roles"].get(stage, 0),
            )
            for stage in self._work.stages
        )


def _spec(job: JobSpec | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]) -> JobSpec:
    if isinstance(job, (str, Path)):
        return JobSpec.from_yaml(job, overrides=fields)
    if isinstance(job, JobSpec):
        return job.replace(**fields) if fields else job
    if job is not None and not isinstance(job, Mapping):
        raise SpecError(f"job: must be a JobSpec, a mapping or the path of a YAML file, got {job!r}")
    return JobSpec.from_mapping({**(job or {}), **fields})


def _prepare(
    spec: JobSpec,
    ref: ModelRef,
    table: ItemTable,
    location: Location | None,
    new_run: bool,
    retry_failed: bool,
    cluster: JobCluster,
) -> Run:
    """The run's store, new or the one that is there already, and the work that is left."""
    from dfdask.driver import Work, missing_shards, token_for

    canonical = {**spec.canonical(), "model_digest": ref.digest}
    if ref.adapters:
        canonical["adapter_digests"] = [adapter.digest for adapter in ref.adapters]
    identity = fingerprint(canonical, table.digest())
    location = location or resolve_output(spec.output or f"local/run-{identity[:8]}")
    if new_run:
        location = unoccupied(location)
    weights, streamed = component_bytes(ref)
    location.check_writable()
    made_with = versions()
    if RunStore.exists(location):
        store = RunStore.open(location)
        check_roles(spec, store.attributes["dfdask"]["stages"], cluster)
    else:
        facts = {"fingerprint": identity, "items_digest": table.digest(), "spec": canonical, "versions": made_with}
        store = create_store(location, spec, ref, table, facts, cluster)
    check_same(store, canonical, table, identity)
    commits = store.commits()
    failed = [commit for commit in commits if commit["failed"]] if retry_failed else []
    replaced = {int(commit["shard"]): str(commit["writer"]) for commit in failed}
    run = Run(store, [commit for commit in commits if int(commit["shard"]) not in replaced])
    layout = store.layout
    made = store.attributes["dfdask"]
    run._work = Work(
        ref=replace(ref, encodings=location) if spec.share_encodings else ref,
        stages=tuple(made["stages"]),
        store=store,
        table=table,
        batch=made.get("batch", spec.batch),  # runs of earlier versions do not name it
        shards=missing_shards(shard_count(layout.items, layout.shard_items), run._shards),
        token=token_for(identity, location),
        provenance={"versions": made_with},
        cost_key=cost_key(spec, ref),
        weights=weights,
        streamed=streamed,
        priority=spec.priority,
        replaced=replaced,
    )
    store.sweep()
    return run
