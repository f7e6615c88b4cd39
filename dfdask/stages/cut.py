"""Cut any diffusers pipeline into stages, without knowing its family.

Every stage calls the pipeline's own ``__call__`` with the user's arguments. Components that the stage does not
own are phantoms: their real configuration on the meta device, no weights. The cuts are two calls that text-to-X
pipelines make in this order: ``encode_prompt`` and ``vae.decode``.

- encode records what ``encode_prompt`` returns and stops where latents or timesteps are prepared; what has a part
  for each item is what changes its length when a single item is encoded;
- denoise replays that and stops at ``vae.decode``, whose arguments it hands over;
- decode replays empty stand-ins, takes no denoising steps, and runs the VAE and all that the pipeline does after.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dfdask.batching import call_key, is_batchable
from dfdask.errors import ModelError
from dfdask.items import Item
from dfdask.speed import Speed
from dfdask.stages.batch import Rows, map_entries
from dfdask.stages.model import WHOLE, Component, ModelRef, components, device_for, digest, locate
from dfdask.stages.speed import apply, load_quantized, reset_caches

_ABSENT = object()


class StopStage(BaseException):
    """Leaves a pipeline call at a cut. Not an Exception, so that no pipeline's own handler swallows it."""

    def __init__(self, payload: Any = None) -> None:
        self.payload = payload


