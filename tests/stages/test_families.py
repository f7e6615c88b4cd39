"""Each stage in a process of its own, on real workers: to the bit what the pipeline makes in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import tiny_models
import torch
from distributed import Client
from pictures import make_picture
from tiny_families import FROM_PICTURES, MASKED
from tiny_models import Pixels, monolithic

from dfdask.items import Item
from dfdask.stages.batch import Batch
from dfdask.stages.cut import stage_names
from dfdask.stages.model import ModelRef, digest
from dfdask.worker import run_stage

ARGUMENTS = {**tiny_models.ARGUMENTS, **tiny_families.ARGUMENTS}
DIFFERENT = ("sdxl", "qwen", "ltx_i2v", "sd_inpaint", "wan_i2v", "hunyuan")
"""Those that have most that the others have not; the rest takes its time."""
ONE_BY_ONE = {"wan_i2v", "qwen_img2img"}
"""Their pipelines cannot take a list of pictures with a list of prompts."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Client, dict[str, str]]]:
    """A client of three worker processes, and the address of each stage's own."""
    from dfdask.cluster import LocalFleet

    fleet = LocalFleet(3)
    with Client(fleet.address, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=60)
        addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
        yield client, dict(zip(("encode", "denoise", "decode"), addresses, strict=True))
    fleet.close()


def make_items(family: str) -> list[Item]:
    arguments = {"num_inference_steps": 3, **ARGUMENTS[family]}
    size = (arguments.get("width", tiny_models.SIZE), arguments.get("height", tiny_models.SIZE))
    items = []
    for row, prompt in enumerate(("a red Apple", "two dogs, 1 cat", "nothing but the sea")):
        own = {"image": make_picture(row, size)} if family in FROM_PICTURES else {}
        if family in MASKED:
            own["mask_image"] = make_picture(row, size, mask=True)
        items.append(Item(row, f"item-{row}", prompt, 1000 + 7 * row, {**arguments, **own}))
    return items


def one_call(ref: ModelRef, items: Sequence[Item]) -> Pixels:
    """The pipeline's own call; a single picture for a single item, else a list."""
    lists = {}
    for name in ("image", "mask_image"):
        if name in items[0].arguments:
            found = [item.arguments[name].open() for item in items]
            lists[name] = found if len(found) > 1 else found[0]
    return monolithic(ref, items, **lists)


def process(function: Any, *values: Any) -> tuple[int, Any]:
    return os.getpid(), function(*values)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.slow) for name in ARGUMENTS]
)
def test_a_process_for_each_stage_makes_what_one_call_makes(
    tiny: Callable[[str], Path], workers: tuple[Client, dict[str, str]], family: str
) -> None:
    client, addresses = workers
    folder = tiny(family)
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", strict=True)
    items = make_items(family)
    work: Any = tuple(items)
    processes = {os.getpid()}
    for stage in stage_names(folder):
        future = client.submit(process, run_stage, ref, stage, work, pure=False, workers=[addresses[stage]])
        pid, work = future.result(timeout=100)
        processes.add(pid)
    assert len(processes) == 4, "the client and three workers"
    assert isinstance(work, Batch) and work.problem is None and not work.failures
    assert [len(group.items) for group in work.groups] == ([1, 1, 1] if family in ONE_BY_ONE else [3])
    torch.set_num_threads(1)
    for group in work.groups:
        given = [items[item.index] for item in group.items]
        for found, expected in zip(group.state, one_call(ref, given), strict=True):
            assert np.abs(found.astype(int) - expected).max() == 0
            assert found.std() > 1, "a picture of nothing proves nothing"
