"""The cluster that one job runs on."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from dfdask.errors import ClusterError, SpecError

if TYPE_CHECKING:
    from distributed import Client

    from dfdask.scale_spec import Scale
    from dfdask.spec import JobSpec


class JobCluster:
    """The cluster of one job: the user's own, or one that is started and closed here."""

    def __init__(self, client: Client | None, scheduler: str | None, spec: JobSpec) -> None:
        self._given = client
        self._scheduler = scheduler
        self._workers, self._device = spec.workers, spec.device
        self._scale = spec.scale
        self._elastic: Any = None
        self._preload = isinstance(spec.model, str)
        self._client: Client | None = None
        self._fleet: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._open, name="dfdask-cluster", daemon=True)

    @property
    def is_local(self) -> bool:
        """Whether the job starts its own workers."""
        return self._given is None and self._scheduler is None

    @property
    def ready(self) -> bool:
        return self._client is not None

    @property
    def dashboard(self) -> str | None:
        link = getattr(self._client, "dashboard_link", None)
        return str(link) if link else None

    def start(self) -> None:
        """Begin to open it, beside what its job does meanwhile; who asks for the client begins it too."""
        if self._thread.ident is None:
            self._thread.start()

    def client(self) -> Client:
        """Wait for the client. Raises ClusterError."""
        self.start()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._client is None:
            raise ClusterError("the cluster was closed")
        return self._client

    def worker_count(self) -> int:
        """How many workers there are, with those that were started here and are not there yet; at least 1."""
        there = len(self.client().scheduler_info(n_workers=-1)["workers"])
        return max(there, len(self._fleet.cluster.worker_spec) if self._fleet is not None else 0, 1)

    def close(self) -> None:
        """Close what was opened here; the user's own client stays."""
        if self._thread.ident is None:
            return
        self._thread.join()
        if self._elastic is not None and self._fleet is not None:
            self._elastic.stop("the job ended")  # on the user's own it goes on, so that what came for the job leaves
        if self._client is not None and self._client is not self._given:
            self._client.close(timeout=5)
        if self._fleet is not None:
            self._fleet.close()
        self._client = self._fleet = None

    def _open(self) -> None:
        try:
            if self._scale is not None and (self._scheduler or (self._given and self._given.cluster is None)):
                raise SpecError(
                    "scale: this process did not start the cluster and cannot grow it; leave `scale` out, or give the "
                    "client of a cluster object: dfdask.submit(job, client=Client(cluster))"
                )
            client = self._given or self._connect()
            if self._scale is not None:
                self._follow(self._given.cluster if self._given else self._fleet.cluster, self._scale)
            self._client = client
        except BaseException as error:
            self._error = error

    def _connect(self) -> Client:
        from distributed import Client

        from dfdask.cluster import LocalFleet, check_scheduler

        address = self._scheduler
        if address is None:
            self._fleet = LocalFleet(self._workers if self._scale is None else [], self._device)
            address = self._fleet.address
        else:
            asyncio.run(check_scheduler(address))  # a client that cannot connect leaves a traceback behind
        client = Client(address, timeout=10, set_as_default=False, name="dfdask")
        if self._preload and self._fleet is not None:
            from dfdask.worker import Preload

            client.register_plugin(Preload())
        return client

    def _follow(self, cluster: Any, scale: Scale) -> None:
        from dfdask.elastic import adapt, classes_of, is_followed

        if is_followed(cluster):
            raise SpecError(
                "scale: this cluster follows its work already, as adapt() was told; leave `scale` out, or call "
                "stop() of what adapt() returned"
            )
        options = {} if self._fleet is None else dict.fromkeys(scale.classes("max"), self._fleet.worker)
        self._elastic = adapt(cluster, classes_of(scale), deadline=scale.deadline, budget=scale.budget, options=options)
        self._elastic.of_a_job = True
