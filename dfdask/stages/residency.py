"""Which stages this process holds, and where their weights are: on the device, streamed to it, in host memory, on disk.

One ``Residency`` per device keeps to two budgets. What a stage needs is brought to the device when it runs; room is
made by dropping blocks of the components that were used longest ago, which costs nothing: the host has a copy. What
does not fit the host's budget is forgotten, and read from disk again. How much room activations need is measured.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfdask.batching import call_key
from dfdask.errors import ClusterError
from dfdask.options import Hint, streamed_blocks, streamed_name
from dfdask.profit import BatchSearch
from dfdask.stages.batch import Stage
from dfdask.stages.budget import MEMORY_BYTES, Measured, budgets
from dfdask.stages.fake import FakeDevice, FakeStage
from dfdask.stages.model import ModelRef, device_for

if TYPE_CHECKING:
    from dfdask.items import Item
    from dfdask.stages.component import Weights

_UNKNOWN_PART = 10
"""Of the budget, one part in so many is left to activations before they were measured."""
_MARGIN = 1.05

_residencies: dict[str, Residency] = {}
_fakes: dict[tuple[str, str], FakeStage] = {}
_lock = threading.Lock()
_fake_device: FakeDevice | None = None
DEVICE_CLASS = "DFDASK_DEVICE_CLASS"
"""Environment variable: the class of this process's device."""


def held_stage(ref: ModelRef, name: str, hint: Hint | None = None) -> Stage:
    """The stage ``name`` of a model, read from disk if it is not here yet; a worker calls it off its event loop.

    Raises ModelError, ClusterError.
    """
    if ref.fake is not None:
        return _fake_stage(ref, name)
    device = device_for(ref.device)
    with _lock:
        if device not in _residencies:
            _residencies[device] = Residency.of_this_process(device)
    held = _residencies[device].get(ref, name)
    held.hint = hint or Hint()
    return held


def _fake_stage(ref: ModelRef, name: str) -> FakeStage:
    global _fake_device
    key = repr(ref), name
    with _lock:
        if _fake_device is None:
            memory = os.environ.get(MEMORY_BYTES)
            _fake_device = FakeDevice(os.environ.get(DEVICE_CLASS, "cpu"), int(memory) if memory else None)
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


