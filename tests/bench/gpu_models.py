"""Diffusers directories with random weights at the shapes of real models, written straight from a pool of noise.

No weights are fetched or kept in memory: each component's tensors are named on the meta device, and its safetensors
file is filled in place (format: 8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models  # noqa: E402

KINDS = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
POOL = 1 << 27


def save(name: str, folder: Path, tiny: bool = False) -> Path:
    """Write the model ``name`` to ``folder``; with ``tiny`` that family's model of the tests, for a dry run."""
    if tiny:
        return tiny_models.save_tiny({"flux": "flux", "sdxl": "sd", "sd35": "sd3", "wan": "wan"}[name], folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, parts = MODELS[name](folder)
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": _version()}
    index.update(EXTRA.get(name, {}))
    pool = _noise()
    with ThreadPoolExecutor(4) as threads:
        jobs = []
        for component, part in parts.items():
            home = folder / component
            home.mkdir(exist_ok=True)
            if isinstance(part, FunctionType):
                with torch.device("meta"):
                    model = part()
                library = "transformers" if hasattr(model, "config_class") else "diffusers"
                index[component] = [library, type(model).__name__]
                _save_config(model, home)
                jobs += _fill(model, home, library, pool, threads)
            else:
                part.save_pretrained(home)
                library = "diffusers" if hasattr(part, "set_timesteps") else "transformers"
                index[component] = [library, type(part).__name__]
        for job in jobs:
            job.result()
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _noise() -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(POOL, generator=generator, device=device) * 0.02).to(torch.bfloat16)


def _save_config(model: Any, home: Path) -> None:
    if hasattr(model, "config_class"):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(home)
    else:
        model.save_config(home)


def _fill(model: Any, home: Path, library: str, pool: torch.Tensor, threads: ThreadPoolExecutor) -> list[Any]:
    """Start writing the component's file, a few tensors a job."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    kept = set(model.state_dict())
    named = [*model.named_parameters(), *((name, part) for name, part in model.named_buffers() if name in kept)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * dtype.itemsize
        header[name] = {"dtype": KINDS[dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    path = home / ("model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    data = torch.from_file(str(path), shared=True, size=8 + len(text) + end, dtype=torch.uint8)[8 + len(text) :]
    step = max(-(-len(named) // 8), 1)
    return [threads.submit(_write, data, header, named[at : at + step], pool, at) for at in range(0, len(named), step)]


def _write(data: torch.Tensor, header: dict[str, Any], named: list[Any], pool: torch.Tensor, seed: int) -> None:
    at = seed * 7919 % 1024
    for name, tensor in named:
        start, stop = header[name]["data_offsets"]
        if not tensor.is_floating_point():  # position ids
            data[start:stop].view(tensor.dtype).copy_(torch.arange(tensor.numel()))
            continue
        place, left = start, (stop - start) // 2
        while left:
            count = min(left, POOL - at)
            data[place : place + 2 * count].view(torch.bfloat16).copy_(pool[at : at + count])
            place, left, at = place + 2 * count, left - count, (at + count + 131) % (POOL // 2)


def _clip(hidden: int, layers: int, projection: bool, tokenizer: Any) -> Callable[[], Any]:
    import transformers

    settings = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 64,
        num_hidden_layers=layers,
        projection_dim=hidden,
        vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return lambda: kind(settings)


def _t5(kind: str = "T5") -> Callable[[], Any]:
    import transformers

    settings = getattr(transformers, f"{kind}Config")(
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_layers=24,
        num_heads=64,
        vocab_size=256384 if kind == "UMT5" else 32128,
        feed_forward_proj="gated-gelu",
    )
    return lambda: getattr(transformers, f"{kind}EncoderModel")(settings)


def _vae(latents: int, shift: float | None, scale: float, quant: bool) -> Callable[[], Any]:
    import diffusers

    return lambda: diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latents,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=1024,
        shift_factor=shift,
        scaling_factor=scale,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        force_upcast=False,
    )


def _flux(folder: Path) -> tuple[str, dict[str, Any]]:
    import diffusers

    clip, t5 = tiny_models._clip_tokenizer(folder / ".vocabulary"), tiny_models._t5_tokenizer()
    return "FluxPipeline", {
        "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder_2": _t5(),
        "text_encoder": _clip(768, 12, False, clip),
        "vae": _vae(16, 0.1159, 0.3611, False),
        "tokenizer": clip,
        "tokenizer_2": t5,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    }


def _sd35(folder: Path) -> tuple[str, dict[str, Any]]:
    import diffusers

    clip, t5 = tiny_models._clip_tokenizer(folder / ".vocabulary"), tiny_models._t5_tokenizer()
    return "StableDiffusion3Pipeline", {
        "transformer": lambda: diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        "text_encoder_3": _t5(),
        "text_encoder": _clip(768, 12, True, clip),
        "text_encoder_2": _clip(1280, 32, True, clip),
        "vae": _vae(16, 0.0609, 1.5305, False),
        "tokenizer": clip,
        "tokenizer_2": clip,
        "tokenizer_3": t5,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _sdxl(folder: Path) -> tuple[str, dict[str, Any]]:
    import diffusers

    clip = tiny_models._clip_tokenizer(folder / ".vocabulary")
    return "StableDiffusionXLPipeline", {
        "unet": lambda: diffusers.UNet2DConditionModel(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "text_encoder": _clip(768, 12, False, clip),
        "text_encoder_2": _clip(1280, 32, True, clip),
        "vae": _vae(4, None, 0.13025, True),
        "tokenizer": clip,
        "tokenizer_2": clip,
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }


def _wan(folder: Path) -> tuple[str, dict[str, Any]]:
    import diffusers

    return "WanPipeline", {
        "transformer": lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=8960,
            num_layers=30,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ),
        "text_encoder": _t5("UMT5"),
        "vae": lambda: diffusers.AutoencoderKLWan(),
        "tokenizer": tiny_models._t5_tokenizer(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


MODELS: dict[str, Callable[[Path], tuple[str, dict[str, Any]]]] = {
    "flux": _flux,
    "sdxl": _sdxl,
    "sd35": _sd35,
    "wan": _wan,
}
EXTRA: dict[str, dict[str, Any]] = {"sdxl": {"force_zeros_for_empty_prompt": True}}
