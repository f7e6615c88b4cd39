"""LoRA adapters and another scheduler for a job's pipeline: found and checked, then loaded by diffusers itself."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfdask.arguments import nearest
from dfdask.errors import ModelError, SpecError


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A LoRA as every worker finds it: ``source`` is a file, a directory or a hub id; ``digest`` is of its weights."""

    source: str
    weight_name: str | None
    revision: str | None
    scale: float
    digest: str


@dataclass(frozen=True, slots=True)
class SchedulerRef:
    """A scheduler class of diffusers, and what to change of the configuration that the model has for its own."""

    kind: str
    options: Mapping[str, Any]


def adapter_ref(source: str, weight_name: str | None, revision: str | None, scale: float) -> AdapterRef:
    """The adapter of a job. Raises ModelError where its weights cannot be found or are no LoRA."""
    if Path(source).exists():
        source = str(Path(source).resolve())
    path = adapter_file(source, weight_name, revision)
    _check_keys(path)
    return AdapterRef(source, weight_name, revision, scale, _digest(path))


def adapter_file(source: str, weight_name: str | None, revision: str | None) -> Path:
    """The safetensors file of an adapter; one on the hub is downloaded. Raises ModelError."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"adapters: {path} is no safetensors file; dfdask loads safetensors only")
        return path
    if path.is_dir():
        found = [path / weight_name] if weight_name else sorted(path.glob("*.safetensors"))
        if len(found) == 1 and found[0].is_file() and found[0].suffix == ".safetensors":
            return found[0]
        names = ", ".join(file.name for file in sorted(path.glob("*.safetensors"))) or "none"
        raise ModelError(f"adapters: {path} needs `weight_name`, one of its safetensors files ({names})")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(
            f"adapters: there is no adapter {source!r}; give a safetensors file, its directory or a hub id like "
            "owner/name"
        )
    from huggingface_hub import hf_hub_download

    name = weight_name or "pytorch_lora_weights.safetensors"
    if not name.endswith(".safetensors"):
        raise ModelError(f"adapters: {name} of {source} is no safetensors file; dfdask loads safetensors only")
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"adapters: {name} of {source!r} is neither here nor could it be fetched from the hub ({reason}); check "
            "the names, the network and your access rights"
        ) from None


def load_adapters(pipeline: Any, adapters: tuple[AdapterRef, ...]) -> None:
    """Load them with diffusers' own ``load_lora_weights``; components that are phantoms let them pass.

    Raises ModelError, also for one that has nothing for any component: diffusers would go on without it.
    """
    if not adapters:
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"adapters: {type(pipeline).__name__} takes no LoRA adapters; remove them")
    paths: dict[str, Path] = {}
    for place, adapter in enumerate(adapters):
        path = adapter_file(adapter.source, adapter.weight_name, adapter.revision)
        if _digest(path) != adapter.digest:
            raise ModelError(
                f"adapters: {path} on this worker differs from the one that the job was submitted with; put the same "
                "file on every machine"
            )
        name = f"adapter_{place}"
        paths[name] = path
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        except Exception as error:
            what = " ".join(str(error).split())[:300]
            raise ModelError(
                f"adapters: {path} does not fit {type(pipeline).__name__}: {type(error).__name__}: {what}; use a LoRA "
                "that was made for this model"
            ) from None
    present = {name for found in pipeline.get_list_adapters().values() for name in found}
    passed = {name for part in pipeline.components.values() for name in getattr(part, "passed_adapters", ())}
    for name, path in paths.items():
        if name not in present | passed:
            raise ModelError(
                f"adapters: {path} has no weights for any component of {type(pipeline).__name__}; use a LoRA that was "
                "made for this model"
            )
    chosen = [(name, adapter.scale) for name, adapter in zip(paths, adapters, strict=True) if name in present]
    if chosen:
        pipeline.set_adapters([name for name, _ in chosen], [scale for _, scale in chosen])


def set_scheduler(pipeline: Any, wanted: SchedulerRef | None) -> None:
    """Give the pipeline another scheduler, made from the configuration of its own. Raises SpecError."""
    if wanted is None:
        return
    import diffusers

    known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    if wanted.kind not in known:
        hint = nearest(wanted.kind, known) or f"; diffusers has {', '.join(known)}"
        raise SpecError(f"scheduler.class: diffusers has no scheduler {wanted.kind!r}{hint}")
    kind = getattr(diffusers, wanted.kind)
    taken = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]
    for name in wanted.options:
        if name not in taken:
            hint = nearest(name, taken) or f"; it takes {', '.join(taken)}"
            raise SpecError(f"scheduler.options: {wanted.kind} has no option {name!r}{hint}")
    own = pipeline.scheduler
    try:
        pipeline.scheduler = kind.from_config(own.config, **wanted.options)
    except Exception as error:
        raise SpecError(
            f"scheduler: {wanted.kind} refuses {dict(wanted.options)}: {' '.join(str(error).split())}"
        ) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_keys(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapters: {path} cannot be read ({' '.join(str(error).split())}); fetch it again") from None
    if not any("lora" in key.lower() for key in keys):
        raise ModelError(f"adapters: {path} has no LoRA weights, e.g. {keys[:2]}; name a LoRA file")
