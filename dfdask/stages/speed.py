"""Carry out a job's ``speed`` on a pipeline, by diffusers' own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfdask.errors import ModelError
from dfdask.speed import Quantization, Speed

DENOISERS = ("transformer", "transformer_2", "unet")


def load_quantized(
    kind: Any, home: Path, name: str, library: str, quantization: Quantization, settings: dict[str, Any]
) -> Any:
    """The component ``name``, its weights quantised as they are read. Raises ModelError."""
    backend, options = quantization.backend, dict(quantization.options)
    try:
        config = _config_class(library, backend)(**_width(backend), **options)
        return kind.from_pretrained(home, quantization_config=config, **settings)
    except Exception as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"speed.quantize.{name}: {backend} with {options} fails on this worker: {what}; "
            "install what it needs, correct its options, or leave it out"
        ) from None


def _config_class(library: str, backend: str) -> Any:
    import importlib

    if library == "transformers" and backend.startswith("bitsandbytes"):  # one class for both widths
        return importlib.import_module("transformers").BitsAndBytesConfig
    return importlib.import_module(f"{library}.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING[backend]


def _width(backend: str) -> dict[str, bool]:
    if not backend.startswith("bitsandbytes"):
        return {}
    return {"load_in_4bit": True} if backend.endswith("4bit") else {"load_in_8bit": True}


def apply(speed: Speed, pipeline: Any, strict: bool) -> None:
    """Set up the components that this process has. Raises ModelError where one cannot do what the job asks for."""
    import torch

    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = speed.tf32 and not strict
    for name in DENOISERS:
        part = getattr(pipeline, name, None)
        if not isinstance(part, torch.nn.Module):
            continue
        if speed.attention:
            from diffusers.models.attention_dispatch import attention_backend

            with attention_backend():  # it would become that of all pipelines in this process
                _try("attention", name, part, "set_attention_backend", speed.attention)
        if speed.first_block_cache is not None:
            from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

            config = FirstBlockCacheConfig(threshold=speed.first_block_cache)
            _try("first_block_cache", name, part, "enable_cache", config)
        if speed.compile:
            _try("compile", name, part, "compile_repeated_blocks")


def reset_caches(pipeline: Any) -> None:
    """Forget what the last call left in the caches: a pipeline does so at the end of its call, which is not reached."""
    for name in DENOISERS:
        reset = getattr(getattr(pipeline, name, None), "_reset_stateful_cache", None)
        if reset is not None:
            reset()


def _try(option: str, name: str, part: Any, method: str, *values: Any) -> None:
    call = getattr(part, method, None)
    try:
        if call is None:
            raise ValueError(f"{type(part).__name__} does not offer it")
        call(*values)
    except Exception as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"speed.{option}: {name} refuses it: {what}; leave it out, or choose another") from None
