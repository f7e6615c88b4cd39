"""Cut any diffusers pipeline into stages, without knowing its family.

Every stage calls the pipeline's own ``__call__`` with the user's arguments. Components that the stage does not
own are phantoms: their real configuration on the meta device, no weights.

- encode records what the pipeline's ``encode_...`` methods and its encoders return (``vae.encode`` among them where
  it starts from pictures) and stops where latents or timesteps are prepared; with pictures, where the denoiser is
  called first;
- denoise replays that and stops at ``vae.decode``, whose arguments it hands over;
- decode replays empty stand-ins, takes no denoising steps, and runs the VAE and all that the pipeline does after.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfdask.errors import ModelError
from dfdask.items import Item, pictures_in
from dfdask.speed import Speed
from dfdask.stages.adapters import load_adapters, set_scheduler
from dfdask.stages.anatomy import Anatomy, anatomy
from dfdask.stages.call import pipeline_call
from dfdask.stages.encode import Encoder
from dfdask.stages.encodings import Shelf
from dfdask.stages.model import WHOLE, Component, ModelRef, components, device_for, digest, locate
from dfdask.stages.pixels import device_pixels, to_pixels
from dfdask.stages.rows_once import encode_rows_once
from dfdask.stages.speed import apply, load_quantized, reset_caches
from dfdask.stages.state import copied, marked_by_length, moved, shapes, stand_ins, together
from dfdask.stages.tape import Tape, encoders, patched, recording, replaying


class StopStage(BaseException):
    """Leaves a pipeline call at a cut. Not an Exception, so that no pipeline's own handler swallows it."""

    def __init__(self, payload: Any = None) -> None:
        self.payload = payload


class Phantom:
    """Looks like a component (configuration, dtype, attributes) but holds no weights and is no Module."""

    def __init__(self, model: Any, dtype: Any, device: Any) -> None:
        self.__dict__.update(_model=model, dtype=dtype, device=device, passed_adapters=set())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StopStage((args, kwargs))

    decode = forward

    def to(self, *args: Any, dtype: Any = None, **kwargs: Any) -> Phantom:
        """Change the dtype of what has no weights; there is nothing to move."""
        import torch

        wanted = next((value for value in args if isinstance(value, torch.dtype)), dtype)
        if wanted is not None:
            self._model.to(dtype=wanted)
        return self

    def load_lora_adapter(
        self, state_dict: dict[str, Any], prefix: str | None = "transformer", *, adapter_name: str, **_: Any
    ) -> None:
        """Adapters are loaded where the weights are; here is only noted that this one has some for the component.

        As in diffusers, ``prefix`` tells them: it also calls this for components that the adapter has nothing for.
        """
        if any(prefix is None or key.startswith(f"{prefix}.") for key in state_dict):
            self.passed_adapters.add(adapter_name)

    def load_adapter(self, *, adapter_name: str, **_: Any) -> None:
        """Of an encoder, called only where there are weights for it."""
        self.passed_adapters.add(adapter_name)


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
    return (WHOLE,) if pipeline_anatomy(folder).uncut else ("encode", "denoise", "decode")


def pipeline_anatomy(folder: Path) -> Anatomy:
    """Where the pipeline in ``folder`` can be cut. Raises ModelError."""
    name, parts = components(folder)
    return anatomy(pipeline_class(name), parts)


def stage_parts(folder: Path, stage: str) -> list[Component]:
    """The components whose weights ``stage`` needs. Raises ModelError."""
    name, parts = components(folder)
    weighty = [part for part in parts if part.stage is not None]
    return [part for part in weighty if stage == WHOLE or stage in _owners(part, anatomy(pipeline_class(name), parts))]


def _owners(part: Component, cuts: Anatomy) -> tuple[str | None, ...]:
    return ("encode", "decode") if part.name == "vae" and cuts.conditions else (part.stage,)


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
    cuts = anatomy(kind, parts)
    loaded: dict[str, Any] = {}
    for part in parts:
        if stage in _owners(part, cuts):
            part = replace(part, stage=stage)
        try:
            loaded[part.name] = _component(folder, part, stage, dtype, device, ref.speed)
            if isinstance(loaded[part.name], Phantom):
                _restore_statistics(loaded[part.name], folder / part.name)
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
    set_scheduler(pipeline, ref.scheduler)
    load_adapters(pipeline, ref.adapters)
    return pipeline


