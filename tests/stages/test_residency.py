"""A stage is loaded once in a process, at its first use, whoever asks; its weights keep to the budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dfdask.errors import ClusterError, ModelError
from dfdask.items import Item
from dfdask.spec import FakeStages
from dfdask.stages import budget, residency
from dfdask.stages import held as held_stages
from dfdask.stages.batch import Batch, Rows, run_batch
from dfdask.stages.budget import budgets
from dfdask.stages.component import Weights
from dfdask.stages.cut import PipelineStage
from dfdask.stages.fake import FakeStage
from dfdask.stages.held import HeldStage
from dfdask.stages.model import ModelRef, digest
from dfdask.stages.residency import Residency, held_stage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2

CPU = torch.device("cpu")
REF = ModelRef("played", "digest", "float32", "cpu", False)
FAKE = ModelRef("fake", "fake", "float32", "cpu", False, fake=FakeStages())


@pytest.fixture(autouse=True)
def empty_handed() -> Iterator[None]:
    residency._residencies.clear()
    residency._fakes.clear()
    yield
    residency._residencies.clear()
    residency._fakes.clear()


def test_a_stage_is_held_by_model_and_name() -> None:
    encode = held_stage(FAKE, "encode")
    assert isinstance(encode, FakeStage)
    assert held_stage(FAKE, "encode") is encode
    assert held_stage(FAKE, "denoise") is not encode
    assert held_stage(replace(FAKE, fake=FakeStages(handoff_bytes=1)), "encode") is not encode
    assert held_stage(replace(FAKE, fake=FakeStages()), "encode") is encode, "equal models are the same one"


def test_threads_that_ask_at_once_get_the_same(tiny: Callable[[str], Path]) -> None:
    folder = tiny("sd")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    with ThreadPoolExecutor(4) as pool:
        stages: list[Any] = list(pool.map(lambda _: held_stage(ref, "decode"), range(4)))
    assert isinstance(stages[0].stage, PipelineStage)
    assert all(stage is stages[0] for stage in stages)


def test_a_stage_that_cannot_be_loaded_is_tried_again(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    ref = ModelRef(str(folder), digest(tiny("sd")), "float32", "cpu", False)
    with pytest.raises(ModelError):
        held_stage(ref, "decode")
    folder.symlink_to(tiny("sd"))
    held: Any = held_stage(ref, "decode")
    assert isinstance(held.stage, PipelineStage)


class Device(Residency):
    """A device with memory of its own, played by the host's: it refuses what goes beyond its bytes."""

    def __init__(self, device_bytes: int, host_bytes: int = 1 << 40, blocks: int = 8) -> None:
        super().__init__("cpu", device_bytes, host_bytes, unified=False)
        self._blocks = blocks

    def _load(self, ref: ModelRef, name: str) -> HeldStage:
        stage = Layers(self, self._blocks)
        return HeldStage(self, stage, [Weights(name, stage.module, CPU, unified=False)])


class Layers:
    """Blocks of 1 KiB; each item takes ``item_bytes`` of the device's memory beside them."""

    def __init__(self, device: Device, blocks: int) -> None:
        self.module = nn.ModuleDict({"list": nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(blocks))})
        self.item_bytes = 1024
        self.calls: list[int] = []
        self._device = device

    def run(self, items: Sequence[Item], state: Any) -> Any:
        self.calls.append(len(items))
        if self._device.used_bytes() + len(items) * self.item_bytes > self._device.device_bytes:
            raise torch.OutOfMemoryError("too much")
        x = torch.ones(len(items), 16) if state is None else state.value
        for block in self.module["list"]:
            x = block(x)
        return Rows(x)


def items(count: int) -> list[Item]:
    return [Item(row, f"i{row}", "", row, {}) for row in range(count)]


def run(held: HeldStage, count: int) -> Any:
    batch = run_batch("stage", held, Batch.start(items(count)))
    assert not batch.failures and sum(len(group.items) for group in batch.groups) == count
    return torch.cat([group.state.value for group in batch.groups])


