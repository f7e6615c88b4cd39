"""The adapters on the real classes of each package, with real processes wherever those can run on one machine."""

from __future__ import annotations

import asyncio
import inspect
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import dask
import psutil
import pytest
from distributed import Client
from fleet import ROOT, until
from forecaster import Forecaster
from test_elastic import by_class, submit

from dfdask import elastic as elastic_module
from dfdask.backends import GatewayBackend, KubernetesBackend, backend_for, class_resources
from dfdask.cluster import SETTINGS
from dfdask.elastic import adapt
from dfdask.errors import ClusterError
from dfdask.fleets import WorkerClass

SECONDS = {"denoise": {"big": 0.1, "small": 0.1}}
WAIT = 120.0  # a worker's Python takes long to start on a busy machine
BIG = [WorkerClass("big", 2, 0, 1.0, 2.0)]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are programs of their own find the tests' modules too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


@contextmanager
def watched(cluster: Any) -> Iterator[Client]:
    """A client of the cluster, whose scheduler tells what is left."""
    with Client(cluster) as client:
        client.register_plugin(Forecaster(SECONDS))
        yield client


def follows(cluster: Any, client: Client, folder: Path, **how: Any) -> None:
    """Two workers come for the work and leave after it, and each is known by name."""
    follower = adapt(cluster, BIG, deadline=9.0, interval=0.3, patience=0.6, **how)
    futures = submit(client, folder, 120, 0.1)
    until(lambda: by_class(cluster)["big"] == 2, WAIT, "two workers of the class")
    names = {str(info["name"]) for info in cluster.scheduler_info["workers"].values()}
    assert {follower.backend.owner(name) for name in names} == {"big"}
    assert client.gather(futures) == list(range(120))
    del futures
    until(lambda: not cluster.scheduler_info["workers"] and not cluster.worker_spec, WAIT, "both to leave")
    until(lambda: not cluster.workers, WAIT, "their processes to end")
    follower.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its own jobs unwaited for
