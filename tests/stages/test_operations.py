"""Operations counted without weights are those of the real call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_models import ARGUMENTS, save_tiny
from torch.utils.flop_counter import FlopCounterMode

from dfdask.items import Item
from dfdask.spec import JobSpec
from dfdask.stages.cut import pipeline_call
from dfdask.stages.model import model_ref
from dfdask.stages.operations import count_operations

PRODUCTS = ("aten.mm", "aten.addmm", "aten.convolution")


def items(arguments: dict[str, Any]) -> list[Item]:
    return [Item(row, str(row), "a red apple", row, arguments) for row in range(2)]


@pytest.mark.parametrize("family", ["sd3", "pixart_sigma", "wan"])
def test_the_real_call_takes_the_same(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    ref = model_ref(JobSpec(model=str(folder), prompts=["a"]))
    batch = items({**ARGUMENTS[family], "num_inference_steps": 2})
    counted = count_operations(ref, batch)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' schedulers and numpy 2
        pipeline(**pipeline_call(pipeline, batch))
    real = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    # Attention on the CPU is one operation that torch does not count: only its linear parts can be compared.
    linear = sum(count for name, count in real.items() if name in PRODUCTS)
    assert sum(stage.work.linear_flops for stage in counted.values()) == pytest.approx(linear)
    assert list(counted) == ["encode", "denoise", "decode"]
    assert all(stage.work.linear_flops > 0 and stage.weights for stage in counted.values())
    assert counted["denoise"].work.calls >= 2
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(parameter.numel() * 4 for part in parts for parameter in part.parameters())
    assert sum(size for stage in counted.values() for size in stage.weights.values()) == weights
