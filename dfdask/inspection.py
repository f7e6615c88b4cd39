"""What a model is made of and what an item costs, without its weights: ``dfdask inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dfdask.spec import JobSpec

if TYPE_CHECKING:
    from rich.console import Console


def inspected(model: str, dtype: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of ``model`` as JSON-able data. Raises ModelError and SpecError."""
    from dfdask.stages.check import inspect_model
    from dfdask.stages.model import components, locate, model_ref, with_defaults
    from dfdask.stages.profile import example_item, stage_profiles

    spec = with_defaults(JobSpec(model=model, prompts=["example"], dtype=dtype, arguments=dict(arguments)))
    ref = model_ref(spec)
    folder = locate(ref.source, ref.revision)
    item = example_item(ref, spec.arguments)
    checked = inspect_model(ref, [item.without_pictures()])
    profiles = stage_profiles(ref, item)
    kinds = {part.name: part.kind for part in components(folder)[1]}
    stages = []
    for name in checked.stages:
        profile = asdict(profiles[name])
        parts = [
            {
                "name": part,
                "class": kinds[part],
                "parameters": profile["parameters"][part],
                "bytes": profile["weight_bytes"][part],
                "calls": profile["calls"].get(part, 0),
            }
            for part in profile["parameters"]
        ]
        counts = {key: profile[key] for key in ("linear_flops", "attention_flops", "bytes_moved", "handoff_bytes")}
        if profile["problem"]:
            counts = dict.fromkeys(counts)
        stages.append({"name": name, "components": parts, **counts, "not_counted": profile["problem"] or None})
    return {
        "model": model,
        "pipeline": components(folder)[0],
        "digest": ref.digest,
        "dtype": dtype,
        "arguments": dict(spec.arguments),
        "shape": list(checked.shapes[0]),
        "uncut": checked.uncut or None,
        "stages": stages,
    }


def print_inspected(console: Console, found: Mapping[str, Any]) -> None:
    """The same for people."""
    from rich.table import Table

    size = " x ".join(map(str, reversed(found["shape"][-2:])))
    frames = f", {found['shape'][0]} frames" if len(found["shape"]) == 3 else ""
    console.print(f"{found['pipeline']}, {found['dtype']}; an item has {size} pixels{frames}", markup=False)
    if found["uncut"]:
        console.print(f"It runs whole, as one stage: {found['uncut']}.", markup=False)
    parts = Table("stage", "component", "class", box=None, pad_edge=False)
    for title in ("parameters", "size", "calls"):
        parts.add_column(title, justify="right")
    for row in _part_rows(found["stages"]):
        parts.add_row(*row)
    console.print(parts)
    counts = Table("stage", box=None, pad_edge=False)
    for title in ("linear FLOPs", "attention FLOPs", "bytes moved", "handed on"):
        counts.add_column(title, justify="right")
    for stage in found["stages"]:
        flops = [_scaled(stage[key]) for key in ("linear_flops", "attention_flops")]
        sizes = [_bytes(stage[key]) for key in ("bytes_moved", "handoff_bytes")]
        counts.add_row(stage["name"], *flops, *sizes)
    console.print()
    console.print(counts)
    for stage in found["stages"]:
        if stage["not_counted"]:
            console.print(f"{stage['name']}: not counted, for {stage['not_counted']}", markup=False, soft_wrap=True)


def _part_rows(stages: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for stage in stages:
        for place, part in enumerate(stage["components"]):
            name = stage["name"] if place == 0 else ""
            calls = str(part["calls"]) if part["calls"] else "-"
            yield name, part["name"], part["class"], _scaled(part["parameters"]), _bytes(part["bytes"]), calls


def _scaled(value: float | None) -> str:
    """With three digits and k, M, G, T or P."""
    if value is None:
        return "not counted"
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def _bytes(value: float | None) -> str:
    return "not counted" if value is None else f"{_scaled(value)}B"
