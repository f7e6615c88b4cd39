"""Which stages this process holds, and where their weights are: on the device, streamed to it, in host memory, on disk.

One ``Residency`` per device keeps to two budgets. What a stage needs is brought to the device when it runs; room is
made by dropping blocks of the components that were used longest ago, which costs nothing: the host has a copy. What
does not fit the host's budget is forgotten, and read from disk again. How much room activations need is measured.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfdask.blocks import kept_bytes, streamed_blocks, streamed_name
from dfdask.stages.batch import Stage, is_out_of_memory
from dfdask.stages.budget import MEMORY_BYTES, Measured, allowed, budgets
from dfdask.stages.fake import FakeDevice, FakeStage
from dfdask.stages.held import HeldStage
from dfdask.stages.model import ModelRef, device_for

if TYPE_CHECKING:
    from dfdask.stages.component import Weights

_residencies: dict[str, Residency] = {}
_fakes: dict[tuple[str, str], FakeStage] = {}
_lock = threading.Lock()
_fake_device: FakeDevice | None = None
DEVICE_CLASS = "DFDASK_DEVICE_CLASS"
"""Environment variable: the class of this process's device."""


def held_stage(ref: ModelRef, name: str) -> Stage:
    """The stage ``name`` of a model, read from disk if it is not here yet; a worker calls it off its event loop.

    Raises ModelError, ClusterError.
    """
    if ref.fake is not None:
        return _fake_stage(ref, name)
    device = device_for(ref.device)
    with _lock:
        if device not in _residencies:
            _residencies[device] = Residency.of_this_process(device)
    return _residencies[device].get(ref, name)


def _fake_stage(ref: ModelRef, name: str) -> FakeStage:
    global _fake_device
    key = repr(ref), name
    with _lock:
        if _fake_device is None:
            _fake_device = FakeDevice(os.environ.get(DEVICE_CLASS, "cpu"), allowed(MEMORY_BYTES))
        if ref.fake is not None and key not in _fakes:
            _fakes[key] = FakeStage(name, ref.fake, _fake_device)
        return _fakes[key]


def report() -> list[dict[str, Any]]:
    """What this process's stages came to: bytes, blocks streamed, what their activations took, limits learnt."""
    return [entry for residency in list(_residencies.values()) for entry in residency.report()]


def resident_bytes() -> int:
    """Weights on this process's devices now. Takes no lock: a look must not wait for a call to end."""
    fake = sum(list(_fake_device.held.values())) if _fake_device is not None else 0
    return fake + sum(residency.used_bytes() for residency in list(_residencies.values()))


def loaded_here() -> object:
    """Equal to what it was before, unless this process loaded or moved a stage's weights since."""
    fake = sorted(_fake_device.held) if _fake_device is not None else []
    return fake, [(device, each.loads, each.holds()) for device, each in list(_residencies.items())]