class HeldStage:
    """A stage with its weights; runs on the device, as its hint says."""

    def __init__(
        self, residency: Residency, stage: Stage, weights: Sequence[Weights], is_compiled: bool = False
    ) -> None:
        self.hint = Hint()
        self.stage = stage
        self.weights = tuple(weights)
        self.is_compiled = is_compiled
        self.is_short = False
        self.switch_seconds = 0.0
        self.peak_bytes = 0
        self.device_seconds = 0.0
        self.batch = 0
        self._residency = residency
        self._peaks: dict[str, dict[int, int]] = {}  # by kind of call and items: bytes that activations took
        self._most: dict[str, int] = {}
        self._searches: dict[str, BatchSearch] = {}
        self._tiled = False

    @property
    def passes_pictures(self) -> bool:
        """Whether later stages need the items' pictures."""
        return bool(getattr(self.stage, "passes_pictures", True))

    def prepare(self, items: Sequence[Item] = ()) -> None:
        """Bring the weights to where they are needed, for these items or any. Raises OutOfMemoryError."""
        began = time.perf_counter()
        self.device_seconds = 0.0
        with self._residency.lock:
            self._residency.place(self, self.room_bytes(items))
            self._tile(self._tiled or self.hint.tiled)
            self._residency.settle()
        self.switch_seconds = time.perf_counter() - began

    def holds(self) -> list[str]:
        """The components on the device now, this stage's and others: ``digest/component``."""
        return self._residency.holds()

    def run(self, items: Sequence[Item], state: Any) -> Any:
        with self._residency.lock:
            self._residency.place(self, self.room_bytes(items))
            with self._residency.measured() as peak:
                result = self.stage.run(items, state)
            self.device_seconds += peak.seconds
            self.batch = len(items)
            kind = call_key(items[0])
            self._searches.setdefault(kind, BatchSearch()).observe(len(items), peak.seconds)
            if peak.bytes:
                self.peak_bytes = peak.bytes
                self._peaks.setdefault(kind, {})[len(items)] = peak.bytes
            return result

    def most_items(self, items: Sequence[Item]) -> int:
        """How many items of this kind may run at once."""
        learnt = self._most.get(call_key(items[0]), len(items))
        return max(min(learnt, self.hint.batch or len(items)), 1)

    def next_items(self, items: Sequence[Item]) -> int:
        """How many of these to run at once now: of what fits, what is fastest, or a size that is to be tried."""
        most = self.most_items(items)
        search = self._searches.get(call_key(items[0]))
        # Another size would be compiled again, which takes longer than it could save.
        return search.next_items(most) if search and not self.is_compiled else most

    def ran_out(self, items: Sequence[Item]) -> bool:
        """These items were too much for the memory: whether the same again may fit now, or else fewer must be tried."""
        kind, count = call_key(items[0]), len(items)
        with self._residency.lock:
            self._residency.empty_caches()
            if self._residency.drop_others(self):
                return True
            streams = any(weights.streamed for weights in self.weights)
            if count > 1 and not streams:
                self._most[kind] = (count + 1) // 2
                return False
            if self._stream_more(items):
                return True
            if not self._tiled and self._tile(True):
                self._tiled = True
                return True
            if count == 1:
                raise ClusterError(
                    f"memory: a single item does not fit: {sum(weights.nbytes for weights in self.weights) / 1e9:.2f} "
                    f"GB of weights, even streamed, and its activations need more than the "
                    f"{self._residency.device_bytes / 1e9:.2f} GB of {self._residency.device}; "
                    "give this stage to larger workers, or make smaller images"
                )
            self._most[kind] = (count + 1) // 2
            return False

    def facts(self) -> dict[str, Any]:
        """Bytes of the last call's activations, its items, blocks streamed; the device's seconds since ``prepare``."""
        return {
            "peak_bytes": self.peak_bytes,
            "batch": self.batch,
            "device_seconds": self.device_seconds,
            "streamed_blocks": sum(len(weights.streamed) for weights in self.weights),
        }

    def report(self) -> dict[str, Any]:
        """Figures of this stage so far."""
        return {
            "weight_bytes": {weights.name: weights.nbytes for weights in self.weights},
            "block_bytes": {weights.name: weights.block_bytes for weights in self.weights},
            "streamed_blocks": {weights.name: len(weights.streamed) for weights in self.weights},
            "peak_bytes": {str(size): peak for peaks in self._peaks.values() for size, peak in peaks.items()},
            "most_items": min(self._most.values(), default=None),
            "tiled": self._tiled,
            "switch_seconds": self.switch_seconds,
            "device_seconds": self.device_seconds,
        }

    def room_bytes(self, items: Sequence[Item]) -> int:
        """What activations will take beside the weights: measured, else as the hint says, else a guess."""
        if items:
            known, count = self._peaks.get(call_key(items[0]), {}), len(items)
        else:
            known, count = {0: max((max(peaks.values()) for peaks in self._peaks.values()), default=0)}, 0
            known = {size: peak for size, peak in known.items() if peak}
        if count in known:
            return int(known[count] * _MARGIN)
        smaller = max((size for size in known if size < count), default=None)
        if smaller is not None:
            return int(known[smaller] * count / smaller * _MARGIN)
        if known:
            return int(min(known.values()) * _MARGIN)
        if self.hint.working_bytes is not None:
            return self.hint.working_bytes
        return self._residency.device_bytes // _UNKNOWN_PART

    def _stream_more(self, items: Sequence[Item]) -> bool:
        if self._residency.unified:
            return False
        self.is_short = True
        before = [weights.streamed for weights in self.weights]
        room = max(self.room_bytes(items), 1)
        while room < self._residency.device_bytes:
            room = room * 3 // 2 + 1
            self._peaks.setdefault(call_key(items[0]), {})[len(items)] = int(room / _MARGIN)
            self._residency.place(self, room, forced=True)
            if [weights.streamed for weights in self.weights] != before:
                return True
        return False

    def _tile(self, tiled: bool) -> bool:
        """Let the VAE decode in tiles, or as a whole; whether this stage has one that can."""
        if not any(weights.name.endswith("/vae") for weights in self.weights):
            return False
        stage: Any = self.stage
        vae = stage.pipeline.vae
        switch = getattr(vae, "enable_tiling" if tiled else "disable_tiling", None)
        if switch is not None:
            switch()
        return switch is not None


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
            streams = held.hint.mode == "streamed"
            return self._place(held, self._choose(held, room_bytes) if streams else [()] * len(held.weights))
        if self._is_placed(held, room_bytes) and not forced:
            return
        chosen = self._choose(held, room_bytes)
        for attempt in (True, False):
            needed = sum(_placed_bytes(weights, blocks) for weights, blocks in zip(held.weights, chosen, strict=True))
            self._make_room(held, self.device_bytes - needed - room_bytes)
            try:
                return self._place(held, chosen)
            except Exception as error:
                if not attempt or type(error).__name__ != "OutOfMemoryError":
                    raise
            for weights in held.weights:
                weights.drop()
            self.drop_others(held)
            self.empty_caches()

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
        total = sum(weights.nbytes for weights in held.weights)
        if held.hint.mode == "resident" and not held.is_short and total <= self.device_bytes:
            allowed = max(allowed, total)
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
    from dfdask.options import kept_bytes

    return weights.core_bytes + kept_bytes(weights.block_bytes, blocks)