class Phantom:
    """Looks like a component (configuration, dtype, attributes) but holds no weights and is no Module."""

    def __init__(self, model: Any, dtype: Any, device: Any) -> None:
        self.__dict__.update(_model=model, dtype=dtype, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        raise StopStage((args, kwargs))


def import_libraries() -> None:
    """Import what loading a pipeline needs; diffusers itself imports its parts only at first use."""
    import accelerate  # noqa: F401
    import diffusers
    import transformers

    _hush()
    for library, name in ((diffusers, "DiffusionPipeline"), (transformers, "PreTrainedModel")):
        getattr(library, name)


def stage_names(folder: Path) -> tuple[str, ...]:
    """The stages of a pipeline in order: encode, denoise and decode where it has the cuts, else one."""
    name, parts = components(folder)
    kind = pipeline_class(name)
    owners = {part.stage for part in parts}
    has_cuts = hasattr(kind, "encode_prompt") and any(part.name == "vae" for part in parts)
    return ("encode", "denoise", "decode") if has_cuts and len(owners - {None}) == 3 else (WHOLE,)


def pipeline_class(name: str) -> Any:
    """Raises ModelError for a class that this diffusers does not have."""
    import diffusers

    _hush()
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(
            f"model: diffusers {diffusers.__version__} has no pipeline class {name!r}; "
            "update diffusers, or use a model that it supports"
        )
    return kind


def open_pipeline(ref: ModelRef, stage: str | None, device: str) -> Any:
    """The pipeline with the weights of ``stage`` only; with None at all, for checks. Raises ModelError."""
    import torch

    folder = locate(ref.source, ref.revision)
    if stage is not None and digest(folder) != ref.digest:
        raise ModelError(
            f"model: {folder} on this worker differs from the one that the job was submitted with; "
            "put the same files on every machine"
        )
    name, parts = components(folder)
    kind = pipeline_class(name)
    dtype = getattr(torch, ref.dtype)
    loaded: dict[str, Any] = {}
    for part in parts:
        try:
            loaded[part.name] = _component(folder, part, stage, dtype, device, ref.speed)
        except ModelError:
            raise
        except Exception as error:
            what = " ".join(str(error).split())[:300]
            raise ModelError(
                f"model: {folder / part.name} ({part.kind}) cannot be loaded: {type(error).__name__}: {what}; "
                "download or save the model again"
            ) from None
    accepted = inspect.signature(kind.__init__).parameters
    index = kind.load_config(folder)
    for key, value in index.items():
        if key in accepted and key not in loaded:
            loaded[key] = None if isinstance(value, (list, tuple)) else value
    try:
        pipeline = kind(**loaded)
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model: {folder / 'model_index.json'} does not describe a whole {name}: {type(error).__name__}: {what}; "
            "download or save the model again"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class PipelineStage:
    """One stage of a diffusers pipeline on this worker's device."""

    def __init__(self, ref: ModelRef, stage: str) -> None:
        import torch

        if ref.strict:
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._lock = threading.Lock()  # a pipeline keeps the state of its call: one at a time, whatever the worker
        self._device = device_for(ref.device)
        self._pipeline = open_pipeline(ref, stage, self._device)
        apply(ref.speed, self._pipeline, ref.strict)
        self._single: dict[str, Any] = {}  # by kind of call: the shapes of what one item is encoded to
        self._run: Callable[[Sequence[Item], Any], Any] = {
            "encode": self._encode,
            "denoise": self._denoise,
            "decode": self._decode,
            WHOLE: self._whole,
        }[stage]

    @property
    def pipeline(self) -> Any:
        return self._pipeline

    def run(self, items: Sequence[Item], state: Any) -> Any:
        import torch

        with self._lock, torch.no_grad():
            try:
                return self._run(items, state)
            finally:
                reset_caches(self._pipeline)

    def _encode(self, items: Sequence[Item], state: Any) -> Any:
        found = self._encoded(items)
        if len(items) == 1:
            return found
        key = call_key(items[0])
        if key not in self._single:
            self._single[key] = _shapes(self._encoded(items[:1]))
        return _marked(found, self._single[key], len(items))

    def _encoded(self, items: Sequence[Item]) -> tuple[Any, ...]:
        """What each call of ``encode_prompt`` returned."""
        pipeline, recorded = self._pipeline, []
        encode = pipeline.encode_prompt

        def record(*args: Any, **kwargs: Any) -> Any:
            recorded.append(encode(*args, **kwargs))
            return recorded[-1]

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise StopStage

        timesteps = functools.wraps(pipeline.scheduler.set_timesteps)(stop)
        with (
            _patched(pipeline, encode_prompt=record, prepare_latents=stop),
            _patched(pipeline.scheduler, set_timesteps=timesteps),
        ):
            _stops(pipeline, pipeline_call(pipeline, items))
        return tuple(_to(recorded, "cpu"))

    def _denoise(self, items: Sequence[Item], state: Any) -> Any:
        replay = iter(_plain(_to(state, self._device)))
        with _patched(self._pipeline, encode_prompt=lambda *a, **k: next(replay)):
            payload = _stops(self._pipeline, pipeline_call(self._pipeline, items))
        if payload is None:
            raise ModelError(
                f"model: {type(self._pipeline).__name__} ended without decoding its latents with its VAE; "
                "it cannot be run in stages"
            )
        return {"decode": _marked_by_length(_to(payload, "cpu"), len(items)), "embeds": _shapes(state)}

    def _decode(self, items: Sequence[Item], state: Any) -> Any:
        pipeline = self._pipeline
        replay = iter(_plain(_stand_ins(state["embeds"], self._device)))
        args, kwargs = _plain(_to(state["decode"], self._device))
        decode, set_timesteps = pipeline.vae.decode, pipeline.scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def no_steps(*step_args: Any, **step_kwargs: Any) -> None:
            set_timesteps(*step_args, **step_kwargs)
            pipeline.scheduler.timesteps = pipeline.scheduler.timesteps[:0]

        with (
            _patched(pipeline, encode_prompt=lambda *a, **k: next(replay)),
            _patched(pipeline.vae, decode=lambda *a, **k: decode(*args, **kwargs)),
            _patched(pipeline.scheduler, set_timesteps=no_steps),
        ):
            return to_pixels(pipeline(**pipeline_call(pipeline, items))[0])

    def _whole(self, items: Sequence[Item], state: Any) -> Any:
        return to_pixels(self._pipeline(**pipeline_call(self._pipeline, items))[0])


def pipeline_call(pipeline: Any, items: Sequence[Item]) -> dict[str, Any]:
    """The keyword arguments for one call with all ``items``: texts as lists, a CPU generator per item."""
    import torch

    accepted = inspect.signature(pipeline.__call__).parameters
    call: dict[str, Any] = dict(items[0].arguments)
    for name, value in items[0].arguments.items():
        if is_batchable(name, value):
            call[name] = [item.arguments[name] for item in items]
    if "prompt" in accepted:
        call["prompt"] = [item.prompt for item in items]
    elif "batch_size" in accepted:
        call["batch_size"] = len(items)
    call["generator"] = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
    return {**call, "output_type": "np", "return_dict": False}


def to_pixels(output: Any) -> list[np.ndarray[Any, np.dtype[np.uint8]] | Exception]:
    """uint8 (y, x, channel) or (frame, y, x, channel) per item from floats in [0, 1]; NaN is an error."""
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]] | Exception] = []
    for array in np.asarray(output):
        if not np.isfinite(array).all():
            pixels.append(FloatingPointError("the output is not finite (NaN or infinity)"))
        else:
            pixels.append((array * 255).round().clip(0, 255).astype(np.uint8))
    return pixels


