"""Starting and stopping workers of a class by name: one protocol over the clusters that Dask has.

``SpecCluster``s name their workers themselves: LocalCluster, SSHCluster, dask-jobqueue and dask-cloudprovider. The
Kubernetes operator and dask-gateway only take numbers: what is to leave is closed by name first, then the number is
lowered to what is left, so that they choose nobody.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from distributed.core import Status

from dfdask.errors import ClusterError

logger = logging.getLogger("dfdask.backends")
CLASS = "class:"
"""The resource that tags a worker with its class."""


def class_resources(name: str, memory_bytes: int = 0) -> dict[str, float]:
    """The resources of a worker of class ``name``."""
    return {CLASS + name: 1, **({"memory": memory_bytes} if memory_bytes else {})}


class Backend:
    """What ``Elastic`` needs of a cluster. ``classes`` are the resources of a worker by class.

    ``options`` by class say how its workers differ, in the words of the cluster's own package.
    """

    closes_by_itself = True  # a worker that the scheduler tells to close is gone, and nobody starts it again

    def __init__(
        self, cluster: Any, classes: Mapping[str, Mapping[str, float]], options: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.cluster = cluster
        self.classes, self.options = classes, options

    @property
    def loop(self) -> Any:
        return self.cluster.loop

    @property
    def scheduler_comm(self) -> Any:
        return self.cluster.scheduler_comm

    @property
    def status(self) -> Status:
        found = self.cluster.status
        return Status[found] if isinstance(found, str) and found in Status.__members__ else found

    def owner(self, worker: str) -> str | None:
        """The class of a worker that was started here, by its name; None: somebody else's."""
        raise NotImplementedError

    def planned(self, name: str) -> int:
        """How many workers of the class were asked for and not stopped."""
        raise NotImplementedError

    async def start(self, name: str, count: int) -> None:
        """Ask for ``count`` more; they come when they come. Raises what the cluster raises."""
        raise NotImplementedError

    async def stop(self, name: str, workers: Sequence[str], pending: int, present: set[str]) -> None:
        """End these, which have nothing left to do, and ``pending`` others that are not ``present`` yet.

        They are not ``planned`` any more before this first gives way to others.
        """
        raise NotImplementedError

    def dead(self, name: str) -> list[str]:
        """Of those planned who has ended by itself, as far as the cluster knows; most are seen to be lost anyway."""
        return []

    async def lost(self, name: str, workers: Sequence[str], present: set[str]) -> None:
        """These were there and are gone. By default the cluster itself replaces them."""


