"""Which model a job means: found, checked and named before any worker loads it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfdask.errors import ModelError
from dfdask.spec import FakeStages, JobSpec
from dfdask.speed import Speed
from dfdask.stages.adapters import AdapterRef, SchedulerRef, adapter_ref

if TYPE_CHECKING:
    from dfdask.targets import Location

WHOLE = "generate"  # the only stage of a pipeline that has no cut points
_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as every worker finds it: ``source`` is "bundled", a directory or a hub id.

    ``digest`` identifies the files; a worker that finds others refuses the job. ``encodings`` are kept beside this run.
    """

    source: str
    digest: str
    dtype: str
    device: str
    strict: bool
    revision: str | None = None
    fake: FakeStages | None = None
    adapters: tuple[AdapterRef, ...] = ()
    scheduler: SchedulerRef | None = None
    speed: Speed = Speed()
    encodings: Location | None = None


@dataclass(frozen=True, slots=True)
class Component:
    """An entry of model_index.json: ``library`` and ``kind`` name its class; ``stage`` is the one that owns it.

    ``stage`` is None for the parts without weights (tokenizers, schedulers), which every stage has.
    """

    name: str
    library: str
    kind: str
    stage: str | None


def model_ref(spec: JobSpec) -> ModelRef:
    """The model of ``spec``. Raises ModelError."""
    if not isinstance(spec.model, str):
        return ModelRef("fake", "fake", spec.dtype, "cpu", spec.strict, fake=spec.model.fake)
    source = spec.model
    if source != "bundled" and Path(source).is_dir():
        source = str(Path(source).resolve())
    folder = locate(source, spec.revision)
    check_parts(folder)
    return ModelRef(
        source=source,
        digest=digest(folder),
        dtype=spec.dtype,
        device=spec.device,
        strict=spec.strict,
        revision=spec.revision,
        adapters=tuple(
            adapter_ref(str(spec.base_file(entry.path)), entry.weight_name, entry.revision, entry.scale)
            for entry in spec.adapters
        ),
        speed=spec.speed,
        scheduler=SchedulerRef(spec.scheduler.kind, spec.scheduler.options) if spec.scheduler else None,
    )


def with_defaults(spec: JobSpec) -> JobSpec:
    """``spec`` with what it leaves open: bfloat16 on CUDA, and the arguments that the bundled model is made for."""
    if spec.device == "cuda" and "dtype" not in spec.model_fields_set:
        spec = spec.replace(dtype="bfloat16")
    if spec.model != "bundled":
        return spec
    from dfdask.bundled import ARGUMENTS

    return spec.replace(arguments={**ARGUMENTS, **spec.arguments})


def locate(source: str, revision: str | None) -> Path:
    """The directory of a model; one on the hub is downloaded, safetensors and configuration only.

    Raises ModelError.
    """
    if source == "bundled":
        from dfdask.bundled import MODEL_PATH

        return MODEL_PATH
    if Path(source).is_dir():
        return Path(source)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).exists()
    if looks_local:
        raise ModelError(
            f"model: there is no model directory {source!r}; give `bundled`, a directory in the diffusers "
            "layout or a hub id like owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"model: {source!r} is neither a directory here nor could it be fetched from the hub ({reason}); "
            "check the name, the network and your access rights"
        ) from None


def components(folder: Path) -> tuple[str, list[Component]]:
    """The pipeline class name and the components that ``folder`` declares. Raises ModelError."""
    path = folder / "model_index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
    except FileNotFoundError:
        raise ModelError(
            f"model: {folder} has no model_index.json, so it is not in the diffusers layout; "
            "save it with pipeline.save_pretrained(...)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model: {path} cannot be read ({error}); save the pipeline again") from None
    if not isinstance(pipeline, str):
        raise ModelError(
            f"model: {folder} needs code of its own ({pipeline!r}); dfdask runs diffusers' own pipelines only"
        )
    found = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        library, kind = map(str, entry)
        found.append(Component(name, library, kind, _owner(name, library)))
    return pipeline, found


def check_parts(folder: Path) -> None:
    """Raise ModelError where a component's folder, configuration or safetensors weights are not there."""
    for part in components(folder)[1]:
        home = folder / part.name
        if not home.is_dir():
            raise ModelError(
                f"model: {folder} lacks its component {part.name!r} ({part.kind}); download or save the model again"
            )
        if part.stage is None:
            continue
        if not (home / "config.json").is_file():
            raise ModelError(f"model: {home} lacks config.json; download or save the model again")
        weights = list(home.glob("*.safetensors"))
        if not weights:
            others = sorted(path.name for path in home.glob("*.bin"))
            why = f"only {others}, which can run code" if others else "no weights"
            raise ModelError(
                f"model: {home} has {why}; dfdask loads safetensors only: save the model with safe_serialization=True"
            )
        empty = [path.name for path in weights if path.stat().st_size < 9]
        if empty:
            raise ModelError(f"model: {home / empty[0]} is empty; download or save the model again")


def digest(folder: Path) -> str:
    """A hash of all configuration and of the size, head and sampled blocks of each weights file."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in (".json", ".safetensors", ".txt", ".model"):
            continue
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            step = max(size // 64, _SAMPLED_BYTES)
            for start in range(0, size, step):
                file.seek(start)
                total.update(file.read(_SAMPLED_BYTES))
    return total.hexdigest()


def device_for(wanted: str) -> str:
    """The device that this worker computes on: the worker's own setting wins over the job's. Raises ModelError."""
    import torch

    chosen = os.environ.get("DFDASK_DEVICE", "auto")
    chosen = wanted if chosen == "auto" else chosen
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device: cuda is asked for, but this worker has no CUDA GPU (or none for torch {torch.__version__}); "
            "use device: auto"
        )
    if chosen == "cuda":
        _check_own_gpu()
    return chosen


def _check_own_gpu() -> None:
    """CUDA reads once which GPUs there are: too early where a script asks for them while a worker imports it."""
    import torch

    own = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if own.startswith("GPU-") and "," not in own:
        first = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        if not first.startswith(own):
            raise ModelError(
                f"device: this worker's GPU is {own}, but torch was asked for GPUs before the worker was told, and "
                f"computes on {first}; in your script put what asks torch for GPUs below `if __name__ == '__main__':`"
            )


def _owner(name: str, library: str) -> str | None:
    if any(word in name for word in ("tokenizer", "scheduler", "feature_extractor", "processor")):
        return None
    if name.startswith(("vae", "vqvae", "movq", "safety_checker")):
        return "decode"
    if library == "transformers" or "text_encoder" in name or name == "image_encoder":
        return "encode"
    return "denoise"
