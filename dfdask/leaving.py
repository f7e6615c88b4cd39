"""What has to be done first when a program ends while its jobs go on."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from weakref import WeakMethod


def before_exit(method: Callable[[], None]) -> None:
    """Call ``method``, unless its object is gone by then, when the program's main thread has ended.

    ``atexit`` would be too late: by then thread pools are closed, and Dask can do nothing any more. The hook of
    ``threading`` that ``concurrent.futures`` uses for that runs the last one first.
    """
    found = WeakMethod(method)

    def call() -> None:
        if (still := found()) is not None:
            still()

    getattr(threading, "_register_atexit", atexit.register)(call)
