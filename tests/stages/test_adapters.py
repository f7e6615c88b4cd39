"""LoRA adapters and other schedulers: each stage loads its part, and the pixels are those of the plain pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARGUMENTS, Pixels

from dfdask.errors import DfdaskError, ModelError, SpecError
from dfdask.items import Item
from dfdask.spec import JobSpec, diff_specs
from dfdask.stages.batch import Batch, run_batch
from dfdask.stages.check import check_job
from dfdask.stages.cut import PipelineStage, open_pipeline, stage_names
from dfdask.stages.model import ModelRef, model_ref

Tiny = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2


@pytest.fixture(scope="module")
def lora(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the U-Net and the text encoder of "sd"."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny("sd"), safety_checker=None)
    layers = {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
            part = getattr(pipeline, name)
            part.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
            state = peft.utils.get_peft_model_state_dict(part)
            layers[name] = {key: tensor * 5 for key, tensor in state.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"]
    )
    return folder


def spec(model: Path, **fields: Any) -> JobSpec:
    return JobSpec(model=str(model), prompts=["a"], strict=True, **fields)


def make_items(family: str) -> list[Item]:
    arguments = {"num_inference_steps": 3, **ARGUMENTS[family]}
    return [Item(row, f"item-{row}", f"cat {row}", 50 + row, arguments) for row in range(2)]


def staged(ref: ModelRef, family: str) -> Pixels:
    batch = Batch.start(make_items(family))
    for name in stage_names(Path(ref.source)):
        batch = run_batch(name, PipelineStage(ref, name), batch)
    assert not batch.failures
    return list(batch.groups[0].state)


def plain(pipeline: Any, family: str) -> Pixels:
    pipeline.set_progress_bar_config(disable=True)
    items = make_items(family)
    generators = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
    prompts = [item.prompt for item in items]
    output = pipeline(prompt=prompts, generator=generators, output_type="np", **items[0].arguments)[0]
    return [(picture * 255).round().astype(np.uint8) for picture in output]


def test_a_lora_changes_the_stages_that_have_its_components(tiny: Tiny, lora: Path) -> None:
    ref = model_ref(spec(tiny("sd"), adapters=[{"path": lora, "scale": 0.7}]))
    for stage, part, other in (("encode", "text_encoder", "unet"), ("denoise", "unet", "text_encoder")):
        found = open_pipeline(ref, stage, "cpu").get_list_adapters()
        assert part in found and other not in found
    assert open_pipeline(ref, "decode", "cpu").get_list_adapters() == {}
    found = staged(ref, "sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny("sd"), safety_checker=None)
    without = plain(pipeline, "sd")
    pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors", adapter_name="ink")
    pipeline.set_adapters(["ink"], [0.7])
    for one, same, other in zip(found, plain(pipeline, "sd"), without, strict=True):
        assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_another_scheduler(tiny: Tiny) -> None:
    options = {"use_karras_sigmas": True}
    ref = model_ref(spec(tiny("sd"), scheduler={"class": "EulerDiscreteScheduler", "options": options}))
    found = staged(ref, "sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny("sd"), safety_checker=None)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **options)
    assert all(map(np.array_equal, found, plain(pipeline, "sd")))


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"class": "EulerDiscreetScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"class": "DDIMScheduler", "options": {"beta_strat": 0.1}}, "did you mean 'beta_start'"),
        ({"class": "DDIMScheduler", "options": {"beta_schedule": "wavy"}}, "DDIMScheduler refuses"),
    ],
)
def test_a_scheduler_that_there_is_not(tiny: Tiny, scheduler: dict[str, Any], said: str) -> None:
    ref = model_ref(spec(tiny("sd"), scheduler=scheduler))
    with pytest.raises(SpecError, match="scheduler") as caught:
        check_job(ref, make_items("sd"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scheduler": {"class": "os.system"}}, "scheduler.class"),
        ({"scheduler": {"clas": "DDIMScheduler"}}, "class"),
        ({"adapters": [{"path": "a", "weight_name": "a.bin"}]}, "weight_name"),
        ({"adapters": [{"path": "a", "scale": "much"}]}, "scale"),
        ({"adapters": "ink.safetensors"}, "adapters"),
    ],
)
def test_what_the_job_itself_refuses(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec(model="bundled", prompts=["a"], **fields)
    assert said in str(caught.value)


def refused(model: Path, path: Path | str, **more: Any) -> str:
    with pytest.raises(DfdaskError) as caught:
        model_ref(spec(model, adapters=[{"path": path, **more}]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_that_cannot_be_taken(tiny: Tiny, lora: Path, tmp_path: Path) -> None:
    model = tiny("sd")
    torch.save({}, tmp_path / "lora.bin")
    assert "safetensors only" in refused(model, tmp_path / "lora.bin")
    assert "needs `weight_name`" in refused(model, tmp_path)
    assert "there is no adapter" in refused(model, "./nowhere")
    (tmp_path / "torn.safetensors").write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes()[:100])
    assert "cannot be read" in refused(model, tmp_path / "torn.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "has no LoRA weights" in refused(model, tmp_path / "other.safetensors")


def test_an_adapter_that_does_not_fit_or_was_changed(tiny: Tiny, lora: Path, tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{key}.lora_A.weight": torch.ones(2, 99), f"{key}.lora_B.weight": torch.ones(99, 2)}, path)
    ref = model_ref(spec(tiny("sd"), adapters=[{"path": path}]))
    with pytest.raises(ModelError, match="does not fit StableDiffusionPipeline"):
        PipelineStage(ref, "denoise")
    changed = replace(ref, adapters=(replace(ref.adapters[0], digest="other"),))
    with pytest.raises(ModelError, match="differs from the one that the job was submitted with"):
        PipelineStage(changed, "encode")


def unet_only(lora: Path, folder: Path) -> Path:
    weights = load_file(lora / "pytorch_lora_weights.safetensors")
    path = folder / "unet.safetensors"
    save_file({key: tensor for key, tensor in weights.items() if key.startswith("unet.")}, path)
    return path


def test_an_adapter_may_have_nothing_for_the_components_of_a_stage(tiny: Tiny, lora: Path, tmp_path: Path) -> None:
    ref = model_ref(spec(tiny("sd"), adapters=[{"path": unet_only(lora, tmp_path)}]))
    check_job(ref, make_items("sd"))
    for stage, found in (("encode", {}), ("denoise", {"unet": ["adapter_0"]}), ("decode", {})):
        assert open_pipeline(ref, stage, "cpu").get_list_adapters() == found


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_an_adapter_of_another_model_is_refused(tiny: Tiny, lora: Path, tmp_path: Path, family: str) -> None:
    own, foreign = tmp_path / "own.safetensors", unet_only(lora, tmp_path)
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 1), "transformer.x.lora_B.weight": torch.ones(1, 1)}, own)
    ref = model_ref(spec(tiny(family), adapters=[{"path": own}, {"path": foreign}]))
    with pytest.raises(ModelError, match=r"unet\.safetensors .*use a LoRA that was made for this model") as caught:
        check_job(ref, make_items(family))
    assert "\n" not in str(caught.value)
    for stage in stage_names(tiny(family)):
        with pytest.raises(ModelError, match="use a LoRA that was made for this model"):
            PipelineStage(model_ref(spec(tiny(family), adapters=[{"path": foreign}])), stage)


def test_they_are_part_of_the_run(lora: Path) -> None:
    one = spec(Path("bundled"), adapters=[{"path": lora}], scheduler={"class": "DDIMScheduler"}).canonical()
    other = spec(Path("bundled"), scheduler={"class": "DDIMScheduler", "options": {"beta_start": 0.1}}).canonical()
    none = spec(Path("bundled")).canonical()
    assert "adapters" not in none and "scheduler" not in none, "runs of earlier versions go on"
    assert {change.split(":")[0] for change in diff_specs(one, other)} == {"adapters", "scheduler.options.beta_start"}
