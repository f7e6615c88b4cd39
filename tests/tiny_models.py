"""Diffusers pipelines with seeded random weights, small enough to run on a CPU in a blink, and saved as users' are."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from dfdask.items import Item
from dfdask.stages.model import ModelRef

Pixels = list[np.ndarray[Any, np.dtype[np.uint8]]]

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.:;!?'-"
SIZE = 32
"""Pixels a side of what most of them make; the VAE makes eight pixels of one latent."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "sd": {"height": SIZE, "width": SIZE, "guidance_scale": 6.0},
    "sd3": {"height": SIZE, "width": SIZE, "guidance_scale": 5.0, "max_sequence_length": 16},
    "flux": {"height": SIZE, "width": SIZE, "guidance_scale": 3.5, "max_sequence_length": 16},
    "pixart_alpha": {"height": SIZE, "width": SIZE, "guidance_scale": 4.5, "use_resolution_binning": False},
    "pixart_sigma": {
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "max_sequence_length": 16,
    },
    "wan": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 5.0, "max_sequence_length": 16},
}
"""A call that each family takes, besides the prompt; two steps are enough for a test."""


def save_tiny(family: str, folder: Path) -> Path:
    """Build the pipeline of ``family`` and save it to ``folder``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        import tiny_families

        build = {**_BUILDERS, **tiny_families.BUILDERS}[family]
        build(folder / ".vocabulary").save_pretrained(folder)
    return folder


def _clip_tokenizer(folder: Path) -> Any:
    letters = [*CHARACTERS, *(f"{letter}</w>" for letter in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *CHARACTERS]
    return transformers.T5TokenizerFast(
        vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)], extra_ids=0, model_max_length=64
    )


def _clip(kind: Any, tokenizer: Any, hidden: int) -> Any:
    settings = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=hidden,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(settings).eval()


def _t5(tokenizer: Any, hidden: int, kind: str = "T5") -> Any:
    settings = getattr(transformers, f"{kind}Config")(
        d_model=hidden,
        d_ff=32,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(settings).eval()


def _vae(**more: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=SIZE,
        **more,
    )


def _sd(scratch: Path) -> Any:
    tokenizer = _clip_tokenizer(scratch)
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=_clip(transformers.CLIPTextModel, tokenizer, 8),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=SIZE // 8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            norm_num_groups=2,
        ),
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd3(scratch: Path) -> Any:
    clip, t5 = _clip_tokenizer(scratch), _t5_tokenizer()
    projected = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        text_encoder=_clip(projected, clip, 16),
        text_encoder_2=_clip(projected, clip, 16),
        text_encoder_3=_t5(t5, 32),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(scratch: Path) -> Any:
    clip, t5 = _clip_tokenizer(scratch), _t5_tokenizer()
    return diffusers.FluxPipeline(
        tokenizer=clip,
        tokenizer_2=t5,
        text_encoder=_clip(transformers.CLIPTextModel, clip, 16),
        text_encoder_2=_t5(t5, 32),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def _pixart(kind: Any) -> Callable[[Path], Any]:
    def build(scratch: Path) -> Any:
        tokenizer = _t5_tokenizer()
        return kind(
            tokenizer=tokenizer,
            text_encoder=_t5(tokenizer, 32),
            transformer=diffusers.PixArtTransformer2DModel(
                sample_size=SIZE // 8,
                num_layers=2,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=3,
                caption_channels=32,
                in_channels=4,
                out_channels=8,
                cross_attention_dim=24,
            ),
            vae=_vae(),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )

    return build


def _wan(scratch: Path) -> Any:
    tokenizer = _t5_tokenizer()
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer, 32, "UMT5"),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _ddpm(scratch: Path) -> Any:
    """Unconditional: it has no prompt, no VAE and no cut."""
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )


def monolithic(ref: ModelRef, items: Sequence[Item], **lists: Any) -> Pixels:
    """The pipeline's own call, as its users write it. ``lists`` holds what differs from item to item."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer diffusers call it dtype, older ones do not know that
        pipeline = diffusers.DiffusionPipeline.from_pretrained(ref.source, torch_dtype=getattr(torch, ref.dtype))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
    prompts = [item.prompt for item in items]
    call = {**items[0].arguments, **lists, "prompt": prompts, "generator": generators, "output_type": "np"}
    output = np.asarray(pipeline(**call)[0])
    return [(picture * 255).round().clip(0, 255).astype(np.uint8) for picture in output]


_BUILDERS: dict[str, Callable[[Path], Any]] = {
    "sd": _sd,
    "sd3": _sd3,
    "flux": _flux,
    "pixart_alpha": _pixart(diffusers.PixArtAlphaPipeline),
    "pixart_sigma": _pixart(diffusers.PixArtSigmaPipeline),
    "wan": _wan,
    "ddpm": _ddpm,
}
