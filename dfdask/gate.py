"""The gate: a scheduler plugin that holds ready stage tasks back and places each on a worker of its role.

Stage tasks ask for the resource ``stage:<name>``, which no worker offers, so that Dask leaves them in its
"no-worker" state. The gate assigns them, at most ``depth`` per worker, so that the inputs of the next task arrive
while the current one runs. Who goes where is the dispatcher's rule, which roles a worker has the controller's
decision; a change of roles is a change of the gate's books and never touches what is assigned already. Tasks of
``WRITE`` run beside computation and are placed where most of their bytes are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

from dfdask import views
from dfdask.controller import Controller, JobFacts, StageFacts
from dfdask.cost_file import load_costs, save_costs
from dfdask.dispatch import Dispatcher, Kind, Seat
from dfdask.events import ClusterState, ItemQuarantined, JobEnded, JobStarted, WorkerJoined, WorkerLeft
from dfdask.first_costs import FirstCosts
from dfdask.flow import Flow
from dfdask.ledger import JobAccount, Ledger, WorkerAccount
from dfdask.placement import Device
from dfdask.quarantine import Quarantine
from dfdask.roles import Roles
from dfdask.stage_tasks import bytes_by_worker, home_of, kind_of, order_of, plain_key, stage_name, stage_wanted
from dfdask.tags import compute_resource, read_tags, stage_resource
from dfdask.telemetry import TELEMETRY, Telemetry
from dfdask.warm_up import WarmUp

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

NAME = "dfdask-gate"
WRITE = "write"
BEGAN = "dfdask-item"
"""The topic on which a worker says which item of a suspected batch it begins."""
UNLIMITED_BYTES = 1 << 62
STRANGER_SECONDS = 60.0


class Gate(SchedulerPlugin):
    """Places stage tasks. One serves all jobs of a cluster."""

    name = NAME
    idempotent = True

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        self.seconds = 0.0
        self.dispatcher = Dispatcher(depth)
        self.controller = Controller()
        self.ledger = Ledger()
        self.quarantine = Quarantine()
        self.flow = Flow(self.dispatcher, self.controller, self.ledger)
        self._telemetry = Telemetry(self.ledger, self.controller)
        self._warm_up = WarmUp(self.dispatcher, self.controller, self.ledger, self._wake)
        self._first_costs = FirstCosts(self.controller, self._reconsider)
        self._roles = Roles(self.dispatcher, self.controller, self.ledger, self._warm_up.role_changed)
        self._placed: dict[Any, str] = {}  # writes too
        self._writes: dict[Any, None] = {}
        self._counted: set[Any] = set()  # done tasks that Dask still knows: it may compute them again
        self._emptied: set[str] = set()
        self._draining: set[str] = set()
        self._ended: set[str] = set()
        self._reasons: list[str] = []
        self._pump_is_due = False

    @property
    def events(self) -> Any:
        """Numbered events of late, newest last."""
        return self.ledger.events

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.controller.costs.learn(load_costs())
        scheduler.handlers.update(
            dfdask_start_job=self.start_job,
            dfdask_end_job=self.end_job,
            dfdask_progress=self.progress,
            dfdask_state=lambda: asdict(self.state()),
            dfdask_events=self.events_since,
            dfdask_forecast=self.forecast,
            dfdask_want_worker=lambda: self.ledger.newcomers.want(time.time()),
            dfdask_starting=lambda starting: self.ledger.newcomers.tell(starting, time.time()),
            dfdask_drain=self.drain,
        )
        for address in scheduler.workers:
            self.add_worker(scheduler, address)
        for key, task in scheduler.tasks.items():
            if task.state == "no-worker":
                self.transition(key, "waiting", "no-worker")

    async def close(self) -> None:
        self._save_costs()

    # -- jobs

    def start_job(self, job: dict[str, Any], client: str = "") -> int:
        """A client is about to submit tasks of ``job``. Returns the number of its first event."""
        run, number = job["run"], self.ledger.next_number
        stages = tuple(StageFacts(**stage) for stage in job["stages"])
        self.controller.add_job(
            JobFacts(run, job["model"], stages, job["items_left"], job["batch"], job.get("weight", 1.0))
        )
        if "ref" in job:
            self._warm_up.refs[run] = job["ref"]
        self._first_costs.ask(run, job.get("sample"))
        now, known = time.time(), self.ledger.jobs.get(run)
        told = {name: job[name] for name in ("name", "output", "items", "committed_items", "failed_items")}
        clients = {client, *(known.clients if known else ())}
        account = self.ledger.jobs[run] = JobAccount(**told, started=now, clients=clients)
        for stage in stages:
            account.stage(stage.name)
        self.ledger.note(JobStarted(now, run, job["name"], job["output"], job["items"]))
        self._reconsider(f"{job['name']} began")
        return number

    def end_job(self, run: str, reason: str = "finished", client: str = "") -> None:
        """For this client; for all of them where it names none. Others may have submitted the same run."""
        account = self.ledger.jobs.get(run)
        if account is None:
            return
        account.clients.discard(client)
        if client and account.clients:
            return
        del self.ledger.jobs[run]
        self.controller.remove_job(run)
        counts = account.items, account.committed_items, account.failed_items
        self.ledger.note(JobEnded(time.time(), run, reason, *counts))
        self._ended.add(run)
        self._roles.forget(run)
        self._warm_up.refs.pop(run, None)
        self._save_costs()
        self._reconsider(f"{account.name} ended")

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        for run in [run for run, account in self.ledger.jobs.items() if client in account.clients]:
            self.end_job(run, "its client went away", client)

    def _stranger(self, kind: Kind) -> None:
        """A task of a job that no client announced: it is served like any other, with costs of its own."""
        run, stage = kind
        known = self.controller.jobs.get(run)
        stages = (*(known.stages if known else ()), StageFacts(stage))
        self.controller.add_job(JobFacts(run, run, stages, 0))
        if run not in self.ledger.jobs:
            self.ledger.jobs[run] = JobAccount(run, "", 0, 0, 0, time.time(), set())
        self.ledger.jobs[run].stage(stage)
        self._reconsider(f"{run} came")

    # -- workers

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        state = scheduler.workers[worker]
        tags = read_tags(state.resources)
        memory = UNLIMITED_BYTES if tags.memory_bytes is None else tags.memory_bytes
        self.remove_worker(scheduler, worker)
        now = time.time()
        self.ledger.workers[worker] = WorkerAccount(
            str(state.name), tags.device_class, memory, int(state.memory_limit or 0), now, now
        )
        self.ledger.note(WorkerJoined(now, worker, tags.device_class, memory))
        self.controller.add_device(Device(worker, tags.device_class, memory), tags.only)
        self.dispatcher.join(worker, Seat(()))
        self.dispatcher.pause(worker, state not in scheduler.running)
        self._reconsider(f"{state.name} joined")

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        account = self.ledger.workers.pop(worker, None)
        if account is None:
            return
        lost = self.dispatcher.leave(worker)
        for key in lost:
            self._placed.pop(key, None)
        self.controller.remove_device(worker)
        self._draining.discard(worker)
        self._emptied.discard(worker)
        self.ledger.note(WorkerLeft(time.time(), worker, len(lost)))
        self._reconsider(f"{account.name} left")

    def log_event(self, topic: str, msg: Any) -> None:
        if topic == BEGAN:
            self.quarantine.began(plain_key(msg["key"]), int(msg["item"]))
        # The only word of a worker that has begun or gone on to run: it is not among the running when it is added.
        elif isinstance(msg, dict) and msg.get("action") == "worker-status-change" and topic in self.ledger.workers:
            self._pause(topic, msg.get("status") != Status.running.name or topic in self._draining)

    async def drain(self, workers: list[str], timeout: float = 600.0) -> list[str]:
        """Give these workers nothing more and wait until they have done what they hold; returns those that have."""
        here = [worker for worker in workers if worker in self.ledger.workers]
        for worker in here:
            self._draining.add(worker)
            self._pause(worker)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(self._busy(worker) for worker in here):
            await asyncio.sleep(0.02)
        drained = [worker for worker in here if not self._busy(worker)]
        for worker in set(here) - set(drained):
            self._draining.discard(worker)
            if worker in self.ledger.workers:
                self._pause(worker, self._scheduler.workers[worker] not in self._scheduler.running)
        return drained

    def _pause(self, worker: str, paused: bool = True) -> None:
        """Give it nothing new, and count on others for its roles, until it goes on."""
        self.dispatcher.pause(worker, paused)
        if self.controller.pause(worker, paused):
            self._reconsider(f"{self.ledger.workers[worker].name} {'paused' if paused else 'goes on'}")
        self._wake()

    def _busy(self, worker: str) -> bool:
        state = self._scheduler.workers.get(worker)
        return state is not None and bool(state.processing)

    # -- tasks

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if start == "released" and finish == "waiting" or start == "no-worker" and finish == "processing":
            return  # most of what Dask tells: not worth a look at the clock
        started = time.thread_time()
        if finish == "no-worker":
            self._arrive(key)
        elif start == "no-worker":
            self.dispatcher.drop(key)
            self._writes.pop(key, None)
        elif start == "processing" and key in self._placed:
            self._leave(key, finish, kwargs)
        elif start == "memory" and key in self._counted:
            self.flow.used(key)
            self._wake()
        if finish == "forgotten":
            self._counted.discard(key)
            self.quarantine.forget_task(key)
        self.seconds += time.thread_time() - started

    def _arrive(self, key: Any) -> None:
        task = self._scheduler.tasks[key]
        stage = stage_wanted(task)
        if stage is None:
            return
        if stage == WRITE:
            self._writes[key] = None
        else:
            kind = kind_of(key)
            job = self.ledger.jobs.get(kind[0])
            if job is None or stage not in job.stages:
                self._stranger(kind)
            elif self.controller.left(kind) == 0:  # computed again: nobody serves what was done
                self.controller.at_least_left(kind, key[3])
                self._reconsider(f"{stage} of {job.name} came back")
            suspicion = self.quarantine.suspicion(key, task.suspicious)
            if suspicion.note is not None or key in self._counted:
                note = {**(suspicion.note or {}), "again": True}
                task.annotations = {**(task.annotations or {}), TELEMETRY: note}
            if suspicion.culprit is not None:
                kills = self.quarantine.kills_to_blame
                self.ledger.note(ItemQuarantined(time.time(), kind[0], suspicion.culprit, stage, kills))
            self.dispatcher.push(kind, order_of(task), key, key[3], suspicion.alone)
        self._wake()

    def _leave(self, key: Any, finish: str, details: Mapping[str, Any]) -> None:
        address = self._placed.pop(key)
        task = self._scheduler.tasks.get(key)
        awaited = finish == "memory" and task is not None and bool(task.waiters)
        self.dispatcher.done(key, finished=awaited)
        if awaited:
            self.flow.made(key, kind_of(key), key[3], int(details.get("nbytes") or 0))
        if task is not None:
            # Dask may compute it again later: then it must come through the gate, not to a dead address.
            task.worker_restrictions = None
            task.resource_restrictions = stage_resource(stage_name(key))
        if finish == "memory":
            self._finish(key, address, details)
            for made in task.dependencies if task is not None else ():
                if not made.waiters:  # a client may still hold the result: nobody waits for it
                    self.flow.used(made.key)
        if address in self.ledger.workers and not self.dispatcher.held(address):
            self._emptied.add(address)
        self._wake()

    def _finish(self, key: Any, address: str, details: Mapping[str, Any]) -> None:
        kind, first = kind_of(key), key not in self._counted
        self._counted.add(key)
        job = self.ledger.jobs.get(kind[0])
        if job is None:
            return
        if kind[1] != WRITE:
            self._telemetry.task_done(job, kind, key[3], address, first, details)
            if self.controller.left(kind) == 0:
                self._reconsider(f"{kind[1]} of {job.name} is done")
        elif first:
            self._telemetry.shard_written(kind[0], details)

    # -- placing

    def _wake(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _reconsider(self, reason: str) -> None:
        """Decide about roles before anything else is placed."""
        if reason not in self._reasons:
            self._reasons.append(reason)
        self._wake()

    def _pump(self) -> None:
        started = time.thread_time()
        self._pump_is_due = False
        if self._reasons or self._roles.are_due():
            self._decide()
        else:
            self._roles.look_again(self._wake)
        scheduler, now = self._scheduler, time.time()
        chosen: dict[Any, str] = {}
        for assignment in self.dispatcher.assign(self._holders):
            key, address = assignment.key, assignment.worker
            self._bind(key, address, compute_resource(scheduler.workers[address].resources))
            chosen[key] = "processing"
            self._emptied.discard(address)
            self.ledger.workers[address].set_busy(now)
        for worker in self._emptied:
            self.ledger.workers[worker].set_idle(now, self.dispatcher.is_blocked(worker))
        self._emptied.clear()
        for key in list(self._writes):
            home = home_of(scheduler, scheduler.tasks[key])
            if home is not None:
                del self._writes[key]
                self._bind(key, home, {})
                chosen[key] = "processing"
        self._warm_up.begin(scheduler)
        self._first_costs.begin(scheduler)
        self.seconds += time.thread_time() - started
        if chosen:
            # Dask takes recommendations from the end, so the first chosen comes last.
            recommendations = dict(reversed(chosen.items()))
            scheduler.transitions(recommendations, stimulus_id=f"dfdask-gate-{now}")

    def _bind(self, key: Any, address: str, takes: dict[str, float]) -> None:
        task = self._scheduler.tasks[key]
        task.resource_restrictions, task.worker_restrictions = takes, {address}
        self._placed[key] = address

    def _holders(self, key: Any) -> Mapping[str, int]:
        return bytes_by_worker(self._scheduler.tasks[key])

    # -- roles

    def _decide(self) -> None:
        reason = "; ".join(self._reasons[:3]) or "costs changed"
        self._reasons.clear()
        self._tidy()
        self.flow.set_limits()
        self._roles.decide(self._scheduler, reason)

    def _tidy(self) -> None:
        """Forget jobs that ended, and unannounced ones that have been done for a while."""
        now = time.time()
        for run, account in list(self.ledger.jobs.items()):
            unannounced = not account.clients and not account.items
            if unannounced and now - account.started > STRANGER_SECONDS and not self.dispatcher.has_work(run):
                self.end_job(run)
        for run in [run for run in self._ended if not self.dispatcher.has_work(run)]:
            self._ended.discard(run)
            if run not in self.ledger.jobs:
                self.dispatcher.forget(run)

    # -- what others ask

    def progress(self, run: str) -> dict[str, Any]:
        """Where the items of ``run`` are, who cannot be served, and the window that its client should keep full."""
        return {
            **views.progress(run, self.ledger, self.dispatcher, self.controller),
            "unserved": self._roles.impossible.get(run, ()),
            "starting": self.ledger.newcomers.starting(time.time()),
            "window": self.flow.window(run),
            "gate_seconds": self.seconds,
        }

    def state(self) -> ClusterState:
        """A snapshot of all jobs and workers."""
        forecast = self._roles.forecast_seconds
        return views.cluster_state(time.time(), self.ledger, self.dispatcher, self.controller, forecast, self.seconds)

    def events_since(self, number: int = 0, run: str | None = None) -> dict[str, Any]:
        """Events from ``number`` on as JSON-able data (pictures left out), and the number to ask from next."""
        return {"events": self.ledger.told_since(number, run), "next": self.ledger.next_number}

    def forecast(self, classes: Sequence[str] = ()) -> dict[str, Any]:
        return views.forecast(time.time(), self.ledger, self.dispatcher, self.controller, classes)

    def _save_costs(self) -> None:
        save_costs(self.controller.costs.to_json())
