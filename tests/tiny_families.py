"""More tiny pipelines: those that differ in tokenizers, encoders and VAEs, and those that start from pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tiny_models as tiny
import torch
import transformers

WORDS = [*tiny.CHARACTERS, "\u2581", "\n", " ", *'<>|_()"-']


def _bpe(kind: Any, special: list[str], **more: Any) -> Any:
    """A tokenizer of single characters, or of the bytes that stand for them."""
    vocabulary = {text: place for place, text in enumerate(dict.fromkeys([*special, *WORDS, *_bytes()]))}
    return kind(vocab=vocabulary, merges=[], model_max_length=8192, **more)


def _bytes() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<0x{byte:02X}>" for byte in range(256))]


def _vision() -> Any:
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            projection_dim=16,
            image_size=16,
            patch_size=8,
        )
    ).eval()


def _pictures() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def _sdxl(scratch: Path) -> Any:
    tokenizer = tiny._clip_tokenizer(scratch)
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=tiny._clip(transformers.CLIPTextModel, tokenizer, 16),
        text_encoder_2=tiny._clip(transformers.CLIPTextModelWithProjection, tokenizer, 16),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=tiny.SIZE // 8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=64,
            cross_attention_dim=32,
            norm_num_groups=2,
        ),
        vae=tiny._vae(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def _qwen_parts() -> dict[str, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = _bpe(transformers.Qwen2Tokenizer, special)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    places = {name: tokenizer.convert_tokens_to_ids(text) for name, text in zip("sei", special[3:], strict=True)}
    settings = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1e6,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=places["s"],
        vision_end_token_id=places["e"],
        image_token_id=places["i"],
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(settings).eval(),
        "transformer": diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _sana(scratch: Path) -> Any:
    tokenizer = _bpe(transformers.GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(
                head_dim=16,
                hidden_size=8,
                intermediate_size=32,
                num_attention_heads=2,
                num_hidden_layers=1,
                num_key_value_heads=2,
                vocab_size=len(tokenizer),
                attn_implementation="eager",
            )
        ).eval(),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        ),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _ltx(kind: Any) -> Callable[[Path], Any]:
    def build(scratch: Path) -> Any:
        tokenizer = tiny._t5_tokenizer()
        vae = diffusers.AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
        # Statistics that only the weights know: a phantom that has not read them makes another picture.
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
        return kind(
            tokenizer=tokenizer,
            text_encoder=tiny._t5(tokenizer, 32),
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                patch_size=1,
                patch_size_t=1,
                num_attention_heads=4,
                attention_head_dim=8,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=32,
            ),
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )

    return build


def _cogvideox(kind: Any, channels: int) -> Callable[[Path], Any]:
    def build(scratch: Path) -> Any:
        tokenizer = tiny._t5_tokenizer()
        return kind(
            tokenizer=tokenizer,
            text_encoder=tiny._t5(tokenizer, 32),
            transformer=diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=8,
                in_channels=channels,
                out_channels=4,
                time_embed_dim=2,
                text_embed_dim=32,
                num_layers=1,
                sample_width=2,
                sample_height=2,
                sample_frames=9,
                patch_size=2,
                temporal_compression_ratio=4,
                max_text_seq_length=16,
            ),
            vae=diffusers.AutoencoderKLCogVideoX(
                in_channels=3,
                out_channels=3,
                block_out_channels=(8, 8, 8, 8),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=2,
                temporal_compression_ratio=4,
                down_block_types=("CogVideoXDownBlock3D",) * 4,
                up_block_types=("CogVideoXUpBlock3D",) * 4,
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )

    return build


def _hunyuan(scratch: Path) -> Any:
    clip = tiny._clip_tokenizer(scratch)
    llama = _bpe(transformers.LlamaTokenizer, ["<unk>", "<s>", "</s>"], pad_token="</s>")
    return diffusers.HunyuanVideoPipeline(
        tokenizer=llama,
        tokenizer_2=clip,
        text_encoder=transformers.LlamaModel(
            transformers.LlamaConfig(
                hidden_size=16,
                intermediate_size=32,
                num_attention_heads=4,
                num_hidden_layers=4,
                vocab_size=len(llama),
                pad_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ).eval(),
        text_encoder_2=tiny._clip(transformers.CLIPTextModel, clip, 8),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.476986,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _wan_from_picture(scratch: Path) -> Any:
    parts = tiny._wan(scratch).components
    transformer = diffusers.WanTransformer3DModel.from_config(
        parts["transformer"].config, in_channels=36, image_dim=16, added_kv_proj_dim=24
    )
    parts.update(transformer=transformer, image_encoder=_vision(), image_processor=_pictures())
    return diffusers.WanImageToVideoPipeline(**parts)


def _qwen(scratch: Path) -> Any:
    return diffusers.QwenImagePipeline(**_qwen_parts())


def _from(kind: Any, build: Callable[[Path], Any], **more: Any) -> Callable[[Path], Any]:
    """Another pipeline of the same components."""
    return lambda scratch: kind(**build(scratch).components, **more)


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "sdxl": _sdxl,
    "qwen": _qwen,
    "sana": _sana,
    "ltx": _ltx(diffusers.LTXPipeline),
    "cogvideox": _cogvideox(diffusers.CogVideoXPipeline, 4),
    "hunyuan": _hunyuan,
    "sd_img2img": _from(diffusers.StableDiffusionImg2ImgPipeline, tiny._sd, requires_safety_checker=False),
    "sd_inpaint": _from(diffusers.StableDiffusionInpaintPipeline, tiny._sd, requires_safety_checker=False),
    "sdxl_img2img": _from(diffusers.StableDiffusionXLImg2ImgPipeline, _sdxl),
    "sdxl_inpaint": _from(diffusers.StableDiffusionXLInpaintPipeline, _sdxl),
    "sd3_img2img": _from(diffusers.StableDiffusion3Img2ImgPipeline, tiny._sd3),
    "flux_img2img": _from(diffusers.FluxImg2ImgPipeline, tiny._flux),
    "flux_kontext": _from(diffusers.FluxKontextPipeline, tiny._flux),
    "qwen_img2img": _from(diffusers.QwenImageImg2ImgPipeline, _qwen),
    "wan_i2v": _wan_from_picture,
    "ltx_i2v": _ltx(diffusers.LTXImageToVideoPipeline),
    "cogvideox_i2v": _cogvideox(diffusers.CogVideoXImageToVideoPipeline, 8),
}

_VIDEO = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}
_IMAGE = {"height": tiny.SIZE, "width": tiny.SIZE}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "sdxl": {**_IMAGE, "guidance_scale": 5.0},
    "qwen": {**_IMAGE, "true_cfg_scale": 4.0, "negative_prompt": "bad", "max_sequence_length": 32},
    "sana": {**_IMAGE, "guidance_scale": 4.5, "max_sequence_length": 16, "use_resolution_binning": False},
    "ltx": {**_VIDEO, "height": 32, "width": 32, "guidance_scale": 3.0},
    "cogvideox": {**_VIDEO, "num_frames": 8, "guidance_scale": 6.0},
    "hunyuan": {**_VIDEO, "guidance_scale": 4.5, "prompt_template": {"template": "{}", "crop_start": 0}},
    "sd_img2img": {"guidance_scale": 6.0, "strength": 0.7},
    "sd_inpaint": {**_IMAGE, "guidance_scale": 6.0, "strength": 0.7},
    "sdxl_img2img": {"guidance_scale": 5.0, "strength": 0.7},
    "sdxl_inpaint": {**_IMAGE, "guidance_scale": 5.0, "strength": 0.7},
    "sd3_img2img": {**_IMAGE, "guidance_scale": 5.0, "strength": 0.7, "max_sequence_length": 16},
    "flux_img2img": {**_IMAGE, "guidance_scale": 3.5, "strength": 0.7, "max_sequence_length": 16},
    "flux_kontext": {
        **_IMAGE,
        "guidance_scale": 3.5,
        "max_area": 1024,
        "_auto_resize": False,
        "max_sequence_length": 16,
    },
    "qwen_img2img": {**_IMAGE, "true_cfg_scale": 4.0, "negative_prompt": "bad", "strength": 0.7},
    "wan_i2v": {**_VIDEO, "num_frames": 5, "guidance_scale": 5.0},
    "ltx_i2v": {**_VIDEO, "height": 32, "width": 32, "guidance_scale": 3.0},
    "cogvideox_i2v": {**_VIDEO, "num_frames": 8, "guidance_scale": 6.0},
}
MASKED = frozenset({"sd_inpaint", "sdxl_inpaint"})
FROM_PICTURES = frozenset(name for name in ARGUMENTS if name.endswith(("img2img", "i2v", "kontext"))) | MASKED
