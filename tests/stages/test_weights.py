"""The bytes of weights are read from their files' heads and are those that a worker will hold; costs go by model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dfdask.blocks import kept_bytes
from dfdask.errors import ModelError
from dfdask.spec import JobSpec
from dfdask.speed import Quantization, Speed
from dfdask.stages import weights
from dfdask.stages.component import find_blocks
from dfdask.stages.model import WHOLE, ModelRef, digest, model_ref
from dfdask.stages.weights import component_bytes, cost_key

Tiny = Callable[[str], Path]
VAE = "vae/diffusion_pytorch_model.safetensors"


def ref_of(folder: Path, dtype: str = "float32") -> ModelRef:
    return ModelRef(str(folder), digest(folder), dtype, "cpu", False)


def by_part(folder: Path, dtype: str = "float32") -> dict[str, int]:
    return {name.partition("/")[2]: size for name, size in component_bytes(ref_of(folder, dtype)).whole[WHOLE].items()}


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a small Stable Diffusion, to be changed."""
    return Path(shutil.copytree(tiny("sd"), tmp_path / "model"))


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_are_those_of_the_loaded_parameters(tiny: Tiny, dtype: str, each: int) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd"))
    for name, size in by_part(tiny("sd"), dtype).items():
        assert size == each * sum(tensor.numel() for tensor in getattr(pipeline, name).state_dict().values()), name


def test_stages_share_the_whole_among_them(tiny: Tiny) -> None:
    found = component_bytes(ref_of(tiny("sd3"))).whole
    assert set(found) == {"encode", "denoise", "decode", WHOLE}
    parts = [name for stage, sizes in found.items() if stage != WHOLE for name in sizes]
    assert sorted(parts) == sorted(found[WHOLE]) and len(set(parts)) == len(parts)
    assert all(size > 0 for size in found[WHOLE].values())


@pytest.mark.parametrize(
    "make",
    [
        diffusers.FluxTransformer2DModel,
        diffusers.WanTransformer3DModel,
        diffusers.UNet2DConditionModel,
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig()),
        lambda: transformers.T5EncoderModel(transformers.T5Config(d_model=4096, d_ff=10240, num_layers=24)),
    ],
    ids=["flux", "wan", "unet", "clip", "t5"],
)
def test_what_stays_of_a_streamed_component_is_told_by_names_as_by_blocks(make: Callable[[], Any]) -> None:
    with torch.device("meta"):
        model = make()
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(model)]
    core = sum(numbers.values()) - sum(blocks)
    assert weights._kept(numbers) == core + kept_bytes(blocks, range(len(blocks))) < sum(numbers.values())


@pytest.mark.parametrize(
    ("backend", "options", "each"),
    [
        ("bitsandbytes_4bit", {"bnb_4bit_compute_dtype": "bfloat16"}, 0.5625),
        ("bitsandbytes_8bit", {}, 1.125),
        ("quanto", {"weights_dtype": "int4"}, 0.5625),
        ("quanto", {"weights_dtype": "float8"}, 1.125),
        ("torchao", {"quant_type": "int8wo"}, 1.125),
        ("torchao", {"quant_type": "something new, of float32"}, 2),
    ],
)
def test_quantised_weights_are_smaller(tiny: Tiny, backend: Any, options: dict[str, Any], each: float) -> None:
    ref = ref_of(tiny("flux"), "bfloat16")
    speed = Speed(quantize={"transformer": Quantization(backend=backend, options=options)})
    before, after = (component_bytes(one).whole["denoise"] for one in (ref, replace(ref, speed=speed)))
    (name,) = before
    assert after[name] == pytest.approx(before[name] / 2 * each, rel=1e-3)
    assert component_bytes(replace(ref, speed=speed, device="cuda")).streamed["denoise"] == after, "it is not streamed"


def test_weights_in_several_files_are_added_up(model: Path) -> None:
    before = by_part(model)
    tensors = load_file(model / VAE)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        path = model / "vae" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path)
    (model / VAE).unlink()
    assert by_part(model) == before


@pytest.mark.parametrize("variant", ["diffusion_pytorch_model.fp16", "diffusion_pytorch_model.non_ema"])
def test_a_variant_beside_the_weights_is_not_loaded_and_not_counted(model: Path, variant: str) -> None:
    before = by_part(model)
    half = {name: tensor.half() for name, tensor in load_file(model / VAE).items()}
    save_file(half, model / "vae" / f"{variant}.safetensors")
    assert by_part(model) == before


