"""Tensors that move between host and device together, as one transfer at the link's full speed.

Weights are only read, so nothing is ever copied back: leaving the device means pointing the parameters at the host's
copy again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_ALIGNMENT = 256


class Unit:
    """Tensors that move together."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._kinds = [(tensor.dtype, tensor.shape) for tensor in self._tensors]
        self._offsets: list[int] = []
        self.nbytes = 0
        for tensor in self._tensors:
            self._offsets.append(self.nbytes)
            self.nbytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.host: torch.Tensor | None = None
        self.device: torch.Tensor | None = None

    def pack(self, pinned: bool) -> None:
        """Copy the tensors from wherever they are, a mapped file as a rule, into one buffer."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            view.copy_(tensor.detach())
        if pinned and self.nbytes:
            _page_lock(self, buffer)
        self.host = buffer
        self.point(buffer)

    def load(self, device: torch.device) -> None:
        """Be on ``device``, by a copy in order with what is computed there."""
        if self.device is None and self.host is not None:
            self.device = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            self.device.copy_(self.host, non_blocking=True)
            self.point(self.device)

    def drop(self) -> None:
        """Leave the device: nothing is copied."""
        if self.host is not None:
            self.point(self.host)
        self.device = None

    def point(self, buffer: torch.Tensor) -> None:
        """Let the tensors be views of ``buffer``, which may be larger."""
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        for offset, (dtype, shape) in zip(self._offsets, self._kinds, strict=True):
            size = shape.numel() * dtype.itemsize
            yield buffer[offset : offset + size].view(dtype).view(shape)


def _page_lock(owner: Any, buffer: torch.Tensor) -> None:
    """Registered, not allocated by torch, whose pinned buffers grow to the next power of two."""
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status:
        raise MemoryError(f"{buffer.nbytes / 1e9:.2f} GB of host memory cannot be page-locked (CUDA error {status})")
    # It holds the buffer: the pages are unlocked before they can be freed.
    finalizer = weakref.finalize(owner, _unlock, runtime, buffer)
    finalizer.atexit = False


def _unlock(runtime: Any, buffer: torch.Tensor) -> None:
    runtime.cudaHostUnregister(buffer.data_ptr())