def test_what_fits_is_on_the_device_and_what_was_used_longest_ago_makes_room() -> None:
    device = Device(20 * 1024)
    stages = {name: device.get(REF, name) for name in ("a", "b", "c")}
    for name in ("a", "b"):  # 2 KiB are left to activations
        run(stages[name], 1)
    assert sorted(device.holds()) == ["a", "b"] and device.used_bytes() == 16 * 1024
    device.get(REF, "a")
    run(stages["c"], 1)
    assert [name for name in ("a", "b", "c") if device.get(REF, name).weights[0].on_device] == ["a", "c"]
    assert device.used_bytes() == 18 * 1024, "only as much was dropped as had to be"
    expected = run(device.get(REF, "a"), 3)
    run(device.get(REF, "b"), 1)
    assert torch.equal(run(device.get(REF, "a"), 3), expected)
    assert device.loads == 3, "nothing was read from disk again"


def test_what_does_not_fit_is_streamed() -> None:
    large, small = Device(1 << 20), Device(6 * 1024)
    held, short = large.get(REF, "a"), small.get(REF, "a")
    for one, other in zip(held.weights, short.weights, strict=True):
        other.module.load_state_dict(one.module.state_dict())
    assert torch.equal(run(held, 1), run(short, 1))
    assert not held.weights[0].streamed and len(short.weights[0].streamed) >= 4
    assert small.used_bytes() <= 5 * 1024 and small.holds() == ["a (streamed)"]


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room is left to activations before they were measured."""
    monkeypatch.setattr(held_stages, "_UNKNOWN_PART", 1 << 60)


@pytest.mark.usefixtures("no_room")
def test_out_of_memory_drops_others_then_halves_and_learns() -> None:
    device = Device(16 * 1024)
    run(device.get(REF, "other"), 1)
    held = device.get(REF, "a")
    stage: Any = held.stage
    run(held, 30)
    assert stage.calls == [30, 30, 15, 7, 8, 7, 8], "first the other stage makes room"
    assert not device.get(REF, "other").weights[0].on_device
    stage.calls.clear()
    run(held, 30)
    assert max(stage.calls) <= 15 and sum(stage.calls) - stage.calls.count(15) * 15 == 30, (
        "what failed is not tried again"
    )


class Measuring(Device):
    """A device that tells what the activations of its one stage took."""

    @contextmanager
    def measured(self) -> Iterator[Any]:
        stage: Any = next(iter(self._held.values())).stage
        peak = SimpleNamespace(bytes=0, seconds=0.0)
        yield peak
        peak.bytes = stage.calls[-1] * stage.item_bytes


def test_what_fewer_items_took_tells_how_many_fit_at_any_number_of_steps() -> None:
    held = Measuring(16 * 1024).get(REF, "a")
    stage: Any = held.stage
    stage.item_bytes = 2 * 1024
    run(held, 1)
    many = [Item(row, f"i{row}", "", row, {"num_inference_steps": 2}) for row in range(16)]
    batch = run_batch("stage", held, Batch.start(many))
    # Streamed, the eight blocks take two: 14 KiB are left to activations. From one item, 8 are only just doubtful.
    assert stage.calls[1:] == [8, 4, 4, 4, 4] and sum(len(group.items) for group in batch.groups) == 16
    assert held.most_items(many) == 4
    wide = [Item(0, "i0", "", 0, {"num_inference_steps": 2, "width": 64})]
    assert held.most_items(wide * 16) == 16, "of other calls nothing is known"


def test_what_does_not_grow_with_the_items_is_not_multiplied() -> None:
    held = Measuring(64 * 1024).get(REF, "a")
    stage: Any = held.stage
    peaks = held._peaks.setdefault(held_stages._memory_key(items(1)), {})
    peaks.update({1: 20 * 1024, 2: 22 * 1024})  # 62 KiB are left where all is streamed
    assert held.most_items(items(16)) == 16
    peaks.clear()
    peaks[1] = 20 * 1024
    assert held.most_items(items(16)) == 2, "nobody knows"
    assert stage.calls == []


def test_after_a_batch_that_was_too_large_for_a_streamed_stage_half_of_it_runs() -> None:
    for kib, count, calls in ((7, 8, [8, 8, 8, 4, 4]), (6, 8, [8, 8, 4, 4])):
        held = Measuring(kib * 1024).get(REF, "a")
        stage: Any = held.stage
        run(held, count)
        assert stage.calls == calls
        run(held, count)
        assert set(stage.calls[len(calls) :]) == {4}


@pytest.mark.usefixtures("no_room")
def test_out_of_memory_with_one_item_streams_more() -> None:
    device = Device(9 * 1024)
    held = device.get(REF, "a")
    stage: Any = held.stage
    stage.item_bytes = 4 * 1024
    expected = run(held, 1)
    assert len(held.weights[0].streamed) >= 6 and stage.calls[-1] == 1
    calls = len(stage.calls)
    assert torch.equal(run(held, 1), expected) and len(stage.calls) == calls + 1, "it stays as it was found to work"
    stage.item_bytes = 1 << 20
    with pytest.raises(ClusterError, match="a single item does not fit: 0.00 GB of weights, even streamed"):
        run(held, 1)
    stage.item_bytes = 1024
    assert torch.equal(run(held, 1), expected), "the next items are not the worse for it"


@pytest.mark.usefixtures("no_room")
def test_where_others_take_of_the_memory_more_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(12 * 1024)
    held = device.get(REF, "a")
    expected = run(held, 1)
    place = Weights.place

    def crowded(weights: Weights, blocks: Sequence[int]) -> None:
        if 8 - len(blocks) > 4:  # 1 KiB each
            raise torch.OutOfMemoryError("another process was faster")
        place(weights, blocks)

    monkeypatch.setattr(Weights, "place", crowded)
    stage: Any = held.stage
    stage.item_bytes = 6 * 1024
    assert torch.equal(run(held, 1), expected)
    assert len(held.weights[0].streamed) >= 4


def limit(held: HeldStage, count: int) -> None:
    held._most[held_stages._memory_key(items(1))] = count


def test_what_ran_out_of_memory_once_runs_in_parts_and_comes_together_again() -> None:
    device = Device(1 << 20)
    held = device.get(REF, "a")
    limit(held, 4)
    stage: Any = held.stage
    batch = run_batch("encode", held, Batch.start(items(10)))
    assert stage.calls == [3, 3, 4]
    limit(held, 16)
    stage.calls.clear()
    run_batch("denoise", held, batch)
    assert stage.calls == [10], "what was parted comes together again"


class Clock:
    """Stands in for the device's own clock, which a CPU lacks."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds, self.seconds, self.bytes = seconds, 0.0, 0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._seconds()


