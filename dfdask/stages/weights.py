"""How many bytes each component's weights take, from the heads of its safetensors files: nothing is loaded."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dfdask.blocks import LARGEST_PART, SLOTS
from dfdask.errors import ModelError
from dfdask.spec import JobSpec
from dfdask.speed import Quantization
from dfdask.stages.fake import fake_component
from dfdask.stages.model import WHOLE, ModelRef, components, locate

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOST_HEAD_BYTES = 100 << 20


class ComponentBytes(NamedTuple):
    """By stage, and for all of them as one, the bytes of each component, and those that stay where it is streamed.

    ``streamed`` is empty where nothing is: of a fake model, and on a CPU, which has no other memory to stream from.
    """

    whole: dict[str, dict[str, int]]
    streamed: dict[str, dict[str, int]]


def component_bytes(ref: ModelRef) -> ComponentBytes:
    """What weights take in the dtype of the job, streamed ones about. Names are the same for equal models only.

    Raises ModelError for a file that is not whole.
    """
    if ref.fake is not None:
        settings = ref.fake
        sizes = {stage: {fake_component(settings, stage): settings.weights.get(stage, 0)} for stage in settings.stages}
        return ComponentBytes(sizes, {})
    folder = locate(ref.source, ref.revision)
    found = ComponentBytes({WHOLE: {}}, {WHOLE: {}})
    for part in components(folder)[1]:
        if part.stage is not None:
            quantised = ref.speed.quantize.get(part.name)
            numbers = _numbers(folder / part.name)
            total = sum(numbers.values())
            each = DTYPE_BYTES[ref.dtype] if quantised is None else _quantised_bytes(quantised, DTYPE_BYTES[ref.dtype])
            for sizes, count in zip(found, (total, _kept(numbers) if quantised is None else total), strict=True):
                size = {f"{ref.digest[:12]}/{part.name}": round(count * each)}
                sizes.setdefault(part.stage, {}).update(size)
                sizes[WHOLE].update(size)
    return found if ref.device != "cpu" else found._replace(streamed={})


def cost_key(spec: JobSpec, ref: ModelRef) -> str:
    """What the seconds of an item depend on beside the device: the model and the numbers of the pipeline call."""
    import hashlib

    from dfdask.arguments import canonical_json

    numbers = {name: value for name, value in spec.arguments.items() if isinstance(value, (int, float))}
    facts = canonical_json([ref.digest, ref.dtype, ref.fake.model_dump(mode="json") if ref.fake else None, numbers])
    return f"{Path(ref.source).name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _quantised_bytes(quantised: Quantization, usual: int) -> float:
    """Of a number, with an eighth more for scales and what stays as it is; ``usual`` where its width is not said.

    The backend or its options name the width, as ``bitsandbytes_4bit`` or ``weights_dtype: int8``.
    """
    said = " ".join([quantised.backend, *map(str, quantised.options.values())]).lower()
    width = re.search(r"(?:int|fp|nf|float|_)([248])(?!\d)", said)
    return min(int(width[1]) / 8 * 9 / 8, usual) if width else usual


def _kept(numbers: Mapping[str, int]) -> int:
    """Of a component's numbers, those that stay on a device where all blocks pass through it, ``SLOTS`` at a time."""
    total = sum(numbers.values())
    core, blocks = _core_and_blocks({tuple(name.split(".")): count for name, count in numbers.items()}, total)
    return min(core + SLOTS * max(blocks, default=0), total)


def _core_and_blocks(numbers: Mapping[tuple[str, ...], int], total: int) -> tuple[int, list[int]]:
    """Blocks are told by their numbers in the tensors' names, ``blocks.7.attention.weight``; large ones are divided."""
    core, inside = 0, defaultdict[tuple[str, ...], dict[tuple[str, ...], int]](dict)
    for name, count in numbers.items():
        place = next((place for place, part in enumerate(name) if part.isdigit()), None)
        if place is None:
            core += count
        else:
            inside[name[: place + 1]][name[place + 1 :]] = count
    blocks: list[int] = []
    for tensors in inside.values():
        size = sum(tensors.values())
        if size > total // LARGEST_PART and any(part.isdigit() for name in tensors for part in name):
            more, smaller = _core_and_blocks(tensors, total)
            core, blocks = core + more, blocks + smaller
        else:
            blocks.append(size)
    return core, blocks


def _numbers(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of a component has."""
    paths = sorted(folder.glob("*.safetensors"))
    usual = [path for path in paths if "." not in path.stem]  # a variant (model.fp16) beside them is not loaded
    return {name: count for path in usual or paths for name, count in _numbers_in(path).items()}


def _numbers_in(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file has, by its head (8 bytes of length, then JSON).

    Raises ModelError.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEAD_BYTES:
                raise ValueError(f"a head of {length} bytes")
            head = json.loads(file.read(length))
        tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
        should = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        has = path.stat().st_size
        if should != has:
            raise ValueError(f"{has:,} bytes where its head announces {should:,}")
        return {name: math.prod(entry["shape"]) for name, entry in tensors.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model: {path} cannot be loaded: it is not a whole safetensors file ({error}); "
            "download or save the model again"
        ) from None