def _hush() -> None:
    """The libraries' remarks and bars about loading concern nobody who watches a job."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _component(folder: Path, part: Component, stage: str | None, dtype: Any, device: str, speed: Speed) -> Any:
    import torch
    from accelerate import init_empty_weights

    module = {
        "diffusers": "diffusers",
        "transformers": "transformers",
    }.get(part.library, f"diffusers.pipelines.{part.library}")
    kind = getattr(importlib.import_module(module), part.kind)
    home = folder / part.name
    # transformers would ask at the terminal whether it may run a model's own code.
    closed = {"trust_remote_code": False} if part.library == "transformers" and part.kind.startswith("Auto") else {}
    if part.stage is None:
        return kind.from_pretrained(home, **closed)
    if stage in (part.stage, WHOLE):
        option = "torch_dtype" if part.library == "diffusers" else "dtype"
        settings = {option: dtype, "use_safetensors": True, **closed}
        if part.name in speed.quantize:
            return load_quantized(kind, home, part.name, part.library, speed.quantize[part.name], settings).eval()
        model = kind.from_pretrained(home, **settings)
        return model.eval()  # in host memory: what brings it to the device is residency
    with init_empty_weights(include_buffers=False):
        if part.library == "diffusers":
            model = kind.from_config(kind.load_config(home))
        else:
            model = kind(kind.config_class.from_pretrained(home))
    return Phantom(model, dtype, torch.device(device))


def _stops(pipeline: Any, call: dict[str, Any]) -> Any:
    try:
        pipeline(**call)
    except StopStage as stop:
        return stop.payload
    return None


@contextmanager
def _patched(target: Any, **replacements: Any) -> Iterator[None]:
    before = {name: target.__dict__.get(name, _ABSENT) for name in replacements}
    for name, value in replacements.items():
        object.__setattr__(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, value)


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (Rows, dict, list, tuple)):
        return map_entries(lambda entry: _map_leaves(function, entry), value)
    return function(value)


def _to(value: Any, device: str) -> Any:
    import torch

    return _map_leaves(lambda leaf: leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def _shapes(value: Any) -> Any:
    """The shapes and dtypes of tensors: all that decoding needs to know of the embeddings."""
    import torch

    def shape(leaf: Any) -> Any:
        return _Shape(tuple(leaf.shape), str(leaf.dtype)[6:]) if isinstance(leaf, torch.Tensor) else leaf

    return _map_leaves(shape, value)


def _marked(many: Any, one: Any, count: int) -> Any:
    """``many``, made for ``count`` items, with what has a part for each as Rows; ``one`` was made for a single one."""
    if isinstance(many, dict) and isinstance(one, dict) and many.keys() == one.keys():
        pairs = iter([(entry, one[key]) for key, entry in many.items()])
        return map_entries(lambda _: _marked(*next(pairs), count), many)
    if isinstance(many, (list, tuple)) and isinstance(one, type(many)):
        if isinstance(many, list) and (len(many), len(one)) == (count, 1):
            return Rows(many)
        if len(many) == len(one):
            pairs = iter(zip(many, one, strict=True))
            return map_entries(lambda _: _marked(*next(pairs), count), many)
    if getattr(many, "shape", ())[:1] == (count,) and getattr(one, "shape", ())[:1] == (1,):
        return Rows(many)
    return many


def _marked_by_length(value: Any, count: int) -> Any:
    """What goes into the VAE: latents and timesteps by their first dimension, generators as a list."""
    if getattr(value, "shape", ())[:1] == (count,) or (isinstance(value, list) and len(value) == count):
        return Rows(value)
    if isinstance(value, (dict, tuple)):
        return map_entries(lambda entry: _marked_by_length(entry, count), value)
    return value


def _plain(value: Any) -> Any:
    """``value`` as the pipeline knows it, without Rows."""
    if isinstance(value, Rows):
        return value.value
    return map_entries(_plain, value) if isinstance(value, (dict, list, tuple)) else value


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor that is not there; slicing it slices its items."""

    shape: tuple[int, ...]
    dtype: str

    def __getitem__(self, part: slice) -> _Shape:
        return _Shape((len(range(self.shape[0])[part]), *self.shape[1:]), self.dtype)

    def joined(self, other: _Shape) -> _Shape:
        return _Shape((self.shape[0] + other.shape[0], *self.shape[1:]), self.dtype)


def _stand_ins(value: Any, device: str) -> Any:
    """Tensors that weigh nothing: a scalar seen as the whole by zero strides."""
    import torch

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, _Shape):
            return leaf
        return torch.zeros((), dtype=getattr(torch, leaf.dtype), device=device).expand(leaf.shape)

    return _map_leaves(stand_in, value)