@pytest.mark.parametrize(
    ("item_seconds", "ends_at"),
    [({8: 1.0, 4: 0.96, 2: 0.95, 1: 1.2}, 4), ({8: 1.0, 4: 1.1}, 8), ({8: 1.0, 4: 0.8, 2: 0.7, 1: 0.6}, 1)],
)
def test_the_batch_that_is_fastest_by_the_devices_clock_is_found(item_seconds: dict[int, float], ends_at: int) -> None:
    device = Device(1 << 20)
    held = device.get(REF, "a")
    stage: Any = held.stage
    measured: Any = lambda: Clock(lambda: item_seconds[stage.calls[-1]] * stage.calls[-1])  # noqa: E731
    device.measured = measured  # type: ignore[method-assign]
    expected = torch.ones(8, 16)
    for block in stage.module["list"]:
        expected = block(expected)
    for _ in range(8):
        assert torch.allclose(run(held, 8), expected), "in the items' order, whatever their batches"
    stage.calls.clear()
    run(held, 8)
    assert set(stage.calls) == {ends_at}


def test_what_an_earlier_stage_parted_comes_together_as_far_as_it_fits_before_a_size_is_tried() -> None:
    device = Device(1 << 20)
    first, second = device.get(REF, "a"), device.get(REF, "b")
    limit(first, 2)
    stage: Any = second.stage
    device.measured = lambda: Clock(lambda: float(stage.calls[-1] if stage.calls else 1))  # type: ignore[assignment, return-value]
    for _ in range(2):
        run(second, 8)
    stage.calls.clear()
    run_batch("second", second, run_batch("first", first, Batch.start(items(8))))
    assert stage.calls == [4, 4], "half of 8 is tried next, and no odd size"


