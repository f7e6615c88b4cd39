"""Start Dask processes the way dfdask wants them: roles as resources, one stage at a time, no stealing."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import dask

from dfdask.errors import ClusterError
from dfdask.machine import Gpu, LocalWorker, check_device, gpus, host_share, local_workers
from dfdask.plugins import scheduler_plugins
from dfdask.spec import WorkerGroup
from dfdask.tags import UNKNOWN_CLASS, read_tags

if TYPE_CHECKING:
    from distributed import Nanny

SETTINGS: Mapping[str, Any] = {
    # Stage tasks are placed by the gate; stealing would only walk all workers for each of them.
    "distributed.scheduler.work-stealing": False,
    # Dask blames every task queued on a worker that dies, guilty or not.
    "distributed.scheduler.allowed-failures": 100,
    "distributed.scheduler.no-workers-timeout": None,
    "distributed.worker.daemon": True,
}
THREADS = 2  # of a worker: one for stages, one for shards that are written meanwhile
DASHBOARD_PORT = 8787  # of a local cluster, or any other where somebody has it
CONNECT_SECONDS = 10
BROKEN = "worker-handle-scheduler-connection-broken"  # Dask's words for a worker's end that nobody asked for
CLOSE_SECONDS = 30  # Dask waits 4 s for a worker, and 5 s more for one that it killed


class LocalFleet:
    """A scheduler in this process and worker processes on this machine; they end with this process.

    ``worker`` specifies more of them, for a ``cluster`` that follows its work.
    """

    def __init__(self, workers: int | Sequence[WorkerGroup] | None, device: str = "auto") -> None:
        from distributed import Scheduler, SpecCluster

        if getattr(multiprocessing.current_process(), "_inheriting", False):
            sys.exit(1)  # a worker that imports its program, which would start workers in turn: see below
        options: dict[str, Any] = {
            "nthreads": THREADS,
            "memory_limit": 0,
            "silence_logs": "ERROR",
            "preload": ["dfdask.quiet"],
        }
        found = gpus(device)
        nanny = _patient_nanny()
        self.worker: Mapping[str, Any] = {"cls": _by_gpu(nanny, found), "options": options}
        specification = {
            name: {"cls": nanny, "options": {**options, "resources": one.resources, "env": one.environment}}
            for name, one in enumerate(local_workers(workers, found))
        }
        scheduler = {
            "protocol": "tcp://",
            "host": "127.0.0.1",
            "port": 0,
            "dashboard": True,
            "dashboard_address": f"127.0.0.1:{DASHBOARD_PORT}",
            "plugins": scheduler_plugins(),
        }
        with dask.config.set(SETTINGS), _interrupts_kept_out(), warnings.catch_warnings():
            # Dask takes another port for the dashboard, and the run says which.
            warnings.filterwarnings("ignore", r"Port \d+ is already in use", UserWarning)
            try:
                self.cluster = SpecCluster(
                    workers=specification,
                    scheduler={"cls": Scheduler, "options": scheduler},
                    silence_logs="ERROR",
                )
            except RuntimeError as error:
                why = " ".join(str(error.__cause__ or error).split())[:200]
                raise ClusterError(
                    f"local workers could not start ({why}); a script must submit below "
                    "`if __name__ == '__main__':`, for its workers import it too"
                ) from None

    @property
    def address(self) -> str:
        return str(self.cluster.scheduler_address)

    def close(self) -> None:
        self.cluster.close(timeout=CLOSE_SECONDS)


def _patient_nanny() -> type[Nanny]:
    """Nannies that take a killed worker for gone: it may take the system long to free what it had on a GPU."""
    from distributed import Nanny

    class PatientNanny(Nanny):
        async def kill(self, timeout: float = 5, reason: str = "nanny-kill") -> None:
            with suppress(asyncio.TimeoutError):
                await super().kill(timeout, reason)

    return PatientNanny


def _telling_nanny() -> tuple[type[Nanny], WeakKeyDictionary[Nanny, str]]:
    """Nannies, and the reasons that their workers gave for ending for good."""
    from distributed import Nanny

    reasons: WeakKeyDictionary[Nanny, str] = WeakKeyDictionary()

    class TellingNanny(Nanny):
        def close_gracefully(self, reason: str = "nanny-close-gracefully") -> None:
            reasons[self] = reason
            super().close_gracefully(reason)

    return TellingNanny, reasons


def _by_gpu(nanny: type[Nanny], found: Sequence[Gpu]) -> type[Nanny]:
    """Nannies whose workers each compute on the GPU that the fewest of them use, but those of class ``cpu``."""
    from distributed.core import Status

    if not found:
        return nanny
    used: WeakKeyDictionary[Nanny, str] = WeakKeyDictionary()
    host = host_share(len(found))

    class NannyByGpu(nanny):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            kind, gpu = read_tags(options["resources"]).device_class, None
            if kind != UNKNOWN_CLASS:
                gone = (Status.closed, Status.failed)
                living = Counter(name for nanny, name in used.items() if nanny.status not in gone)
                gpu = used[self] = min(found, key=lambda one: living[one.name]).name
            worker = LocalWorker(device_class=kind, gpu=gpu, host_bytes=host)
            super().__init__(*args, **{**options, "env": worker.environment})

    return NannyByGpu


def run_scheduler(host: str, port: int, dashboard_address: str) -> None:
    """Serve until SIGINT or SIGTERM. Raises ClusterError where the port is taken."""
    from distributed import Scheduler

    async def serve(stopped: asyncio.Event) -> None:
        try:
            scheduler = Scheduler(
                host=host, port=port, dashboard=True, dashboard_address=dashboard_address, plugins=scheduler_plugins()
            )
            await scheduler
        except (OSError, RuntimeError) as error:  # Dask wraps the first in the second
            why = getattr(error.__cause__, "strerror", None) or error.__cause__ or error
            raise ClusterError(
                f"scheduler: cannot listen on {host}:{port} or {dashboard_address} ({why}); "
                "check --host, or choose another --port"
            ) from None
        print(f"scheduler at {scheduler.address}", flush=True)
        dashboard = scheduler.services.get("dashboard")
        if dashboard is not None:
            print(f"dashboard at http://{dashboard_address.rpartition(':')[0] or host}:{dashboard.port}/status")
        sys.stdout.flush()
        await stopped.wait()
        await scheduler.close()

    _serve(serve)


def run_worker(
    address: str,
    stages: Sequence[str] | None,
    count: int | None,
    device: str,
    device_class: str | None = None,
    memory_bytes: int | None = None,
) -> None:
    """Run ``count`` worker processes (None: one for each GPU, else one) until SIGINT, SIGTERM or the scheduler's end.

    They are tagged with the ``stages`` that they are bound to (None: the gate decides), their ``device_class``
    (None: as the GPU is called, if there is one) and the ``memory_bytes`` that they may use on it (None: what is free
    on the GPU, shared by those on it). A worker process that dies is started again. Raises ClusterError where no
    scheduler answers, and where it goes away without having asked the workers to end.
    """
    check_device(device)
    found = gpus(device)
    group = WorkerGroup(
        count=count or len(found) or 1,
        stages=list(stages) if stages else None,
        device_class=device_class,
        memory=memory_bytes,
    )

    async def serve(stopped: asyncio.Event) -> None:
        await check_scheduler(address)
        kind, reasons = _telling_nanny()
        nannies = [
            kind(
                address,
                nthreads=THREADS,
                memory_limit=0,
                resources=one.resources,
                env={"DFDASK_DEVICE": device, **one.environment},
                death_timeout=60,
            )
            for one in local_workers([group], found)
        ]
        await asyncio.gather(*nannies)
        roles = ", ".join(stages) if stages else "all stages"
        for nanny in nannies:
            print(f"worker at {nanny.worker_address} for {roles}", flush=True)
        gone: asyncio.Future[Any] = asyncio.gather(*(nanny.finished() for nanny in nannies))
        asked: asyncio.Future[Any] = asyncio.ensure_future(stopped.wait())
        await asyncio.wait([asked, gone], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*(nanny.close() for nanny in nannies), return_exceptions=True)
        if not asked.done() and any(reasons.get(nanny, BROKEN) == BROKEN for nanny in nannies):
            raise ClusterError(f"the scheduler at {address} went away; start it again, then this worker")

    _serve(serve)


async def check_scheduler(address: str) -> None:
    """Raise ClusterError unless a scheduler answers at ``address``."""
    from distributed.comm.core import connect

    try:
        # Dask's own limit does not hold for one who accepts the connection and then says nothing.
        comm = await asyncio.wait_for(connect(address, timeout=CONNECT_SECONDS), CONNECT_SECONDS + 1)
        await comm.close()
    except (OSError, ValueError, TypeError, TimeoutError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ClusterError(
            f"scheduler: nothing answers at {address!r} ({why}); "
            "start one with `dfdask scheduler`, or check the address"
        ) from None


def _serve(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    async def until_signal() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stopped.set)

        def wait() -> None:
            signal.sigwait({signal.SIGINT})
            with suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(stopped.set)

        threading.Thread(target=wait, name="dfdask-interrupt", daemon=True).start()
        await main(stopped)

    with dask.config.set(SETTINGS), _interrupts_kept_out():
        asyncio.run(until_signal())


@contextmanager
def _interrupts_kept_out() -> Iterator[None]:
    """Block SIGINT in this thread and in the threads and processes that it starts.

    A terminal sends Ctrl-C to every process of a job. Workers must not die of it: who started them ends them, when
    what they are doing is saved.
    """
    resource_tracker.ensure_running()  # started later it would unblock SIGINT in the thread that needs it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
