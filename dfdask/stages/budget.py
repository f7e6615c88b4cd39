"""How much memory this process may use on its device and on the host, and what a call takes of it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from dfdask.errors import ClusterError

MEMORY_BYTES, HOST_MEMORY_BYTES = "DFDASK_MEMORY_BYTES", "DFDASK_HOST_MEMORY_BYTES"
"""Environment variables: how much of its device's memory, and of the host's, this process may use."""
RESERVE_BYTES = 1 << 30
"""Of the device's free memory, for what others and the driver take later."""
HOST_PART = 0.8
_told: dict[str, int] = {}


def budgets(device: str) -> tuple[int, int]:
    """Bytes on the device and on the host: as ``allowed``, else from what is there. Raises ClusterError.

    Sets up CUDA's allocator, so that what the environment says is a limit and not a wish.
    """
    limit = bytes_of(MEMORY_BYTES)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    host = allowed(HOST_MEMORY_BYTES) or int(physical * HOST_PART)
    if device != "cuda":
        host = min(allowed(MEMORY_BYTES) or host, host)
        return host, host
    import torch

    with suppress(AttributeError, RuntimeError):  # one address range that grows: no holes between large buffers
        usual = torch.cuda.memory._set_allocator_settings
        getattr(torch._C, "_accelerator_setAllocatorSettings", usual)("expandable_segments:True")
    free, total = torch.cuda.mem_get_info()
    if limit is None:  # others may have taken some since the worker said what there is
        return min(allowed(MEMORY_BYTES) or free, usable_bytes(free)), host
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
    return min(limit, total), host


def usable_bytes(free_bytes: int) -> int:
    """What a process may use of a device's free memory."""
    return max(free_bytes - RESERVE_BYTES, free_bytes // 2)


def allow(variable: str, nbytes: int) -> None:
    """What this process may use unless the environment says otherwise; the first word holds."""
    _told.setdefault(variable, nbytes)


def allowed(variable: str) -> int | None:
    """What this process may use by the environment or as ``allow`` was told. Raises ClusterError."""
    return bytes_of(variable) or _told.get(variable)


class Measured:
    """What a call took: device memory beyond what was taken before, and seconds by the device's own clock.

    Both are 0 where the device does not tell.
    """

    def __init__(self, device: str) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self._is_gpu = device == "cuda"
        self._before = 0
        self._began: Any = None

    def __enter__(self) -> Measured:
        if self._is_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_gpu and error[0] is None:
            import torch

            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            ended.synchronize()
            self.seconds = self._began.elapsed_time(ended) / 1000
            self.bytes = torch.cuda.max_memory_allocated() - self._before


def bytes_of(variable: str) -> int | None:
    """The number of bytes in an environment variable, None where it is not set. Raises ClusterError."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ClusterError(f"{variable}: must be a number of bytes, got {text!r}; write e.g. {24 * 2**30}")
    return value