def test_what_is_compiled_for_a_batch_keeps_to_it() -> None:
    device = Device(1 << 20)
    held = device.get(REF, "a")
    held.is_compiled = True
    stage: Any = held.stage
    device.measured = lambda: Clock(lambda: float(stage.calls[-1] ** 2))  # type: ignore[assignment, return-value]
    for _ in range(4):
        run(held, 8)
    assert stage.calls == [8, 8, 8, 8]


def test_the_host_forgets_what_was_used_longest_ago() -> None:
    device = Device(1 << 20, host_bytes=17 * 1024)
    for name in ("a", "b", "a", "c", "a", "b"):
        run(device.get(REF, name), 1)
    assert device.loads == 4, "a, b, c, and b again"


def test_budgets_come_from_the_environment_or_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Residency.of_this_process("cpu").device_bytes > 1 << 28
    monkeypatch.setenv("DFDASK_MEMORY_BYTES", "2e9")
    assert Residency.of_this_process("cpu").device_bytes == 2_000_000_000
    monkeypatch.setenv("DFDASK_HOST_MEMORY_BYTES", "300")
    assert budgets("cpu") == (300, 300), "what a device may take is no more of the host's"
    for text in ("much", "-1", "0", "inf", "nan"):
        monkeypatch.setenv("DFDASK_MEMORY_BYTES", text)
        with pytest.raises(ClusterError, match=f"DFDASK_MEMORY_BYTES: must be a number of bytes, got '{text}'"):
            Residency.of_this_process("cpu")


def test_what_is_free_on_a_gpu_limits_what_its_worker_said(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", parts.append)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda _: None)
    monkeypatch.setattr(budget, "_told", {})
    monkeypatch.setenv("DFDASK_HOST_MEMORY_BYTES", "300")
    assert budgets("cuda") == (8 << 30, 300)
    budget.allow("DFDASK_MEMORY_BYTES", 78 << 30)
    assert budgets("cuda") == (8 << 30, 300), "others have taken the rest since"
    budget.allow("DFDASK_MEMORY_BYTES", 1)
    assert parts == [], "no limit that nobody has set"
    monkeypatch.setenv("DFDASK_MEMORY_BYTES", str(20 << 30))
    assert budgets("cuda") == (20 << 30, 300) and parts == [0.25]


@pytest.mark.usefixtures("no_room")
def test_a_pipeline_within_a_budget_streams_and_makes_the_same(tiny: Callable[[str], Path]) -> None:
    folder = tiny("pixart_sigma")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16}
    call["use_resolution_binning"] = False
    found = []
    largest = 0
    for short in (False, True):
        # On a CPU, which has no other memory to stream from, a device is played that has.
        residency._residencies["cpu"] = Residency("cpu", largest * 2 // 3 if short else 1 << 40, 1 << 40, unified=False)
        batch = Batch.start([Item(row, f"i{row}", "a sea", row, call) for row in range(2)])
        streamed = 0
        for name in ("encode", "denoise", "decode"):
            held: Any = held_stage(ref, name)
            held.prepare(batch.groups[0].items)
            batch = run_batch(name, held, batch)
            assert not batch.failures
            largest = max(largest, *(weights.nbytes for weights in held.weights))
            streamed += sum(len(weights.streamed) for weights in held.weights)
        assert bool(streamed) == short
        found.append(batch.groups[0].state)
    for one, other in zip(*found, strict=True):
        assert (one == other).all() and one.any()
