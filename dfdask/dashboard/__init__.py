"""The dfdask page of Dask's dashboard, and the scheduler's metrics for Prometheus."""

from dfdask.dashboard.plugin import Dashboard

__all__ = ["Dashboard"]
