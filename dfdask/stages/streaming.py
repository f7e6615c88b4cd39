"""Blocks that pass through the device: while one computes, the next ones arrive in the other slots.

Each block has a slot of device memory for good, so its parameters stay where they are and only the slot's bytes
change. What a block needs is there when it is called, in whatever order: the order seen last is only used to guess
what to fetch next.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dfdask.blocks import SLOTS
from dfdask.stages.packing import Unit


class Streamer:
    """Streams blocks, by their numbers, from the host as their forward passes ask for them."""

    def __init__(self, blocks: Mapping[int, tuple[nn.Module, Unit]], device: torch.device) -> None:
        self.numbers = tuple(blocks)
        self.misses = 0
        self._units = {number: unit for number, (_, unit) in blocks.items()}
        self._device = device
        self._link = _Link(device)
        size = max(unit.nbytes for unit in self._units.values())
        self._slots = [_Slot(size, device) for _ in range(min(SLOTS, len(blocks)))]
        for slot in self._slots:
            self._link.release(slot)  # its memory may still be in use by what was computed before
        self._trace: list[int] = []
        self._arrange(self.numbers)
        self._hooks: list[Any] = []
        for number, (module, _) in blocks.items():
            plain = _untraced if getattr(module, "_compiled_call_impl", None) else lambda hook: hook
            self._hooks.append(module.register_forward_pre_hook(plain(self._before(number)), prepend=True))
            self._hooks.append(module.register_forward_hook(plain(self._after(number))))
        for number in self._order[: len(self._slots)]:
            self._fetch(number)

    @property
    def device_bytes(self) -> int:
        return sum(slot.buffer.nbytes for slot in self._slots)

    def stop(self) -> None:
        """Give the device memory back; the parameters are the host's again."""
        for hook in self._hooks:
            hook.remove()
        self._link.settle()
        for unit in self._units.values():
            unit.drop()
        self._slots.clear()

    def _arrange(self, order: tuple[int, ...]) -> None:
        """Deal the blocks out to the slots in turn."""
        self._link.settle()
        self._order = order
        self._place = {number: place for place, number in enumerate(order)}
        for slot in self._slots:
            slot.holds = None
        for number in order:
            self._units[number].point(self._slot(number).buffer)

    def _slot(self, number: int) -> _Slot:
        return self._slots[self._place[number] % len(self._slots)]

    def _before(self, number: int) -> Any:
        def before(module: nn.Module, inputs: Any) -> None:
            if number in self._trace:
                self._learn_order()
            self._trace.append(number)
            slot = self._slot(number)
            if slot.holds != number:
                self.misses += 1
                self._link.release(slot)
                self._fetch(number)
            self._link.wait(slot)

        return before

    def _after(self, number: int) -> Any:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self._link.release(self._slot(number))
            following = (self._place[number] + len(self._slots)) % len(self._order)
            if following % len(self._slots) == self._place[number] % len(self._slots):
                self._fetch(self._order[following])

        return after

    def _learn_order(self) -> None:
        """A pass is over: let the next one find its blocks in the order of this one."""
        seen = tuple(self._trace)
        self._trace.clear()
        if seen != self._order and len(seen) == len(self._order):
            self._arrange(seen)

    def _fetch(self, number: int) -> None:
        slot = self._slot(number)
        if slot.holds == number:
            return
        unit = self._units[number]
        if unit.host is None:
            raise RuntimeError("a block without weights in host memory cannot be streamed")
        slot.holds = number
        self._link.copy(slot, unit.host)


class _Slot:
    """Device memory for one block at a time."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.arrived: Any = None
        self.free: Any = None


class _Link:
    """The copies to the device: on a stream of their own where there is a GPU, else at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device

    def copy(self, slot: _Slot, host: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream and slot.free is not None:
                self._stream.wait_event(slot.free)
            slot.buffer[: host.nbytes].copy_(host, non_blocking=True)
            slot.arrived = self._stream.record_event() if self._stream else None

    def wait(self, slot: _Slot) -> None:
        """What is computed from here on finds the slot filled."""
        if self._stream and slot.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.arrived)

    def release(self, slot: _Slot) -> None:
        """What was computed so far was the last use of what the slot holds."""
        if self._stream:
            slot.free = torch.cuda.current_stream(self._device).record_event()

    def settle(self) -> None:
        """Let what is computed, or allocated, from here on come after all copies."""
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _untraced(hook: Any) -> Any:
    """A compiled block calls its hooks too: they move data, which no graph can hold."""
    return torch.compiler.disable(hook)