def test_the_dtype_of_the_file_does_not_matter(model: Path) -> None:
    before = by_part(model)
    save_file({name: tensor.half() for name, tensor in load_file(model / VAE).items()}, model / VAE)
    assert by_part(model) == before


def test_other_weights_have_other_names_and_equal_ones_the_same(model: Path, tiny: Tiny) -> None:
    names = set(component_bytes(ref_of(model)).whole[WHOLE])
    assert names == set(component_bytes(ref_of(tiny("sd"))).whole[WHOLE]), "a copy is the same model"
    tensors = load_file(model / VAE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / VAE)
    assert not names & set(component_bytes(ref_of(model)).whole[WHOLE])


def test_tensors_without_dimensions_and_other_facts_are_read(model: Path) -> None:
    before = by_part(model)["vae"]
    tensors = {**load_file(model / VAE), "scale": torch.tensor(2.0)}
    save_file(tensors, model / VAE, metadata={"format": "pt"})
    assert by_part(model)["vae"] == before + 4


def head(document: Any, data: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty": b"",
    "a page of a web site": b"<html>not found</html>" * 9,
    "a head of a petabyte": (1 << 50).to_bytes(8, "little") + b"{}",
    "a head cut short": head({"w": ENTRY})[:-5],
    "data cut short": head({"w": ENTRY}, bytes(7)),
    "data too long": head({"w": ENTRY}, bytes(9)),
    "a list": head([1, 2]),
    "no shape": head({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": head({"w": {"dtype": "F32", "shape": [2]}}),
    "no entry": head({"w": 3}),
    "no text": (4).to_bytes(8, "little") + b"\xff\xfe\xff\xfe",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_not_whole_is_named(model: Path, data: bytes) -> None:
    (model / VAE).write_bytes(data)
    with pytest.raises(
        ModelError, match=r"diffusion_pytorch_model\.safetensors cannot be loaded: .*save the model again"
    ):
        component_bytes(ref_of(model))


def fake(**fields: Any) -> JobSpec:
    return JobSpec(model={"fake": {"stages": {"encode": 0.1, "denoise": 1.0}, **fields}}, prompts=["a cat"])


def test_a_fake_model_has_the_bytes_that_its_job_says() -> None:
    found = component_bytes(model_ref(fake(weights={"denoise": 500}))).whole
    assert {stage: list(sizes.values()) for stage, sizes in found.items()} == {"encode": [0], "denoise": [500]}
    again, other = (component_bytes(model_ref(fake(weights={"denoise": size}))).whole for size in (500, 600))
    assert again == found and other["denoise"].keys() != found["denoise"].keys()


def bundled(**fields: Any) -> JobSpec:
    return JobSpec(**{"model": "bundled", "prompts": ["a cat"], **fields})


def key(spec: JobSpec) -> str:
    return cost_key(spec, model_ref(spec))


BASE = bundled(arguments={"num_inference_steps": 4, "height": 32})


@pytest.mark.parametrize(
    "same",
    [
        bundled(arguments={"height": 32, "num_inference_steps": 4}),
        bundled(arguments={"num_inference_steps": 4, "height": 32, "negative_prompt": "blurry"}),
        bundled(arguments={"num_inference_steps": 4, "height": 32}, prompts=["two dogs"], batch=2, seed=9),
    ],
    ids=["order", "texts", "prompts"],
)
def test_what_costs_the_same_is_learnt_together(same: JobSpec) -> None:
    assert key(same) == key(BASE)


@pytest.mark.parametrize(
    "other",
    [
        bundled(arguments={"num_inference_steps": 8, "height": 32}),
        bundled(arguments={"num_inference_steps": 4}),
        bundled(arguments={"num_inference_steps": 4, "height": 32}, dtype="bfloat16"),
        fake(),
    ],
    ids=["steps", "size", "dtype", "model"],
)
def test_what_costs_something_else_is_learnt_apart(other: JobSpec) -> None:
    assert key(other) != key(BASE)


def test_fake_models_of_other_seconds_are_learnt_apart() -> None:
    assert key(fake()) == key(fake()) != key(fake(stages={"encode": 0.1, "denoise": 2.0}))


def test_a_cost_key_shows_the_models_name_and_not_where_it_lies(model: Path, tiny: Tiny) -> None:
    spec = JobSpec(model=str(model), prompts=["a cat"])
    assert key(spec).startswith("model-") and "/" not in key(spec)
