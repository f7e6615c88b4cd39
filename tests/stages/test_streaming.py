"""Weights in one buffer per block, on the device or streamed through two slots: the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARGUMENTS
from torch import nn

from dfdask.items import Item
from dfdask.stages.component import Weights, find_blocks, is_plain, modules
from dfdask.stages.cut import PipelineStage
from dfdask.stages.model import ModelRef, digest
from dfdask.stages.streaming import Streamer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2

CPU = torch.device("cpu")
FAMILIES = ("sd", "sd3", "flux", "pixart_sigma", "wan")


class Net(nn.Module):
    """Blocks in an order of its own, with a tied weight, a buffer and a part outside the blocks."""

    def __init__(self, count: int, order: list[int] | None = None) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(count))
        self.order = order or list(range(count))
        self.register_buffer("shift", torch.ones(8))
        self.blocks[-1][0].weight = self.blocks[0][0].weight

    def forward(self, x: torch.Tensor) -> Any:
        x = self.enter(x) + self.shift
        for number in self.order:
            x = torch.tanh(self.blocks[number](x))
        return x


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("streamed", [(), (0, 1), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4), (4,)])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1], [0, 1, 0, 4, 3, 2, 1]])
def test_streamed_blocks_compute_the_same(streamed: tuple[int, ...], order: list[int]) -> None:
    torch.manual_seed(1)
    net = Net(5, order)
    x = torch.randn(3, 4)
    expected, before = net(x), states(net)
    weights = Weights("net", net, CPU, unified=False)
    assert weights.device_bytes == 0 and not weights.on_device
    weights.place(streamed)
    assert weights.streamed == streamed and weights.on_device
    for _ in range(3):
        assert torch.equal(net(x), expected)
    weights.drop()
    assert weights.device_bytes == 0 and weights.streamed == ()
    after = states(net)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert net.blocks[0][0].weight is net.blocks[-1][0].weight
    weights.place(())
    assert torch.equal(net(x), expected) and weights.device_bytes == weights.nbytes


def test_the_order_that_was_seen_is_the_one_that_is_fetched() -> None:
    net = Net(6, [5, 3, 1, 0, 2, 4])
    weights = Weights("net", net, CPU, unified=False)
    weights.place(range(6))
    streamer = weights._streamer
    assert isinstance(streamer, Streamer)
    x = torch.randn(2, 4)
    net(x)
    net(x)  # its first block says that the first pass is over
    missed = streamer.misses
    assert 0 < missed < 12
    for _ in range(3):
        net(x)
    assert streamer.misses == missed, "every block was there before it was called"


def test_a_pass_that_breaks_off_leaves_nothing_wrong() -> None:
    net = Net(4)
    x = torch.randn(2, 4)
    expected = net(x)
    weights = Weights("net", net, CPU, unified=False)
    weights.place(range(4))
    broken = net.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    broken.remove()
    for _ in range(2):
        assert torch.equal(net(x), expected)


def test_what_is_on_the_device_is_counted() -> None:
    net = Net(6)
    weights = Weights("net", net, CPU, unified=False)
    sizes = weights.block_bytes
    assert len(sizes) == 6 and weights.nbytes == weights.core_bytes + sum(sizes)
    weights.place((1, 3))
    assert weights.device_bytes == weights.nbytes, "two blocks in two slots"
    weights.place((0, 1, 3, 4))
    assert weights.device_bytes == weights.core_bytes + sizes[2] + sizes[5] + 2 * max(sizes[0], sizes[1])
    assert weights.free(1) > 0 and not weights.on_device
    assert torch.isfinite(net.enter(torch.ones(4))).all(), "the host's copy is there for what is not on the device"
    weights.place(())
    x, there = torch.randn(2, 4), weights.device_bytes
    expected = net(x)
    assert weights.free(sizes[5] + 1) == sizes[5] + sizes[4] and weights.device_bytes == there - sizes[5] - sizes[4]
    weights.place(())
    assert torch.equal(net(x), expected)


def test_a_cpu_keeps_its_weights_where_they_were_read() -> None:
    net = Net(3)
    places = [parameter.data_ptr() for parameter in net.parameters()]
    weights = Weights("net", net, CPU, unified=True)
    weights.place(())
    assert places == [parameter.data_ptr() for parameter in net.parameters()]
    assert weights.device_bytes == weights.nbytes


def test_blocks_are_found_in_lists_and_inside_large_ones() -> None:
    large = nn.ModuleDict({"list": nn.ModuleList(nn.Linear(64, 64) for _ in range(9))})
    assert find_blocks(large) == list(large["list"])
    nested = nn.Module()
    other, last = nn.Linear(2, 2), nn.Linear(3, 3)
    nested.stages = nn.ModuleList([nn.ModuleDict({"inner": large, "other": other}), last])
    assert set(find_blocks(nested)) == {*large["list"], other, last}
    assert find_blocks(nn.Linear(2, 2)) == []


def test_quantised_weights_are_not_plain() -> None:
    class Packed(nn.Parameter):
        pass

    net = nn.Linear(2, 2)
    assert is_plain(net)
    net.weight = Packed(torch.zeros(2, 2))
    assert not is_plain(net)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_in_slots_makes_the_same_picture(family: str, tiny: Callable[[str], Path]) -> None:
    folder = tiny(family)
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    call = {**ARGUMENTS[family], "num_inference_steps": 2}
    items = [Item(row, f"i{row}", "a red apple", row, call) for row in range(2)]
    resident: Any = None
    streamed: Any = None
    for name in ("encode", "denoise", "decode"):
        stage = PipelineStage(ref, name)
        parts = [Weights(component, module, CPU, unified=False) for component, module in modules(stage.pipeline)]
        for weights in parts:
            weights.place(())
        resident = stage.run(items, resident)
        for weights in parts:
            weights.place(range(len(weights.block_bytes)))
            assert len(weights.streamed) > 1
        streamed = stage.run(items, streamed)
    for one, other in zip(resident, streamed, strict=True):
        assert one.shape == other.shape and (one == other).all() and one.any()
