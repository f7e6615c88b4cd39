"""A job's ``speed`` on tiny pipelines, by diffusers' own means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import ARGUMENTS

from dfdask.errors import ModelError
from dfdask.items import Item
from dfdask.speed import Speed
from dfdask.stages.cut import PipelineStage
from dfdask.stages.model import ModelRef, digest

Tiny = Callable[[str], Path]


def pictures(folder: Path, speed: dict[str, Any], steps: int = 4, calls: int = 1, family: str = "flux") -> list[Any]:
    """What ``calls`` calls of the same stages make."""
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False, speed=Speed(**speed))
    items = [Item(0, "i", "a red apple", 5, {**ARGUMENTS[family], "num_inference_steps": steps})]
    stages = [PipelineStage(ref, name) for name in ("encode", "denoise", "decode")]
    found = []
    for _ in range(calls):
        state: Any = None
        for stage in stages:
            state = stage.run(items, state)
        found.append(state[0].astype(int))
    return found


def test_an_attention_backend_makes_nearly_the_same(tiny: Tiny) -> None:
    (plain,), (other,) = pictures(tiny("flux"), {}), pictures(tiny("flux"), {"attention": "_native_math"})
    assert np.abs(plain - other).max() <= 2


def test_an_attention_backend_is_that_of_its_job_alone(tiny: Tiny) -> None:
    """Later jobs on the same worker, and strict ones, would compute otherwise than without it."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()
    (plain,), (other,) = pictures(tiny("flux"), {}), pictures(tiny("flux"), {"attention": "_native_math"})
    assert _AttentionBackendRegistry.get_active_backend() == before
    (again,) = pictures(tiny("flux"), {})
    assert (again == plain).all() and np.abs(plain - other).max() <= 2


def test_a_cache_forgets_between_calls(tiny: Tiny) -> None:
    (plain,) = pictures(tiny("flux"), {})
    first, second = pictures(tiny("flux"), {"first_block_cache": 0.9}, calls=2)
    assert (first == second).all(), "a call does not depend on the one before it"
    assert (first != plain).any(), "the cache was used"
    (careful,) = pictures(tiny("flux"), {"first_block_cache": 1e-9})
    assert (careful == plain).all()


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        ({"attention": "xformers"}, "speed.attention: transformer refuses it"),
        (
            {"quantize": {"transformer": {"backend": "bitsandbytes_8bit"}}},
            "speed.quantize.transformer: bitsandbytes_8bit",
        ),
        (
            {"quantize": {"transformer": {"backend": "bitsandbytes_4bit", "options": {"bnb_4bit_compute_dtype": 3}}}},
            r"bitsandbytes_4bit with {'bnb_4bit_compute_dtype': 3} fails on this worker",
        ),
    ],
)
def test_what_cannot_be_done_is_said(speed: dict[str, Any], message: str, tiny: Tiny) -> None:
    folder = tiny("flux")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False, speed=Speed(**speed))
    with pytest.raises(ModelError, match=message):
        PipelineStage(ref, "denoise")
    PipelineStage(ref, "decode")


@pytest.mark.slow
def test_compiled_blocks_make_nearly_the_same(tiny: Tiny) -> None:
    (plain,), (compiled,) = pictures(tiny("flux"), {}), pictures(tiny("flux"), {"compile": True})
    assert np.abs(plain - compiled).max() <= 2


@pytest.mark.slow
def test_compiled_blocks_are_streamed(tiny: Tiny) -> None:
    import torch

    from dfdask.stages.component import Weights, modules

    folder = tiny("flux")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False, speed=Speed(compile=True))
    items = [Item(0, "i", "a red apple", 5, {**ARGUMENTS["flux"], "num_inference_steps": 3})]
    state = PipelineStage(ref, "encode").run(items, None)
    stage = PipelineStage(ref, "denoise")
    ((name, module),) = modules(stage.pipeline)
    weights = Weights(name, module, torch.device("cpu"), unified=False)
    weights.place(())
    expected = stage.run(items, state)["decode"]
    weights.place(tuple(range(len(weights.block_bytes))))
    for _ in range(2):
        found = stage.run(items, state)["decode"]
        assert torch.allclose(found[0][0].value, expected[0][0].value, atol=1e-4)