class SpecBackend(Backend):
    """Any ``SpecCluster``: its ``worker_spec`` says by name who should be there."""

    def __init__(
        self, cluster: Any, classes: Mapping[str, Mapping[str, float]], options: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(cluster, classes, options)
        self._numbers = itertools.count()
        self._models = {name: self._model(options.get(name, {})) for name in classes}
        self._class: dict[Any, str] = {}
        for key, spec in cluster.worker_spec.items():
            tagged = [name for name in classes if CLASS + name in str(spec.get("options", {}))]
            if tagged or len(classes) == 1:
                self._class[key] = (tagged or list(classes))[0]

    def _model(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The specification that workers of a class are copied from."""
        if "cls" in options:
            return dict(options)
        known = self.cluster.new_spec or next(iter(self.cluster.worker_spec.values()), None)
        if known is None:
            raise ClusterError(
                f"scale: {type(self.cluster).__name__} does not say what its workers are; give the options of each "
                "class as {'cls': ..., 'options': {...}}"
            )
        return {**known, "options": _merged(known.get("options", {}), options)}

    def owner(self, worker: str) -> str | None:
        return next((name for key, name in self._class.items() if self._worker_name(key) == worker), None)

    def planned(self, name: str) -> int:
        return sum(kind == name for key, kind in self._class.items() if key in self.cluster.worker_spec)

    def dead(self, name: str) -> list[str]:
        cluster = self.cluster
        # Dask drops the process of a worker that it has missed for a while, and keeps its specification. One that is
        # being started has no process yet either.
        starting = cluster._correct_state_waiting is not None or cluster._lock.locked()
        gone = []
        for key, kind in self._class.items():
            process = cluster.workers.get(key)
            ended = not starting if process is None else process.status in (Status.closed, Status.failed)
            if ended and kind == name and key in cluster.worker_spec:
                gone.append(self._worker_name(key))
        return gone

    async def start(self, name: str, count: int) -> None:
        for _ in range(count):
            key = next(k for k in (f"{name}-{n}" for n in self._numbers) if k not in self.cluster.worker_spec)
            spec = self._spec(name, key)
            if spec is None:
                logger.warning("no host is left for another worker of class %s", name)
                break
            self._class[key] = name
            self.cluster.worker_spec[key] = spec
        try:
            await asyncio.shield(self.cluster._correct_state())
        except Exception:
            await self._forget_failed()
            raise

    async def stop(self, name: str, workers: Sequence[str], pending: int, present: set[str]) -> None:
        keys = [key for key in self._class if self._worker_name(key) in set(workers)]
        if pending:
            waiting = [k for k, kind in self._class.items() if kind == name and self._worker_name(k) not in present]
            keys += waiting[-pending:]
        for key in keys:
            self.cluster.worker_spec.pop(key, None)
            self._class.pop(key, None)
        await asyncio.shield(self.cluster._correct_state())

    async def lost(self, name: str, workers: Sequence[str], present: set[str]) -> None:
        # Dask would wait for the same name; what took its place at the cloud or queue is a new worker anyway.
        for key in [key for key in self._class if self._worker_name(key) in set(workers)]:
            self.cluster.worker_spec.pop(key, None)
            del self._class[key]
            process = self.cluster.workers.pop(key, None)
            if process is not None:  # a machine may take minutes to end: the cluster waits for that when it closes
                self.cluster._futures.add(asyncio.ensure_future(_end(process)))

    def _worker_name(self, key: Any) -> str:
        """As the scheduler knows it: machines of dask-cloudprovider choose their own."""
        return str(getattr(self.cluster.workers.get(key), "name", None) or key)

    async def _forget_failed(self) -> None:
        """Dask keeps a worker that could not be started in its plan, and never tries again."""
        for key, worker in list(self.cluster.workers.items()):
            if key in self._class and worker.status in (Status.created, Status.failed, Status.closed):
                self.cluster.worker_spec.pop(key, None)
                self._class.pop(key, None)
                self.cluster.workers.pop(key, None)
                self.cluster._created.discard(worker)  # which Dask would take for one that it cannot end

    def _spec(self, name: str, key: str) -> dict[str, Any] | None:
        """The model with the tags of its class, put where this kind of worker takes them; None: no host is free."""
        model = self._models[name]
        options = {option: value for option, value in model.get("options", {}).items() if option != "hosts"}
        resources = dict(self.classes[name])
        origin = _origin(model["cls"])
        if origin == "distributed.deploy.ssh":
            host = self._free_host(name)
            if host is None:
                return None
            # Without a name of its own the remote worker has its address for a name, and nobody can find it.
            given = options.get("kwargs", {})
            options["kwargs"] = {**given, "name": key, "resources": {**given.get("resources", {}), **resources}}
            options["address"] = host
        elif origin.startswith("dask_jobqueue."):
            text = ",".join(f"{tag}={amount:g}" for tag, amount in resources.items())
            options["worker_extra_args"] = [*(options.get("worker_extra_args") or ()), "--resources", text]
            options["processes"] = 1  # a job is a worker: one that is stopped takes nobody with it
        elif origin.startswith("dask_cloudprovider."):
            given = options.get("worker_options") or {}
            options["worker_options"] = {**given, "resources": {**given.get("resources", {}), **resources}}
        else:
            options["resources"] = {**options.get("resources", {}), **resources}
        return {"cls": model["cls"], "options": options}

    def _free_host(self, name: str) -> str | None:
        hosts = self.options.get(name, {}).get("hosts") or [self._models[name]["options"]["address"]]
        used = Counter(spec["options"].get("address") for spec in self.cluster.worker_spec.values())
        return next((host for host in hosts if used[host] < hosts.count(host)), None)


async def _end(process: Any) -> None:
    with suppress(Exception):  # it is gone, and some complain that they cannot end it
        await process.close()


class KubernetesBackend(Backend):
    """The operator's ``KubeCluster``: a worker group for each class. A worker is a deployment of its name."""

    closes_by_itself = False  # the pod would start it again

    def __init__(
        self, cluster: Any, classes: Mapping[str, Mapping[str, float]], options: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(cluster, classes, options)
        self._counts: Counter[str] = Counter()
        self._made: set[str] = set()
        self._groups = {name: re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") for name in classes}

    def owner(self, worker: str) -> str | None:
        start = "{}-{}-worker-".format
        found = (name for name, group in self._groups.items() if worker.startswith(start(self.cluster.name, group)))
        return next(found, None)

    def planned(self, name: str) -> int:
        return self._counts[name]

    async def start(self, name: str, count: int) -> None:
        total = self._counts[name] = self._counts[name] + count
        try:
            await self._set(name, total)
        except BaseException:
            self._counts[name] -= count
            raise

    async def _set(self, name: str, total: int) -> None:
        if name in self._made:
            await _done(self.cluster.scale(total, worker_group=self._groups[name]))
        else:
            tags = ",".join(f"{tag}={amount:g}" for tag, amount in self.classes[name].items())
            options = dict(self.options.get(name, {}))
            command = options.pop("worker_command", None) or "dask-worker"
            words = command.split() if isinstance(command, str) else list(command)
            # A number of 0 would mean the cluster's default, so the group is made with its first worker.
            options.update(name=self._groups[name], n_workers=total, worker_command=[*words, "--resources", tags])
            await _done(self.cluster.add_worker_group(**options))
            self._made.add(name)

    async def stop(self, name: str, workers: Sequence[str], pending: int, present: set[str]) -> None:
        self._counts[name] = max(self._counts[name] - len(workers) - pending, 0)
        deployments = await self.deployments(name)
        waiting = [key for key in deployments if key not in present and key not in workers]
        going = [*workers, *(waiting[-pending:] if pending else ())]
        for key in going:
            if key in deployments:
                await deployments[key].delete()
        # There are as many now, so the operator looks for nobody to retire.
        await _done(self.cluster.scale(self._counts[name], worker_group=self._groups[name]))

    async def deployments(self, name: str) -> dict[str, Any]:
        """The class's deployments by name, oldest first."""
        import kr8s

        label = {"dask.org/workergroup-name": f"{self.cluster.name}-{self._groups[name]}"}
        found = kr8s.asyncio.get("deployments", namespace=self.cluster.namespace, label_selector=label)
        entries = [entry async for entry in found]
        return {entry.name: entry for entry in sorted(entries, key=lambda one: str(one.metadata.creationTimestamp))}


class GatewayBackend(Backend):
    """A ``GatewayCluster``: one class, whose options the cluster was made with."""

    def __init__(
        self, cluster: Any, classes: Mapping[str, Mapping[str, float]], options: Mapping[str, Mapping[str, Any]]
    ) -> None:
        if len(classes) != 1 or any(options.values()):
            raise ClusterError(
                f"scale: a gateway's cluster has workers of one class, got {', '.join(classes)}; give their options "
                "to Gateway.new_cluster, and make a cluster for each class"
            )
        super().__init__(cluster, classes, options)
        self._count = 0

    def owner(self, worker: str) -> str | None:
        return next(iter(self.classes))

    def planned(self, name: str) -> int:
        return self._count

    async def start(self, name: str, count: int) -> None:
        await self._scale(self._count + count)

    async def stop(self, name: str, workers: Sequence[str], pending: int, present: set[str]) -> None:
        # The gateway would choose who leaves; the scheduler has closed these already, within the gateway's three
        # seconds before it looks at what is gone, so the new number is what is left.
        await self._scale(max(self._count - len(workers) - pending, 0))

    async def _scale(self, count: int) -> None:
        self._count = count
        await _done(await asyncio.to_thread(self.cluster.scale, count))  # it would block its own loop


def backend_for(
    cluster: Any,
    classes: Mapping[str, Mapping[str, float]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Backend:
    """The adapter for this cluster. Raises ClusterError where there is none."""
    from distributed import SpecCluster

    made: type[Backend]
    if isinstance(cluster, SpecCluster):
        made = SpecBackend
    elif _origin(cluster.__class__).startswith("dask_kubernetes."):
        made = KubernetesBackend
    elif _origin(cluster.__class__).startswith("dask_gateway."):
        made = GatewayBackend
    else:
        raise ClusterError(
            f"scale: cannot start workers on a {cluster.__class__.__name__}; use a LocalCluster, SSHCluster, or one of "
            "dask-jobqueue, dask-kubernetes, dask-cloudprovider or dask-gateway"
        )
    return made(cluster, classes, options or {})


def _origin(kind: Any) -> str:
    """The module of a class's first ancestor outside of the standard library that is from a package named here."""
    if isinstance(kind, str):
        return kind.rpartition(".")[0]
    for ancestor in inspect.getmro(kind):
        if ancestor.__module__.startswith(("dask_", "distributed.deploy.ssh")):
            return ancestor.__module__
    return str(kind.__module__)


def _merged(known: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(known)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


async def _done(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
