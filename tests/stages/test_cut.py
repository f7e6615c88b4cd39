"""A pipeline in stages makes what the pipeline makes in one call."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from distributed.protocol import deserialize, serialize
from tiny_models import ARGUMENTS, Pixels, monolithic

import dfdask.wire  # noqa: F401  registers how micro-batches travel
from dfdask.errors import ModelError
from dfdask.items import Item
from dfdask.stages.batch import Batch, nbytes, run_batch
from dfdask.stages.cut import Phantom, PipelineStage, open_pipeline, stage_names
from dfdask.stages.model import ModelRef, digest

FAMILIES = tuple(ARGUMENTS)
PROMPTS = ("a red Apple", "two dogs, 1 cat", "nothing but the sea")
ROUNDING = 2
"""uint8 steps that other batch sizes may cost: pixels differ by some 1e-6 before they are rounded."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2

Tiny = Callable[[str], Path]


def reference(folder: Path, dtype: str = "float32", strict: bool = True) -> ModelRef:
    return ModelRef(str(folder), digest(folder), dtype, "cpu", strict)


def make_items(arguments: Mapping[str, Any], each: Sequence[Mapping[str, Any]] = ({}, {}, {})) -> list[Item]:
    """Three items; ``each`` has what an item sets itself."""
    common = {"num_inference_steps": 2, **arguments}
    return [
        Item(row, f"item-{row}", prompt, 1000 + 7 * row, {**common, **own})
        for row, (prompt, own) in enumerate(zip(PROMPTS, each, strict=True))
    ]


def travelled(batch: Batch) -> Batch:
    """As another process gets it."""
    header, frames = serialize(batch, serializers=["dask"], on_error="raise")
    result: Batch = deserialize(header, [bytearray(frame) for frame in frames])
    return result


def staged(ref: ModelRef, items: Sequence[Item]) -> Pixels:
    batch = Batch.start(items)
    for name in stage_names(Path(ref.source)):
        batch = travelled(run_batch(name, PipelineStage(ref, name), batch))
    assert not batch.failures
    return [picture for group in batch.groups for picture in group.state]


