"""The scheduler plugin that adds the page and the metrics. Nothing that goes wrong here stops a job."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin

from dfdask.gate import NAME as GATE

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

    from dfdask.dashboard.metrics import SchedulerMetrics
    from dfdask.dashboard.sampler import Sampler

logger = logging.getLogger(__name__)

PAGE = "dfdask"


class Dashboard(SchedulerPlugin):
    """Adds the tab ``dfdask`` to Dask's dashboard and ``dfdask_*`` to the scheduler's ``/metrics``."""

    name = "dfdask-dashboard"
    idempotent = True

    def __init__(self) -> None:
        self.sampler: Sampler | None = None
        self._metrics: SchedulerMetrics | None = None

    async def start(self, scheduler: Scheduler) -> None:
        try:
            from dfdask.dashboard.sampler import Sampler

            self.sampler = Sampler(scheduler)
            if hasattr(scheduler, "http_application"):
                self._add_page(scheduler)
        except Exception:
            logger.warning("dfdask: no page in the dashboard", exc_info=True)
        try:
            self._add_metrics(scheduler)
        except Exception:
            logger.warning("dfdask: no metrics", exc_info=True)

    async def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
        if self._metrics is not None:
            self._metrics.unregister()
            self._metrics = None

    def _add_page(self, scheduler: Scheduler) -> None:
        """As ``distributed.dashboard.scheduler.connect`` adds Dask's own pages."""
        from distributed.dashboard.core import BokehApplication
        from distributed.dashboard.scheduler import template_variables
        from tornado.ioloop import IOLoop

        pages = [app for app in scheduler.http_application.applications if hasattr(app, "app_paths")]
        if not pages:  # started with dashboard=False
            return
        variables = template_variables(scheduler)  # one dict for all pages: a tab added here appears on each
        prefix = pages[0].prefix

        def fill(server: Any, extra: Any, document: Any) -> None:
            assert self.sampler is not None
            self.sampler.open(document, extra)

        application = BokehApplication({f"/{PAGE}": fill}, scheduler, prefix=prefix, template_variables=variables)
        scheduler.http_application.add_application(application)
        application.initialize(IOLoop.current())
        application.start()
        if PAGE not in variables["pages"]:
            variables["pages"].insert(1, PAGE)

    def _add_metrics(self, scheduler: Scheduler) -> None:
        """To the process's registry, which is what Dask serves as ``/metrics``."""
        from dfdask.dashboard.metrics import SchedulerMetrics

        sampler = self.sampler
        metrics = SchedulerMetrics(
            gate=lambda: scheduler.plugins.get(GATE),
            page_seconds=lambda: sampler.spent.seconds if sampler is not None else 0.0,
        )
        metrics.register()
        self._metrics = metrics
