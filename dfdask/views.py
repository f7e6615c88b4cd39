"""What the gate tells others of its jobs and workers: put together from its books, its queues and its beliefs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dfdask.controller import Controller
from dfdask.dispatch import Dispatcher
from dfdask.events import ClusterState, JobState, StageState, WorkerState
from dfdask.ledger import Ledger, StageAccount


def roles_by_stage(ledger: Ledger, run: str | None = None) -> Counter[str]:
    """How many workers have a share of each stage: of one run, or of all."""
    found: Counter[str] = Counter()
    for account in ledger.workers.values():
        found.update({stage for (job, stage), share in account.shares.items() if share > 0 and run in (None, job)})
    return found


def progress(run: str, ledger: Ledger, dispatcher: Dispatcher, controller: Controller) -> dict[str, Any]:
    """Items of ``run`` by stage: queued at the gate, running (assigned), done; and workers by role."""
    job = ledger.jobs.get(run)
    stages = list(job.stages) if job else []
    return {
        "queued": {stage: dispatcher.ready_items((run, stage)) for stage in stages},
        "running": {stage: dispatcher.running_items((run, stage)) for stage in stages},
        "done": {stage: job.stages[stage].done_items for stage in stages} if job else {},
        "roles": dict(roles_by_stage(ledger, run)),
        "workers": len(ledger.workers),
    }


def cluster_state(
    now: float,
    ledger: Ledger,
    dispatcher: Dispatcher,
    controller: Controller,
    forecast_seconds: Mapping[str, float],
    gate_seconds: float,
) -> ClusterState:
    """A snapshot."""
    classes = Counter(account.device_class for account in ledger.workers.values())
    usual = classes.most_common(1)[0][0] if classes else None
    jobs = tuple(
        JobState(
            run=run,
            name=job.name,
            output=job.output,
            started=job.started,
            priority=controller.jobs[run].weight if run in controller.jobs else 1.0,
            items=job.items,
            committed_items=job.committed_items,
            failed_items=job.failed_items,
            stages=_stages(run, job.stages, ledger, dispatcher, controller, usual),
            forecast_seconds=forecast_seconds.get(run),
        )
        for run, job in ledger.jobs.items()
    )
    for account in ledger.workers.values():
        account.settle(now)
    workers = tuple(
        WorkerState(
            address=address,
            name=account.name,
            device_class=account.device_class,
            memory_bytes=account.memory_bytes,
            roles=_by_stage(account.shares),
            running=_stage_of(next(iter(dispatcher.held(address)), None)),
            held_tasks=len(dispatcher.held(address)),
            joined=account.joined,
            busy_seconds=account.busy_seconds,
            load_seconds=account.load_seconds,
            starving_seconds=account.starving_seconds,
            blocked_seconds=account.blocked_seconds,
        )
        for address, account in ledger.workers.items()
    )
    return ClusterState(now, jobs, workers, gate_seconds)


def forecast(
    now: float, ledger: Ledger, dispatcher: Dispatcher, controller: Controller, classes: Sequence[str]
) -> dict[str, Any]:
    """What is left to do, and which workers have nothing to do; what it takes by device class, ``classes`` of which
    there are no workers among them where that is known. ``wanted``: a job waits for a first worker.
    """
    return {
        "works": [
            {
                "job": work.job,
                "stage": work.stage,
                "items": work.items,
                "weight": work.weight,
                "bytes": controller.weight_bytes((work.job, work.stage)),
                "seconds_per_item": {
                    name: controller.seconds_per_item((work.job, work.stage), name)
                    for name in classes
                    if controller.knows((work.job, work.stage), name)
                }
                | {
                    name: min(option.seconds_per_item for option in options)
                    for name, options in work.options.items()
                    if options
                },
            }
            for work in controller.work()
        ],
        "workers": {
            address: {
                "name": account.name,
                "class": account.device_class,
                "idle": not dispatcher.held(address),
                "held_tasks": len(dispatcher.held(address)),
            }
            for address, account in ledger.workers.items()
        },
        "jobs": len(ledger.jobs),
        "wanted": ledger.newcomers.wanted(now),
    }


def _stage_of(key: Any) -> str | None:
    return None if key is None else str(key[0].rpartition("-")[0])


def _by_stage(shares: Mapping[tuple[str, str], float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for (_, stage), share in shares.items():
        total[stage] = total.get(stage, 0.0) + share
    return total


def _stages(
    run: str,
    accounts: Mapping[str, StageAccount],
    ledger: Ledger,
    dispatcher: Dispatcher,
    controller: Controller,
    device_class: str | None,
) -> tuple[StageState, ...]:
    serving = roles_by_stage(ledger, run)
    facts = controller.jobs.get(run)
    known = {stage.name for stage in facts.stages} if facts else set()
    return tuple(
        StageState(
            name=stage,
            queued=dispatcher.ready_items((run, stage)),
            running=dispatcher.running_items((run, stage)),
            waiting=account.waiting_items,
            done=account.done_items,
            workers=serving[stage],
            device_seconds=account.device_seconds,
            waiting_bytes=account.waiting_bytes,
            predicted_seconds=controller.seconds_per_item((run, stage), device_class)
            if device_class and stage in known
            else None,
            measured_seconds=account.recent_seconds,
            error=account.error,
        )
        for stage, account in accounts.items()
    )