def test_dask_jobqueue_runs_a_job_for_each_worker_and_replaces_one_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobqueue = pytest.importorskip("dask_jobqueue.local")
    monkeypatch.setattr(elastic_module, "LOST_SECONDS", 1.0)
    with (
        dask.config.set(SETTINGS),
        jobqueue.LocalCluster(
            cores=1,
            processes=1,
            memory="1GB",
            death_timeout=120,
            log_directory=str(tmp_path),
            local_directory=str(tmp_path),
            scheduler_options={"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
        ) as cluster,
        watched(cluster) as client,
    ):
        follower = adapt(cluster, BIG, deadline=9.0, interval=0.3, patience=3.0)
        futures = submit(client, tmp_path, 120, 0.1)
        until(lambda: len(cluster.workers) == 2 and by_class(cluster)["big"] == 2, WAIT, "two jobs")
        key = next(iter(cluster.workers))
        nanny = psutil.Process(int(cluster.workers[key].job_id))
        for process in [*nanny.children(recursive=True), nanny]:
            process.send_signal(signal.SIGKILL)  # as a queue does to a job that is pre-empted
        until(lambda: key not in cluster.worker_spec, WAIT, "the job to be given up")
        assert client.gather(futures) == list(range(120))
        assert key not in cluster.worker_spec and follower.decision is not None
        del futures
        until(lambda: not cluster.workers and not cluster.worker_spec, WAIT, "the jobs to end")
        follower.stop()


def test_slurm_jobs_say_their_class_and_ask_for_their_own_machines() -> None:
    jobqueue = pytest.importorskip("dask_jobqueue")
    options = {
        "h100": {"queue": "gpu", "job_extra_directives": ["--gres=gpu:h100:1"]},
        "l4": {"queue": "small"},
    }
    with jobqueue.SLURMCluster(
        cores=4,
        processes=2,
        memory="16GB",
        interface="lo",
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
    ) as cluster:
        classes = {"h100": class_resources("h100", 80 * 10**9), "l4": class_resources("l4")}
        backend = backend_for(cluster, classes, options)
        scripts = {}
        for name in options:
            spec = backend._spec(name, f"{name}-0")  # type: ignore[attr-defined]
            scripts[name] = spec["cls"]("tcp://127.0.0.1:8786", name=f"{name}-0", **spec["options"]).job_script()
        assert "#SBATCH -p gpu" in scripts["h100"] and "#SBATCH --gres=gpu:h100:1" in scripts["h100"]
        assert "--resources class:h100=1,memory=8e+10" in scripts["h100"] and "--name h100-0" in scripts["h100"]
        assert "#SBATCH -p small" in scripts["l4"] and "gres" not in scripts["l4"]
        assert "--nworkers 2" not in scripts["l4"], "one worker a job, or its neighbour would leave with it"


@pytest.fixture
def ssh() -> Iterator[dict[str, Any]]:
    """How to connect to an SSH server of this process, which runs what it is asked to; with keys of its own."""
    asyncssh = pytest.importorskip("asyncssh")
    key = asyncssh.generate_private_key("ssh-ed25519")
    ready, port = threading.Event(), 0
    loop = asyncio.new_event_loop()

    async def serve_process(process: Any) -> None:
        child = await asyncio.create_subprocess_shell(
            process.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            await process.redirect(stdout=child.stdout, stderr=child.stderr)
            process.exit(await child.wait())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()

    async def listen() -> Any:
        nonlocal port
        authorized = asyncssh.import_authorized_keys(key.export_public_key().decode())
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[key], authorized_client_keys=authorized, process_factory=serve_process
        )
        port = server.get_port()
        ready.set()
        return server

    async def end(server: Any) -> None:
        server.close()
        await server.wait_closed()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(20)
    yield {"port": port, "known_hosts": None, "client_keys": [key], "username": "test", "config": None}
    asyncio.run_coroutine_threadsafe(end(server), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ssh_uses_free_hosts_and_knows_its_workers_by_name(tmp_path: Path, ssh: dict[str, Any]) -> None:
    from distributed import SSHCluster

    with (
        dask.config.set(SETTINGS),
        SSHCluster(
            ["127.0.0.1", "127.0.0.1"],
            connect_options=ssh,
            worker_options={"nthreads": 1},
            scheduler_options={"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"},
        ) as cluster,
        watched(cluster) as client,
    ):
        model = next(iter(cluster.worker_spec.values()))
        # The end of a connection alone ends no process at the other side of it.
        client.wait_for_workers(1, timeout=WAIT)
        client.retire_workers(list(client.scheduler_info()["workers"]), close_workers=True, remove=True)
        cluster.sync(cluster.scale_down, list(cluster.worker_spec))
        until(lambda: not cluster.scheduler_info["workers"], WAIT, "the worker that was there before to leave")
        # Two names of one machine stand for two machines here.
        follows(cluster, client, tmp_path, options={"big": {**model, "hosts": ["127.0.0.1", "localhost"]}})


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # its probe of the scheduler's port
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_machines_of_dask_cloudprovider_choose_their_names_and_are_found_by_them(tmp_path: Path) -> None:
    vmcluster = pytest.importorskip("dask_cloudprovider.generic.vmcluster")

    class Machine(vmcluster.VMInterface):  # type: ignore[misc, name-defined]
        """A machine of the cloud that is a process here; all else is the package's own."""

        def __init__(self, cluster: Any = None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.cluster = cluster
            self._process: Any = None

        async def create_vm(self) -> tuple[str, None]:
            # The command is written for a YAML file, where two quotes stand for one.
            words = shlex.split(self.command.replace("''", "'"))
            words[words.index("python")] = sys.executable
            self._process = await asyncio.create_subprocess_exec(
                *words, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            return "127.0.0.1", None

        async def destroy_vm(self) -> None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            await self._process.wait()

    class MachineScheduler(vmcluster.SchedulerMixin, Machine):  # type: ignore[misc, name-defined]
        pass

    class MachineWorker(vmcluster.WorkerMixin, Machine):  # type: ignore[misc, name-defined]
        pass

    class MachineCluster(vmcluster.VMCluster):  # type: ignore[misc, name-defined]
        def __init__(self, **kwargs: Any) -> None:
            self.scheduler_class, self.worker_class = MachineScheduler, MachineWorker
            self.options = {"cluster": self}
            self.scheduler_options, self.worker_options = {**self.options}, {**self.options}
            super().__init__(**kwargs)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scheduler = {"port": port, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(SETTINGS),
        MachineCluster(security=False, scheduler_options=scheduler, worker_options={"nthreads": 1}) as cluster,
        watched(cluster) as client,
    ):
        follows(cluster, client, tmp_path)


def test_the_kubernetes_operator_is_asked_by_group_and_never_chooses_who_leaves() -> None:
    kubernetes = pytest.importorskip("dask_kubernetes.operator")
    cluster = create_autospec(kubernetes.KubeCluster, instance=True)
    cluster.name, cluster.namespace = "render", "default"
    backend = backend_for(cluster, {"H100_big": class_resources("H100_big")}, {"H100_big": {"image": "dfdask:1"}})
    assert isinstance(backend, KubernetesBackend)

    deployments: dict[str, Any] = {f"render-h100-big-worker-{n}": AsyncMock() for n in range(4)}
    backend.deployments = AsyncMock(return_value=deployments)  # type: ignore[method-assign]

    async def use() -> None:
        await backend.start("H100_big", 2)
        await backend.start("H100_big", 2)
        assert backend.planned("H100_big") == 4
        present = {"render-h100-big-worker-0", "render-h100-big-worker-1", "render-h100-big-worker-2"}
        await backend.stop("H100_big", ["render-h100-big-worker-1"], 1, present)

    asyncio.run(use())
    command = ["dask-worker", "--resources", "class:H100_big=1"]
    cluster.add_worker_group.assert_called_once_with(
        name="h100-big", n_workers=2, worker_command=command, image="dfdask:1"
    )
    assert [call.args + tuple(call.kwargs.values()) for call in cluster.scale.call_args_list] == [
        (4, "h100-big"),
        (2, "h100-big"),
    ]
    gone = {name for name, deployment in deployments.items() if deployment.delete.called}
    assert gone == {"render-h100-big-worker-1", "render-h100-big-worker-3"}, "the one that left, and one not there yet"
    assert backend.owner("render-h100-big-worker-7f") == "H100_big"
    assert backend.owner("render-default-worker-7f") is None
    assert not backend.closes_by_itself
    # The operator names the worker after its deployment, in these words.
    from dask_kubernetes.operator.kubecluster.kubecluster import make_worker_spec

    arguments = make_worker_spec(worker_command=command)["spec"]["containers"][0]["args"]
    assert arguments[:5] == [*command, "--name", "$(DASK_WORKER_NAME)"]


def test_a_gateway_is_given_numbers() -> None:
    gateway = pytest.importorskip("dask_gateway")
    cluster = create_autospec(gateway.GatewayCluster, instance=True)
    cluster.status = "running"
    backend = backend_for(cluster, {"big": {}})
    assert isinstance(backend, GatewayBackend) and backend.status.name == "running"
    assert "n" in inspect.signature(gateway.GatewayCluster.scale).parameters

    async def use() -> None:
        await backend.start("big", 3)
        await backend.stop("big", ["a"], 1, {"a", "b"})

    asyncio.run(use())
    assert [call.args for call in cluster.scale.call_args_list] == [(3,), (1,)]
    with pytest.raises(ClusterError, match="workers of one class, got big, small"):
        backend_for(cluster, {"big": {}, "small": {}})
