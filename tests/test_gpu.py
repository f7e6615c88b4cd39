"""What only a GPU shows: asynchronous copies, its own out of memory, page-locked weights."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfdask.items import Item
from dfdask.stages import held as held_stages
from dfdask.stages.batch import Batch, Rows, run_batch
from dfdask.stages.component import Weights
from dfdask.stages.held import HeldStage
from dfdask.stages.model import ModelRef
from dfdask.stages.residency import Residency

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REF = ModelRef("none", "digest", "bfloat16", "cuda", False)
WIDTH = 4096
BLOCK_BYTES = 2 * WIDTH * WIDTH


class Tower(nn.Module):
    """Blocks that each compute about as long as they are transferred."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = torch.nn.functional.rms_norm(block(x), (WIDTH,))
        return x


class Climb:
    """A stage: one pass through the tower, with room for ``item_bytes`` an item."""

    def __init__(self, tower: Tower, item_bytes: int) -> None:
        self.tower = tower
        self.item_bytes = item_bytes
        self.calls: list[int] = []

    @torch.no_grad()
    def run(self, items: Any, state: Any) -> Any:
        self.calls.append(len(items))
        rooms = [torch.empty(self.item_bytes, dtype=torch.uint8, device="cuda") for _ in items]
        x = torch.stack([torch.full((64, WIDTH), float(item.seed), dtype=torch.bfloat16) for item in items]).cuda()
        found = self.tower(x).cpu()
        del rooms
        return Rows(found)


class Here(Residency):
    def __init__(self, device_bytes: int, blocks: int, item_bytes: int) -> None:
        super().__init__("cuda", device_bytes, 1 << 40, unified=False)
        self._blocks, self._item_bytes = blocks, item_bytes

    def _load(self, ref: ModelRef, name: str) -> HeldStage:
        torch.manual_seed(len(name))
        stage = Climb(Tower(self._blocks), self._item_bytes)
        return HeldStage(self, stage, [Weights(name, stage.tower, torch.device("cuda"), unified=False)])


@pytest.fixture
def capped() -> Iterator[int]:
    """Bytes that this process may take of the GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = 2 << 30
    gc.collect()  # what earlier tests left would take of it
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def run(held: HeldStage, count: int) -> torch.Tensor:
    batch = run_batch("stage", held, Batch.start([Item(row, str(row), "", row + 1, {}) for row in range(count)]))
    assert not batch.failures and sum(len(group.items) for group in batch.groups) == count
    return torch.cat([group.state.value for group in batch.groups])


@pytest.mark.parametrize("streamed", [(0, 1), (1, 5, 8, 11), tuple(range(12))])
def test_streamed_blocks_compute_the_same(streamed: tuple[int, ...]) -> None:
    tower = Tower(12)
    weights = Weights("tower", tower, torch.device("cuda"), unified=False)
    x = torch.randn(512, WIDTH, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        weights.place(())
        expected = tower(x)
        for _ in range(3):
            weights.place(streamed)
            results = [tower(x) for _ in range(8)]
            torch.cuda.synchronize()
            assert all(torch.equal(expected, result) for result in results)
            weights.place(())
            assert torch.equal(expected, tower(x))
    weights.drop()
    assert weights.device_bytes == 0


def test_weights_are_page_locked_and_never_copied_back() -> None:
    tower = Tower(4)
    before = [block.weight.detach().clone() for block in tower.blocks]
    weights = Weights("tower", tower, torch.device("cuda"), unified=False)
    places = [block.weight.data_ptr() for block in tower.blocks]
    assert all(block.weight.is_pinned() for block in tower.blocks)
    weights.place(())
    assert all(block.weight.is_cuda for block in tower.blocks)
    weights.drop()
    assert places == [block.weight.data_ptr() for block in tower.blocks]
    assert all(torch.equal(old, block.weight) for old, block in zip(before, tower.blocks, strict=True))


def test_two_stages_that_do_not_fit_together_take_turns(capped: int) -> None:
    device = Here(capped, 40, 1 << 20)  # 1.25 GiB each
    for _ in range(3):
        for name in ("one", "three"):
            held = device.get(REF, name)
            first = run(held, 2)
            assert torch.equal(first, run(held, 2)) and torch.isfinite(first).all()
            assert torch.cuda.memory_allocated() <= capped
    assert device.loads == 2


def test_out_of_memory_halves_the_batch_and_loses_nothing(capped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Here(capped, 16, 100 << 20)  # 0.5 GiB of weights, 0.1 GiB an item
    held = device.get(REF, "tower")
    monkeypatch.setattr(held_stages, "_UNKNOWN_PART", 1 << 60)  # no room is left to activations at first
    stage: Any = held.stage
    together = run(held, 40)
    assert stage.calls[0] == 40 and max(stage.calls[2:]) <= 20
    limit = held.most_items([Item(0, "", "", 0, {})] * 40)
    assert limit < 40
    stage.calls.clear()
    assert torch.equal(run(held, 40), together) and max(stage.calls) <= limit, "the limit is known now"


def test_out_of_memory_with_one_item_streams_more(capped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Here(capped, 56, 1 << 30)  # 1.75 GiB of weights, 1 GiB for the item
    held = device.get(REF, "tower")
    monkeypatch.setattr(held_stages, "_UNKNOWN_PART", 1 << 60)  # no room is left to activations at first
    found = run(held, 1)
    assert held.weights[0].streamed and torch.isfinite(found).all()
    assert torch.equal(found, run(held, 1))
    assert held.peak_bytes >= 1 << 30 and held.device_seconds > 0


def test_a_worker_whose_script_asked_for_gpus_too_early_says_so(tmp_path: Path) -> None:
    script = tmp_path / "early.py"
    script.write_text(
        """
import os, torch
from dfdask.stages.model import device_for

if __name__ == "__main__":
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    assert device_for("auto") == device_for("cuda") == "cuda"
    os.environ["CUDA_VISIBLE_DEVICES"] = "GPU-00000000-1111-2222-3333-444444444444"  # as one of another worker
    device_for("auto")
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert "this worker's GPU is GPU-00000000" in done.stderr and "__main__" in done.stderr