def assert_same(found: Pixels, expected: Pixels, within: int = 0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
        assert np.abs(one.astype(int) - other.astype(int)).max() <= within


@pytest.mark.parametrize(
    ("family", "guided"), [*((name, True) for name in FAMILIES), ("sd", False), ("pixart_sigma", False)]
)
def test_three_stages_make_what_one_call_makes(tiny: Tiny, family: str, guided: bool) -> None:
    ref = reference(tiny(family))
    assert stage_names(Path(ref.source)) == ("encode", "denoise", "decode")
    items = make_items(ARGUMENTS[family] if guided else {**ARGUMENTS[family], "guidance_scale": 1.0})
    found = staged(ref, items)
    assert_same(found, monolithic(ref, items))
    assert not np.array_equal(found[0], found[1]) and found[0].std() > 1, "a picture of nothing proves nothing"


@pytest.mark.parametrize("family", ["sd", "sd3", "pixart_sigma", "wan"])
def test_each_item_has_its_own_negative_prompt(tiny: Tiny, family: str) -> None:
    ref = reference(tiny(family))
    wanted = ["blurry", "dark", "green, greener"]
    items = make_items(ARGUMENTS[family], [{"negative_prompt": text} for text in wanted])
    found = staged(ref, items)
    assert_same(found, monolithic(ref, items, negative_prompt=wanted))
    others = staged(ref, make_items(ARGUMENTS[family], [{"negative_prompt": "blurry"}] * 3))
    assert np.array_equal(found[0], others[0]) and not np.array_equal(found[1], others[1])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_each_item_has_its_own_second_prompt(tiny: Tiny, family: str) -> None:
    ref = reference(tiny(family))
    wanted = ["in oil", "as a drawing", "at night"]
    items = make_items(ARGUMENTS[family], [{"prompt_2": text} for text in wanted])
    assert_same(staged(ref, items), monolithic(ref, items, prompt_2=wanted))


@pytest.mark.parametrize("family", ["sd"])
def test_the_noise_of_an_item_does_not_depend_on_its_neighbours(tiny: Tiny, family: str) -> None:
    ref = reference(tiny(family), strict=False)
    items = make_items(ARGUMENTS[family])
    together = staged(ref, items)
    assert_same(staged(ref, [items[2], items[0], items[1]]), [together[2], together[0], together[1]], ROUNDING)
    for item, picture in zip(items, together, strict=True):
        assert_same(staged(ref, [item]), [picture], ROUNDING)
    again = [replace(item, seed=item.seed + 1) for item in items]
    assert np.abs(staged(ref, again)[0].astype(int) - together[0]).max() > 10 * ROUNDING


@pytest.mark.parametrize("family", ["flux", "pixart_alpha", "wan"])
def test_bfloat16_travels_and_gives_what_one_call_gives(tiny: Tiny, family: str) -> None:
    ref = reference(tiny(family), "bfloat16")
    items = make_items(ARGUMENTS[family])
    assert_same(staged(ref, items), monolithic(ref, items))


def test_a_job_may_have_any_size_and_number_of_steps(tiny: Tiny) -> None:
    ref = reference(tiny("sd"))
    items = make_items({"height": 64, "width": 40, "num_inference_steps": 3, "guidance_scale": 3, "eta": 0.5})
    found = staged(ref, items)
    assert found[0].shape == (64, 40, 3)
    assert_same(found, monolithic(ref, items))


@pytest.mark.parametrize("family", ["pixart_alpha", "pixart_sigma"])
def test_the_pipelines_own_resizing_is_kept(tiny: Tiny, tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(tiny(family), tmp_path / "model")
    path = folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 32}))  # the smallest with bins
    ref = reference(folder)
    items = make_items({"height": 200, "width": 296, "use_resolution_binning": True})
    found = staged(ref, items)
    assert found[0].shape == (200, 296, 3)
    assert_same(found, monolithic(ref, items))
    check_all_but_one(ref, items, "decode")


def test_a_pipeline_without_cuts_is_one_stage(tiny: Tiny) -> None:
    ref = reference(tiny("ddpm"))
    items = make_items({})
    found = staged(ref, items)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(ref.source)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
    expected = pipeline(batch_size=3, generator=generators, num_inference_steps=2, output_type="np")[0]
    assert stage_names(Path(ref.source)) == ("generate",)
    assert_same(found, [(picture * 255).round().astype(np.uint8) for picture in expected])


