"""What stages cost is counted without weights, as the shapes say, and shown by ``dfdask inspect``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from tiny_families import ARGUMENTS as MORE
from tiny_models import ARGUMENTS, save_tiny
from torch.utils.flop_counter import FlopCounterMode

from dfdask.cli import main
from dfdask.items import Item
from dfdask.spec import JobSpec
from dfdask.stages import profile as profiling
from dfdask.stages.batch import Batch, nbytes, run_batch
from dfdask.stages.cut import PipelineStage, pipeline_call
from dfdask.stages.model import ModelRef, digest, model_ref
from dfdask.stages.profile import StageProfile, example_item, stage_profiles

Tiny = Callable[[str], Path]


def profiles(folder: Path, family: str, **more: Any) -> tuple[ModelRef, Any, dict[str, StageProfile]]:
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    item = example_item(ref, {"num_inference_steps": 3, **{**ARGUMENTS, **MORE}.get(family, {}), **more})
    return ref, item, stage_profiles(ref, item)


@pytest.mark.parametrize("family", ["sd", "wan_i2v"])
def test_counts_are_those_of_a_real_run(tiny: Tiny, family: str) -> None:
    ref, item, found = profiles(tiny(family), family)
    batch = Batch.start([item])
    for name, profile in found.items():
        assert not profile.problem
        stage = PipelineStage(ref, name)
        with FlopCounterMode(display=False) as counted:
            batch = run_batch(name, stage, batch)
        # On the CPU, torch counts nothing for fused attention.
        assert profile.linear_flops == pytest.approx(
            sum(count for kind, count in counted.get_flop_counts()["Global"].items() if "bmm" not in str(kind)),
            rel=1e-6,
        )
        assert profile.bytes_moved > sum(profile.weight_bytes.values())
        (group,) = batch.groups
        handed = sum(array.nbytes for array in group.state) if name == "decode" else nbytes(group.state)
        assert profile.handoff_bytes == handed
    steps = found["denoise"].calls
    assert all(count in (3, 6) for count in steps.values()), steps


def test_attention_by_hand(tiny: Tiny) -> None:
    """FLUX has one block of each kind, 2 heads of 16, and 4 + 16 tokens; a product of matrices is 2 m n k."""
    _, _, found = profiles(tiny("flux"), "flux")
    tokens, heads, width, blocks, steps = 4 + 16, 2, 16, 2, 3
    assert found["denoise"].attention_flops == steps * blocks * heads * 2 * (2 * tokens * tokens * width)


@pytest.mark.parametrize("family", ["sd3", "ltx_i2v"])
def test_no_weight_is_read(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are not to be read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    _, _, found = profiles(tiny(family), family)
    assert list(found) == ["encode", "denoise", "decode"] and not any(stage.problem for stage in found.values())
    assert ("vae" in found["encode"].weight_bytes) is (family == "ltx_i2v")


def test_more_pixels_and_steps_cost_more(tiny: Tiny) -> None:
    _, _, small = profiles(tiny("sd"), "sd")
    _, _, large = profiles(tiny("sd"), "sd", height=64, width=32, num_inference_steps=6)
    assert 3 < large["denoise"].linear_flops / small["denoise"].linear_flops < 4, "texts cost the same"
    assert large["encode"].linear_flops == small["encode"].linear_flops


def test_a_call_is_counted_once_for_any_number_of_steps(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    profiling._known_calls.cache_clear()
    _, _, few = profiles(tiny("sd"), "sd")
    monkeypatch.setattr(profiling, "_run", lambda *_: pytest.fail("it was counted before"))
    _, _, more = profiles(tiny("sd"), "sd", num_inference_steps=6)
    assert few["decode"] == more["decode"] and few["denoise"].calls != more["denoise"].calls


def test_what_cannot_be_counted_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    profiling._known_calls.cache_clear()

    def looks(self: Any, *args: Any, **kwargs: Any) -> None:
        if args[0].max() > 0:
            raise AssertionError("it has numbers")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", looks)
    _, _, found = profiles(tiny("sd"), "sd")
    assert found["encode"].linear_flops > 0 and not found["encode"].problem
    for name in ("denoise", "decode"):
        assert "unet cannot run without numbers" in found[name].problem and found[name].linear_flops == 0
        assert sum(found[name].weight_bytes.values()) > 0
    output = CliRunner().invoke(main, ["inspect", str(tiny("sd")), "--dtype", "float32"]).output
    assert "not counted" in output and "unet cannot run without numbers" in output


def test_the_command(tiny: Tiny) -> None:
    size = ["--set", "height=64", "--set", "width=32"]
    result = CliRunner().invoke(main, ["inspect", str(tiny("sd")), "--dtype", "float32", *size, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["pipeline"], found["shape"], found["uncut"]) == ("StableDiffusionPipeline", [64, 32], None)
    assert [stage["name"] for stage in found["stages"]] == ["encode", "denoise", "decode"]
    unet = found["stages"][1]["components"][0]
    assert (unet["name"], unet["class"]) == ("unet", "UNet2DConditionModel")
    assert unet["bytes"] == 4 * unet["parameters"] > 0
    shown = CliRunner().invoke(main, ["inspect", str(tiny("ddpm")), "--dtype", "float32"]).output
    assert "It runs whole, as one stage: it has no encode_prompt." in shown and "generate" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "there is no model directory"), (["bundled", "--set", "height"], "must be NAME=VALUE")],
)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["inspect", *arguments])
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


PRODUCTS = ("aten.mm", "aten.addmm", "aten.convolution")


@pytest.mark.parametrize("family", ["sd3", "pixart_sigma", "wan"])
def test_a_batch_of_the_plain_pipeline_takes_the_same(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    ref = model_ref(JobSpec(model=str(folder), prompts=["a"]))
    arguments = {**ARGUMENTS[family], "num_inference_steps": 2}
    batch = [Item(row, str(row), "a red apple", row, arguments) for row in range(2)]
    profiles = stage_profiles(ref, batch[0])
    counted = {name: profile.item_work.work(len(batch)) for name, profile in profiles.items()}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' schedulers and numpy 2
        pipeline(**pipeline_call(pipeline, batch))
    real = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    # Attention on the CPU is one operation that torch does not count: only its linear parts can be compared.
    linear = sum(count for name, count in real.items() if name in PRODUCTS)
    assert sum(work.linear_flops for work in counted.values()) == pytest.approx(linear)
    assert list(counted) == ["encode", "denoise", "decode"]
    assert all(work.linear_flops > 0 for work in counted.values())
    assert counted["denoise"].calls >= 2
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(parameter.numel() * 4 for part in parts for parameter in part.parameters())
    assert sum(size for profile in profiles.values() for size in profile.weight_bytes.values()) == weights