class PipelineStage:
    """One stage of a diffusers pipeline on this worker's device."""

    def __init__(self, ref: ModelRef, stage: str, pipeline: Any = None) -> None:
        """Raises ModelError. ``pipeline`` is for what has opened one already, with stand-ins for its components."""
        import torch

        if ref.strict:
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._lock = threading.Lock()  # a pipeline keeps the state of its call: one at a time, whatever the worker
        self._device = device_for(ref.device)
        self._pipeline = open_pipeline(ref, stage, self._device) if pipeline is None else pipeline
        if pipeline is None:
            apply(ref.speed, self._pipeline, ref.strict)
            encode_rows_once(self._pipeline, ref)
        folder = locate(ref.source, ref.revision)
        self._anatomy = pipeline_anatomy(folder)
        self._encoders = (
            {} if stage == WHOLE else encoders(self._pipeline, [part.name for part in stage_parts(folder, "encode")])
        )
        shelf = None
        if ref.encodings is not None and stage == "encode":
            shelf = Shelf(ref.encodings, replace(ref, device=self._device))
        self.encoder = Encoder(self._encoded, ref.strict, shelf=shelf)
        # Pictures are looked at until the denoising is done, and after it only where they are laid over the output.
        self.passes_pictures = stage == "encode" or self._anatomy.overlays
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
        return self.encoder.encode(items)

    def _encoded(self, items: Sequence[Item]) -> tuple[Tape, Any]:
        """What encodes returned, and the arguments of the first call of the denoiser where it comes to that."""
        pipeline = self._pipeline
        pictured = any(map(pictures_in, items[0].arguments.values()))
        call = pipeline_call(pipeline, items)
        if self._anatomy.conditions or pictured:
            with recording(self._encoders, keep=True) as tape:
                stopped_at = _stops(pipeline, call)
            return moved(tape, "cpu"), stopped_at

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise StopStage

        timesteps = functools.wraps(pipeline.scheduler.set_timesteps)(stop)
        with (
            recording(self._encoders, keep=False) as tape,
            patched(pipeline, prepare_latents=stop),
            patched(pipeline.scheduler, set_timesteps=timesteps),
        ):
            _stops(pipeline, call)
        return moved(tape, "cpu"), None

    def _denoise(self, items: Sequence[Item], state: Any) -> Any:
        with replaying(self._encoders, self._arrived(state)):
            payload = _stops(self._pipeline, pipeline_call(self._pipeline, items))
        if payload is None:
            raise ModelError(
                f"model: {type(self._pipeline).__name__} ended without decoding its latents with its VAE; "
                "it cannot be run in stages"
            )
        return {"decode": marked_by_length(moved(payload, "cpu"), len(items)), "encoded": shapes(state)}

    def _decode(self, items: Sequence[Item], state: Any) -> Any:
        pipeline = self._pipeline
        args, kwargs = together(self._arrived(state["decode"]))
        decode, set_timesteps = pipeline.vae.decode, pipeline.scheduler.set_timesteps
        decoded = []

        @functools.wraps(set_timesteps)
        def no_steps(*step_args: Any, **step_kwargs: Any) -> None:
            set_timesteps(*step_args, **step_kwargs)
            pipeline.scheduler.timesteps = _without_steps(pipeline.scheduler.timesteps, pipeline)

        def decode_once(*_: Any, **__: Any) -> Any:
            decoded.append(True)
            return decode(*args, **kwargs)

        with (
            replaying(self._encoders, stand_ins(state["encoded"], self._device)),
            patched(pipeline.vae, decode=decode_once),
            patched(pipeline.scheduler, set_timesteps=no_steps),
            device_pixels(pipeline) as finite,
        ):
            try:
                output = pipeline(**pipeline_call(pipeline, items))[0]
            except StopStage:
                decoded.clear()
        if len(decoded) != 1:
            raise ModelError(
                f"model: {type(pipeline).__name__} cannot be run in stages: it decoded {len(decoded)} times after "
                "no denoising steps"
            )
        return to_pixels(output, finite)

    def _arrived(self, state: Any) -> Any:
        """On the device, in memory of its own: pipelines change what they are given, and it may be used again.

        It is aligned memory too, unlike a buffer from the network: CPU kernels round by where their numbers lie.
        """
        return copied(state) if self._device == "cpu" else moved(state, self._device)

    def _whole(self, items: Sequence[Item], state: Any) -> Any:
        return to_pixels(self._pipeline(**pipeline_call(self._pipeline, items))[0])


def _without_steps(timesteps: Any, pipeline: Any) -> Any:
    """The same timesteps, over which the pipeline's own loop does not go."""
    import torch

    class Skipped(torch.Tensor):
        def __iter__(self) -> Iterator[Any]:
            caller = sys._getframe(1)
            looping = caller.f_code.co_name == "__call__" and caller.f_locals.get("self") is pipeline
            bar = str(caller.f_globals.get("__name__")).startswith("tqdm")
            entries: Iterator[Any] = iter(()) if looping or bar else iter(self.as_subclass(torch.Tensor))
            return entries

    return timesteps.as_subclass(Skipped) if isinstance(timesteps, torch.Tensor) else timesteps[:0]


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


def _restore_statistics(phantom: Phantom, home: Path) -> None:
    """Give a phantom the numbers that pipelines read from a component: small buffers that come with its weights.

    The mean and the deviation of latents, as a buffer of the VAE, are among them.
    """
    from safetensors import safe_open

    saved = phantom.state_dict()
    wanted = {name: buffer for name, buffer in phantom.named_buffers() if name in saved and buffer.numel() <= 1 << 20}
    for path in sorted(home.glob("*.safetensors")) if wanted else ():
        with safe_open(path, framework="pt") as file:
            for name in wanted.keys() & set(file.keys()):
                owner, _, attribute = name.rpartition(".")
                value = file.get_tensor(name)
                value = value.to(phantom.device, phantom.dtype if value.is_floating_point() else value.dtype)
                phantom.get_submodule(owner)._buffers[attribute] = value