def test_the_safety_checker_runs_where_the_vae_is(tiny: Tiny, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-1.0)  # nothing is safe
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny("sd"))
    pipeline.register_modules(
        safety_checker=checker.eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    pipeline.save_pretrained(tmp_path / "model")
    ref = reference(tmp_path / "model")
    assert not any(picture.any() for picture in staged(ref, make_items(ARGUMENTS["sd"])))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_holds_the_weights_of_its_own_components_only(tiny: Tiny, family: str) -> None:
    ref = reference(tiny(family))
    owners: dict[str, list[str]] = {}
    for stage in stage_names(Path(ref.source)):
        pipeline = open_pipeline(ref, stage, "cpu")
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                assert all(parameter.device.type == "cpu" for parameter in part.parameters())
                assert not part.training
                owners.setdefault(name, []).append(stage)
            elif isinstance(part, Phantom):
                assert all(parameter.device.type == "meta" for parameter in part.parameters())
                owners.setdefault(name, [])
    assert all(len(stages) == 1 for stages in owners.values()), owners
    assert {"encode", "denoise", "decode"} == {stage for stages in owners.values() for stage in stages}


def test_what_decode_does_not_need_is_not_handed_to_it(tiny: Tiny) -> None:
    ref = reference(tiny("sd3"))
    batch = run_batch("encode", PipelineStage(ref, "encode"), Batch.start(make_items(ARGUMENTS["sd3"])))
    embeddings = nbytes([group.state for group in batch.groups])
    batch = run_batch("denoise", PipelineStage(ref, "denoise"), batch)
    latents = 3 * 4 * 4 * 4 * 4
    assert embeddings > 10 * latents > 0
    assert latents <= nbytes([group.state for group in batch.groups]) < 2 * latents


class Picky(PipelineStage):
    """A stage that cannot do ``item-1``, nor a call with it."""

    def run(self, items: Sequence[Item], state: Any) -> Any:
        done = super().run(items, state)
        if any(item.id == "item-1" for item in items):
            raise RuntimeError("this one not")
        return done


@pytest.mark.parametrize("culprit", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_item_that_fails_costs_one_item(tiny: Tiny, family: str, culprit: str) -> None:
    ref = reference(tiny(family))
    items = make_items(ARGUMENTS[family])
    check_all_but_one(ref, items, culprit)


@pytest.mark.parametrize("culprit", ["denoise", "decode"])
@pytest.mark.parametrize("family", ["flux"])
def test_what_the_items_share_is_not_divided_whatever_its_size(tiny: Tiny, family: str, culprit: str) -> None:
    """FLUX has an identifier per token for all items together: here as many tokens as items."""
    ref = reference(tiny(family))
    items = make_items({**ARGUMENTS[family], "max_sequence_length": 3})
    check_all_but_one(ref, items, culprit)


def check_all_but_one(ref: ModelRef, items: Sequence[Item], culprit: str) -> None:
    batch = Batch.start(items)
    for name in stage_names(Path(ref.source)):
        kind = Picky if name == culprit else PipelineStage
        batch = travelled(run_batch(name, kind(ref, name), batch))
    assert batch.failures == {1: f"{culprit}: RuntimeError: this one not"}
    found = [
        (item.id, picture) for group in batch.groups for item, picture in zip(group.items, group.state, strict=True)
    ]
    assert [name for name, _ in found] == ["item-0", "item-2"]
    expected = monolithic(ref, items)
    assert_same([picture for _, picture in found], [expected[0], expected[2]], ROUNDING)


def test_two_threads_may_use_a_stage_at_once(tiny: Tiny) -> None:
    """A worker of the user's own cluster may have more than one thread."""
    ref = reference(tiny("sd"))
    items = make_items({**ARGUMENTS["sd"], "num_inference_steps": 4})
    expected = [staged(ref, [item])[0] for item in items]
    stages = [(name, PipelineStage(ref, name)) for name in stage_names(Path(ref.source))]
    together = threading.Barrier(3)

    def run(item: Item) -> Pixels:
        batch = Batch.start([item])
        for name, stage in stages:
            together.wait(30)
            batch = run_batch(name, stage, batch)
        assert not batch.failures
        return list(batch.groups[0].state)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert_same([pixels[0] for pixels in pool.map(run, items)], expected)


def test_workers_refuse_files_that_differ_from_the_jobs(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("sd"), tmp_path / "model")
    ref = reference(folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="differs from the one that the job was submitted with"):
        PipelineStage(ref, "denoise")


@pytest.mark.parametrize("damage", ["cut short", "not safetensors"])
def test_damaged_weights_are_named(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny("sd"), tmp_path / "model")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000] if damage == "cut short" else b"never weights" * 9)
    ref = reference(folder)
    with pytest.raises(ModelError, match=r"vae \(AutoencoderKL\) cannot be loaded") as caught:
        PipelineStage(ref, "decode")
    assert "\n" not in str(caught.value) and "download or save the model again" in str(caught.value)
    PipelineStage(ref, "encode")  # it does not need them


def test_a_device_that_is_not_there(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = replace(reference(tiny("sd")), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA GPU"):
        PipelineStage(ref, "decode")
    monkeypatch.setenv("DFDASK_DEVICE", "cpu")  # the worker's own setting wins
    PipelineStage(ref, "decode")
