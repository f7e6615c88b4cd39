"""A component's weights: packed once into host memory, and on the device as a whole, in part, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from dfdask.blocks import LARGEST_PART
from dfdask.stages.packing import Unit
from dfdask.stages.streaming import Streamer

_FILLING_THREADS = 8


class Weights:
    """All parameters and buffers of one component, by the blocks that it repeats and the rest, its core.

    With ``unified`` host and device are the same memory: nothing is packed, and nothing ever moves.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device, unified: bool) -> None:
        self.name = name
        # Parameters keep their requires_grad: without it some CPU kernels are others, and so are the last bits.
        self.module = module.eval()
        self._device = device
        self._unified = unified
        self._on_device = unified
        self._streamer: Streamer | None = None
        found = find_blocks(module)
        seen: set[int] = set()
        shared = _shared(found)
        self._blocks = [(block, Unit(_tensors(block, seen | shared))) for block in found]
        for block, _ in self._blocks:
            seen.update(id(tensor) for tensor in _all_tensors(block) if id(tensor) not in shared)
        self._core = Unit(_tensors(module, seen))
        if not unified:
            self._pack()

    @property
    def nbytes(self) -> int:
        return self._core.nbytes + sum(self.block_bytes)

    @property
    def core_bytes(self) -> int:
        return self._core.nbytes

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Of each block that can be streamed, in the order in which they are defined."""
        return tuple(unit.nbytes for _, unit in self._blocks)

    @property
    def device_bytes(self) -> int:
        """What is taken on the device now."""
        if self._unified:
            return self.nbytes
        units = [self._core, *(unit for _, unit in self._blocks)]
        slots = self._streamer.device_bytes if self._streamer else 0
        return sum(unit.nbytes for unit in units if unit.device is not None) + slots

    @property
    def streamed(self) -> tuple[int, ...]:
        """The blocks that are streamed now."""
        return self._streamer.numbers if self._streamer else ()

    @property
    def on_device(self) -> bool:
        """Ready to run: what is not there is streamed."""
        return self._on_device

    def place(self, streamed: Sequence[int] = ()) -> None:
        """Be on the device, with these blocks streamed. Raises OutOfMemoryError."""
        wanted = tuple(streamed)
        if self._unified or (self._on_device and self.streamed == wanted):
            return
        self._stop()
        self._on_device = True
        for number in wanted:
            self._blocks[number][1].drop()
        resident = [unit for number, (_, unit) in enumerate(self._blocks) if number not in set(wanted)]
        for unit in (self._core, *resident):
            unit.load(self._device)
        if wanted:
            self._streamer = Streamer({number: self._blocks[number] for number in wanted}, self._device)

    def drop(self) -> None:
        """Leave the device."""
        self._stop()
        for unit in (self._core, *(unit for _, unit in self._blocks)):
            unit.drop()
        self._on_device = False

    def free(self, nbytes: int) -> int:
        """Take at least so many bytes off the device, if there are as many; returns how many were."""
        before = self.device_bytes
        self._stop()
        self._on_device = False
        for unit in (*(unit for _, unit in reversed(self._blocks)), self._core):
            if before - self.device_bytes >= nbytes:
                break
            unit.drop()
        return before - self.device_bytes

    def _pack(self) -> None:
        """Bring all into host memory, page-locked for a GPU, several units at a time."""
        pinned = self._device.type == "cuda"
        units = [self._core, *(unit for _, unit in self._blocks)]
        threads = min(_FILLING_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, "dfdask-weights") as pool:
            list(pool.map(lambda unit: unit.pack(pinned), units))

    def _stop(self) -> None:
        if self._streamer is not None:
            self._streamer.stop()
            self._streamer = None


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: entries of its lists; of one that is too large, the entries of lists inside."""
    limit = _nbytes(module) // LARGEST_PART
    found: list[nn.Module] = []

    def visit(part: nn.Module, in_list: bool) -> None:
        is_list = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        divisible = any(isinstance(inner, nn.ModuleList) for inner in part.modules())
        if in_list and not is_list and not (divisible and _nbytes(part) > limit):
            if _nbytes(part):
                found.append(part)
            return
        for child in part.children():
            visit(child, is_list)

    visit(module, False)
    return found


def modules(pipeline: Any) -> list[tuple[str, nn.Module]]:
    """The components of a pipeline that have weights here: name and module."""
    return [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]


def is_plain(module: nn.Module) -> bool:
    """Whether all weights are ordinary tensors: quantised ones keep state of their own beside them."""
    return all(type(tensor) in (nn.Parameter, torch.Tensor, nn.Buffer) for tensor in _all_tensors(module))


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _all_tensors(module))


def _all_tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _tensors(module: nn.Module, without: set[int]) -> list[torch.Tensor]:
    return [tensor for tensor in _all_tensors(module) if id(tensor) not in without]


def _shared(blocks: Sequence[nn.Module]) -> set[int]:
    """Tensors that several blocks use: they stay with the core."""
    seen: set[int] = set()
    twice: set[int] = set()
    for block in blocks:
        own = {id(tensor) for tensor in _all_tensors(block)}
        twice |= own & seen
        seen |= own
    return twice
