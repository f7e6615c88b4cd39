"""How many bytes each component's weights take, from the heads of its safetensors files: nothing is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dfdask.errors import ModelError
from dfdask.spec import JobSpec
from dfdask.stages.fake import fake_component
from dfdask.stages.model import WHOLE, ModelRef, components, locate

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOST_HEAD_BYTES = 100 << 20


def component_bytes(ref: ModelRef) -> dict[str, dict[str, int]]:
    """By stage, the bytes of its components in the dtype of the job, and all of them for the whole as one stage.

    Names are the same for equal models only. Raises ModelError for a file that is not whole.
    """
    if ref.fake is not None:
        settings = ref.fake
        return {stage: {fake_component(settings, stage): settings.weights.get(stage, 0)} for stage in settings.stages}
    folder = locate(ref.source, ref.revision)
    found: dict[str, dict[str, int]] = {WHOLE: {}}
    for part in components(folder)[1]:
        if part.stage is not None:
            size = {f"{ref.digest[:12]}/{part.name}": _parameters(folder / part.name) * DTYPE_BYTES[ref.dtype]}
            found.setdefault(part.stage, {}).update(size)
            found[WHOLE].update(size)
    return found


def cost_key(spec: JobSpec, ref: ModelRef) -> str:
    """What the seconds of an item depend on beside the device: the model and the numbers of the pipeline call."""
    import hashlib

    from dfdask.arguments import canonical_json

    numbers = {name: value for name, value in spec.arguments.items() if isinstance(value, (int, float))}
    facts = canonical_json([ref.digest, ref.dtype, ref.fake.model_dump(mode="json") if ref.fake else None, numbers])
    return f"{Path(ref.source).name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _parameters(folder: Path) -> int:
    paths = sorted(folder.glob("*.safetensors"))
    usual = [path for path in paths if "." not in path.stem]  # a variant (model.fp16) beside them is not loaded
    return sum(_numbers_in(path) for path in usual or paths)


def _numbers_in(path: Path) -> int:
    """How many numbers a safetensors file holds (its head: 8 bytes of length, then JSON). Raises ModelError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEAD_BYTES:
                raise ValueError(f"a head of {length} bytes")
            head = json.loads(file.read(length))
        tensors = [entry for name, entry in head.items() if name != "__metadata__"]
        should = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        has = path.stat().st_size
        if should != has:
            raise ValueError(f"{has:,} bytes where its head announces {should:,}")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model: {path} cannot be loaded: it is not a whole safetensors file ({error}); "
            "download or save the model again"
        ) from None
