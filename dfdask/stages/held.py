"""A stage with its weights: how many items it runs at once, how much room they take, what to do where that lacks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfdask.batching import call_key
from dfdask.errors import ClusterError
from dfdask.profit import BatchSearch
from dfdask.stages.batch import Stage, is_out_of_memory

if TYPE_CHECKING:
    from dfdask.items import Item
    from dfdask.stages.component import Weights
    from dfdask.stages.residency import Residency

_UNKNOWN_PART = 10
"""Of the budget, one part in so many is left to activations before they were measured."""
_LEAST_PART = 64
"""Where an item runs out of memory, at least one part in so many is made free for it."""
_MARGIN = 1.05
_DOUBT = 1.25
"""What one number of items took says of larger ones no more than this."""
_OF_TIME_ALONE = ("num_inference_steps",)
"""Arguments that make a call longer, but take no more memory: what was learnt at one number of steps holds at all."""


class HeldStage:
    """A stage with its weights; runs on the device, in batches that fit there."""

    def __init__(
        self, residency: Residency, stage: Stage, weights: Sequence[Weights], is_compiled: bool = False
    ) -> None:
        self.stage = stage
        self.weights = tuple(weights)
        self.is_compiled = is_compiled
        self.switch_seconds = 0.0
        self.peak_bytes = 0
        self.device_seconds = 0.0
        self.batch = 0
        self._residency = residency
        # By kind of call and number of items: bytes that activations took, and room to leave where they ran out of it.
        self._peaks: dict[str, dict[int, int]] = {}
        self._rooms: dict[str, dict[int, int]] = {}
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
            self._tile(self._tiled)
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
            self._searches.setdefault(call_key(items[0]), BatchSearch()).observe(len(items), peak.seconds)
            if peak.bytes:
                kind = _memory_key(items)
                self.peak_bytes = peak.bytes
                self._peaks.setdefault(kind, {})[len(items)] = peak.bytes
                self._rooms.get(kind, {}).pop(len(items), None)
            return result

    def most_items(self, items: Sequence[Item]) -> int:
        """How many items of this kind may run at once."""
        kind = _memory_key(items)
        count = min(self._most.get(kind, len(items)), len(items))
        while count > 1 and self._is_too_much(kind, count):
            count = (count + 1) // 2
        return max(count, 1)

    def _is_too_much(self, kind: str, count: int) -> bool:
        """Whether by what fewer items took these need more than there is, be every block streamed."""
        known = self._peaks.get(kind, {}).copy()  # other threads add to it
        smaller = sorted(size for size in known if size < count)
        if count in known or not smaller:
            return False
        most, last = self._residency.most_room_bytes(self), smaller[-1]
        if len(smaller) == 1:  # what part of it does not grow with the items is not known
            return known[last] * count / last > most * _DOUBT
        first = smaller[-2]
        return known[last] + (known[last] - known[first]) / (last - first) * (count - last) > most

    def next_items(self, items: Sequence[Item]) -> int:
        """How many of these to run at once now: of what fits, what is fastest, or a size that is to be tried."""
        most = self.most_items(items)
        search = self._searches.get(call_key(items[0]))
        # Another size would be compiled again, which takes longer than it could save.
        return search.next_items(most) if search and not self.is_compiled else most

    def ran_out(self, items: Sequence[Item]) -> bool:
        """These items were too much for the memory: whether the same again may fit now, or else fewer must be tried."""
        kind, count = _memory_key(items), len(items)
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
            if count == 1 and not self._tiled and self._tile(True):  # tiles cost more time than smaller batches
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
        """What activations will take beside the weights: measured, else a guess."""
        if not items:
            largest = [max(peaks.values()) for peaks in self._peaks.values()]
            return int(max(largest) * _MARGIN) if largest else self._residency.device_bytes // _UNKNOWN_PART
        kind, count = _memory_key(items), len(items)
        known, forced = self._peaks.get(kind, {}), self._rooms.get(kind, {})
        if count in forced:
            return forced[count]
        if count in known:
            return int(known[count] * _MARGIN)
        smaller = max((size for size in known if size < count), default=None)
        if smaller is not None:
            return int(known[smaller] * count / smaller * _MARGIN)
        if known:
            return int(min(known.values()) * _MARGIN)
        return min(forced.values(), default=self._residency.device_bytes // _UNKNOWN_PART)

    def _stream_more(self, items: Sequence[Item]) -> bool:
        """Stream more blocks, if there are any; what others hold of the device's memory may leave it to less still."""
        if self._residency.unified:
            return False
        before = [weights.streamed for weights in self.weights]
        room = max(self.room_bytes(items), self._residency.device_bytes // _LEAST_PART)
        while room < self._residency.device_bytes:
            room = room * 3 // 2 + 1
            self._rooms.setdefault(_memory_key(items), {})[len(items)] = room
            try:
                self._residency.place(self, room, forced=True)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                continue
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


def _memory_key(items: Sequence[Item]) -> str:
    """Equal for calls of which each item takes the same memory."""
    return call_key(items[0], _OF_TIME_ALONE)