class Residency:
    """All that one device of this process holds, within ``device_bytes`` on it and ``host_bytes`` in host memory.

    ``unified``: the device's memory is the host's, as on a CPU.
    """

    def __init__(self, device: str, device_bytes: int, host_bytes: int, unified: bool) -> None:
        self.device = device
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.lock = threading.RLock()
        self.loads = 0
        self.unified = unified
        self._held: OrderedDict[tuple[str, str], HeldStage] = OrderedDict()

    @classmethod
    def of_this_process(cls, device: str) -> Residency:
        """With budgets from the environment, else from what is free. Raises ClusterError."""
        return cls(device, *budgets(device), unified=device != "cuda")

    def get(self, ref: ModelRef, name: str) -> HeldStage:
        """The stage, loaded into host memory. Raises ModelError."""
        key = repr(ref), name
        with self.lock:
            if key not in self._held:
                self.loads += 1
                self._held[key] = self._load(ref, name)
                self._forget_others(key)
            self._held.move_to_end(key)
            return self._held[key]

    def holds(self) -> list[str]:
        """Names of the components on the device, as the placement knows them."""
        with self.lock:
            every = [weights for held in self._held.values() for weights in held.weights if weights.on_device]
            return [streamed_name(weights.name) if weights.streamed else weights.name for weights in every]

    def report(self) -> list[dict[str, Any]]:
        """An entry for each stage."""
        with self.lock:
            return [{"stage": name, **held.report()} for (_, name), held in self._held.items()]

    def used_bytes(self) -> int:
        """On the device, by weights."""
        return sum(weights.device_bytes for held in list(self._held.values()) for weights in held.weights)

    def place(self, held: HeldStage, room_bytes: int, forced: bool = False) -> None:
        """Bring the stage's weights to the device, streamed where they do not fit beside ``room_bytes``.

        What is in place and fits stays as it is; with ``forced`` only where it is as this call would have it.
        """
        if self.unified:
            return self._place(held, [()] * len(held.weights))
        if self._is_placed(held, room_bytes) and not forced:
            return
        chosen = self._choose(held, room_bytes)
        for attempt in (True, False):
            needed = sum(_placed_bytes(weights, blocks) for weights, blocks in zip(held.weights, chosen, strict=True))
            self._make_room(held, self.device_bytes - needed - room_bytes)
            try:
                return self._place(held, chosen)
            except Exception as error:
                if not attempt or not is_out_of_memory(error):
                    raise
            for weights in held.weights:
                weights.drop()
            self.drop_others(held)
            self.empty_caches()

    def most_room_bytes(self, held: HeldStage) -> int:
        """What is left to activations where every block of the stage is streamed that can be."""
        least = (_placed_bytes(weights, range(len(weights.block_bytes))) for weights in held.weights)
        return self.device_bytes - sum(least)

    def drop_others(self, held: HeldStage) -> int:
        """Take everything else off the device; returns how many bytes that were."""
        others = [weights for other in self._held.values() if other is not held for weights in other.weights]
        before = sum(weights.device_bytes for weights in others)
        if self.unified:
            return 0
        for weights in others:
            weights.drop()
        return before

    def empty_caches(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def settle(self) -> None:
        """Wait until what was brought to the device is there."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def measured(self) -> Measured:
        return Measured(self.device)

    def _is_placed(self, held: HeldStage, room_bytes: int) -> bool:
        if not all(weights.on_device for weights in held.weights) or self.used_bytes() + room_bytes > self.device_bytes:
            return False
        now = sum(len(weights.streamed) for weights in held.weights)
        # Moving blocks back is not free: only where clearly less is streamed then.
        return not now or sum(map(len, self._choose(held, room_bytes))) > now * 3 // 4

    def _choose(self, held: HeldStage, room_bytes: int) -> list[tuple[int, ...]]:
        """The blocks of each component to stream. Small components come first: they stay, the largest is streamed."""
        allowed = self.device_bytes - room_bytes
        chosen: dict[str, tuple[int, ...]] = {}
        for weights in sorted(held.weights, key=lambda weights: weights.nbytes):
            blocks = streamed_blocks(weights.block_bytes, weights.core_bytes, allowed)
            if blocks is None:
                blocks = tuple(range(len(weights.block_bytes)))
            chosen[weights.name] = blocks
            allowed -= _placed_bytes(weights, blocks)
        return [chosen[weights.name] for weights in held.weights]

    def _place(self, held: HeldStage, chosen: Sequence[tuple[int, ...]]) -> None:
        for weights, blocks in zip(held.weights, chosen, strict=True):
            weights.place(blocks)

    def _make_room(self, held: HeldStage, allowed_bytes: int) -> None:
        """Leave the other stages at most so many bytes on the device, dropping what was used longest ago first."""
        others = [weights for other in self._held.values() if other is not held for weights in other.weights]
        excess = sum(weights.device_bytes for weights in others) - max(allowed_bytes, 0)
        for weights in others:
            if excess <= 0:
                return
            excess -= weights.free(excess)

    def _load(self, ref: ModelRef, name: str) -> HeldStage:
        import torch

        from dfdask.stages.component import Weights, is_plain, modules
        from dfdask.stages.cut import PipelineStage

        stage = PipelineStage(ref, name)
        device = torch.device(self.device)
        found = []
        for component, module in modules(stage.pipeline):
            if is_plain(module):
                found.append(Weights(f"{ref.digest[:12]}/{component}", module, device, self.unified))
            else:
                module.to(device)  # quantised weights stay where they are put
        return HeldStage(self, stage, found, ref.speed.compile)

    def _forget_others(self, key: tuple[str, str]) -> None:
        """Keep to the host's budget: what was used longest ago must be read from disk when it is needed again."""
        for other in list(self._held):
            total = sum(weights.nbytes for held in self._held.values() for weights in held.weights)
            if total <= self.host_bytes:
                return
            if other != key:
                for weights in self._held.pop(other).weights:
                    weights.drop()


def _placed_bytes(weights: Weights, blocks: Sequence[int]) -> int:
    return weights.core_bytes + kept_bytes(weights.block_bytes, blocks)
