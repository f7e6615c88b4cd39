"""What one job encoded, another finds; and nothing that lies there can do harm."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import make_picture
from safetensors.torch import save
from tiny_families import ARGUMENTS as MORE
from tiny_models import ARGUMENTS

import dfdask
from dfdask.items import Item
from dfdask.stages.batch import Batch, Rows, run_batch
from dfdask.stages.cut import PipelineStage, stage_names
from dfdask.stages.encodings import FOLDER, Shelf, packed, unpacked
from dfdask.stages.model import ModelRef, digest
from dfdask.targets import Location

leaves = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=5))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        inner.map(Rows),
    ),
    max_leaves=12,
)


@given(trees)
def test_what_is_packed_comes_back(tree: Any) -> None:
    assert unpacked(packed(tree)) == tree


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_tensors_come_back_bit_by_bit_and_laid_out_as_they_were(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    back = unpacked(packed({"x": [Rows(tensor), tensor[:, :0]]}))["x"]
    assert torch.equal(back[0].value, tensor) and back[0].value.stride() == tensor.stride()
    assert back[1].shape == (2, 0, 4, 5) and back[1].dtype == dtype


def test_outputs_of_the_libraries_come_back_as_what_they_are() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from transformers.modeling_outputs import BaseModelOutput

    from dfdask.stages.state import apart, together

    made = BaseModelOutput(last_hidden_state=torch.ones(1, 2))
    back = unpacked(packed(apart([made, DiagonalGaussianDistribution(torch.ones(1, 4, 2, 2))])))
    output, distribution = together(back)
    assert type(output) is BaseModelOutput and torch.equal(output.last_hidden_state, made.last_hidden_state)
    assert type(distribution) is DiagonalGaussianDistribution and distribution.mean.shape == (1, 2, 2, 2)


@pytest.mark.parametrize(
    "tree",
    [
        ["dict", "builtins:dict", []],
        ["dict", "os:environ", []],
        ["dict", "transformers.utils.hub:cached_file", []],
        ["parts", "subprocess:Popen", ["dict", None, []]],
        ["parts", "diffusers.nowhere:Class", ["dict", None, []]],
        ["tensor", "7", []],
        ["value", [1]],
        ["eval", "1"],
        [],
        "text",
        7,
    ],
)
def test_a_file_that_is_no_encoding_is_refused(tree: Any) -> None:
    with pytest.raises(ValueError):
        unpacked(save({"0": torch.ones(1)}, {"tree": json.dumps(tree)}))


@pytest.mark.parametrize("data", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      ", save({"0": torch.ones(1)})])
def test_a_broken_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpacked(data)


def items_of(prompts: Sequence[str], seed: int, arguments: dict[str, Any]) -> list[Item]:
    return [Item(row, f"{row}", text, seed + row, arguments) for row, text in enumerate(prompts)]


def computed(ref: ModelRef, items: list[Item]) -> tuple[list[Any], int]:
    """The pixels, and how many items were encoded for them; in stages that were just opened."""
    stages = [(name, PipelineStage(ref, name)) for name in stage_names(Path(ref.source))]
    batch = Batch.start(items)
    for name, stage in stages:
        batch = run_batch(name, stage, batch)
    assert not batch.failures
    encoder = stages[0][1].encoder
    if encoder._cache._shelf is not None:
        encoder._cache._shelf.flush()
    return [picture for group in batch.groups for picture in group.state], encoder.computed_items


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "wan", "sd_img2img"])
@pytest.mark.parametrize("strict", [True, False])
def test_another_process_finds_what_one_has_encoded(
    tiny: Callable[[str], Path], tmp_path: Path, family: str, strict: bool
) -> None:
    folder = tiny(family)
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", strict)
    arguments: dict[str, Any] = {**{**ARGUMENTS, **MORE}[family], "num_inference_steps": 2}
    if family == "sd_img2img":
        arguments.update(image=make_picture(5), strength=1.0)
    sharing = replace(ref, encodings=Location("local", str(tmp_path), "run"))
    plain, _ = computed(ref, items_of("abc", 1, arguments))
    first, encoded = computed(sharing, items_of("abc", 1, arguments))
    assert encoded == 3 and list((tmp_path / FOLDER).rglob("*.safetensors"))
    again, encoded = computed(sharing, items_of("abc", 1, arguments))
    assert encoded == 0 and all(map(np.array_equal, plain, first)) and all(map(np.array_equal, again, first))
    other, encoded = computed(replace(sharing, dtype="bfloat16"), items_of("abc", 1, arguments))
    assert encoded == 3, "another dtype is another encoding"


def test_a_shelf_that_cannot_be_used_costs_nothing_but_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ref = ModelRef("m", "digest", "float32", "cpu", False)
    shelf = Shelf(Location("local", str(tmp_path), "run"), ref)
    shelf.put("key", {"x": torch.ones(2)})
    shelf.put("other", {"x": object()})
    shelf.flush()
    (path,) = (tmp_path / FOLDER).rglob("*.safetensors")
    found, nothing = shelf.get(["key", "other"])
    assert torch.equal(found["x"], torch.ones(2)) and nothing is None
    path.write_bytes(path.read_bytes()[:-3])
    assert shelf.get(["key"]) == [None] and "made again" in caplog.text
    (tmp_path / "file").touch()
    blocked = Shelf(Location("local", str(tmp_path / "file"), "run"), ref)
    blocked.put("key", {"x": torch.ones(2)})
    blocked.flush()
    assert blocked.get(["key"]) == [None]


def test_a_job_shares_its_encodings_in_object_storage(
    tiny: Callable[[str], Path], s3: Location, s3_client: Any, tmp_path: Path
) -> None:
    job = {
        "model": str(tiny("sd")),
        "arguments": {**ARGUMENTS["sd"], "num_inference_steps": 2},
        "share_encodings": True,
        "workers": 1,
    }
    outputs = [f"bucket/{name}-{s3.name}" for name in ("one", "two")]
    for seed, output in enumerate(outputs):
        run = dfdask.submit(job, prompts=["red", "blue", "red"], seed=seed, output=output).wait(timeout=120)
        assert run.progress.committed_items == 3 and run.progress.failed_items == 0
        names = [entry["Key"] for entry in s3_client.list_objects_v2(Bucket=s3.root.partition("/")[0])["Contents"]]
        kept = [name for name in names if f"/{FOLDER}/" in name]
        assert len(kept) == 2, "of either prompt, and the second job adds none"
