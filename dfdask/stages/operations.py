"""What a model has to do for a batch, counted without weights: every heavy part runs on the meta device.

The pipeline's own call runs on the CPU with the job's arguments. Its components only know shapes: each forward is
counted by torch's ``FlopCounterMode`` and answers zeros of the right shape.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfdask.cost import TaskWork
from dfdask.errors import ModelError
from dfdask.items import Item
from dfdask.stages.cut import Phantom, StopStage, open_pipeline, pipeline_call
from dfdask.stages.model import ModelRef, components, locate

_ATTENTION = ("attention", "bmm", "sdpa")


@dataclass
class _Tally:
    linear: float = 0.0
    attention: float = 0.0
    bytes_moved: float = 0.0
    calls: int = 0
    weights: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageOperations:
    """One call of a stage for a batch, and the bytes of each component's weights."""

    work: TaskWork
    weights: dict[str, int]


def count_operations(ref: ModelRef, items: Sequence[Item]) -> dict[str, StageOperations]:
    """By stage, in order: what one batch of ``items`` takes. Raises ModelError where the pipeline cannot be counted."""
    import torch

    folder = locate(ref.source, ref.revision)
    owners = {part.name: part.stage for part in components(folder)[1] if part.stage}
    tallies: dict[str, _Tally] = {stage: _Tally() for stage in ("encode", "denoise", "decode")}
    size = getattr(torch, ref.dtype).itemsize
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        pipeline = open_pipeline(ref, None, "cpu")
        for name, stage in owners.items():
            phantom = getattr(pipeline, name, None)
            if isinstance(phantom, Phantom) and stage in tallies:
                object.__setattr__(pipeline, name, _Counted(name, phantom, tallies[stage], size, stage == "decode"))
        try:
            pipeline(**pipeline_call(pipeline, items))
        except StopStage:
            pass
        except Exception as error:
            what = " ".join(str(error).split())[:200]
            raise ModelError(
                f"model: the operations of {type(pipeline).__name__} cannot be counted "
                f"({type(error).__name__}: {what}); run a few items and plan from what they took"
            ) from None
    return {
        stage: StageOperations(
            TaskWork(len(items), tally.linear, tally.attention, tally.bytes_moved, max(tally.calls, 1)),
            dict(tally.weights),
        )
        for stage, tally in tallies.items()
    }


class _Counted(Phantom):
    """A component that counts its forwards; decoding, the last of them, ends the call."""

    def __init__(self, name: str, phantom: Phantom, tally: _Tally, size: int, last: bool) -> None:
        model = phantom.__dict__["_model"].to("meta").eval()
        if hasattr(model, "tie_weights"):  # embeddings that are the same tensor are loaded once
            model.tie_weights()
        super().__init__(model, phantom.__dict__["dtype"], phantom.__dict__["device"])
        weights = sum(parameter.numel() for parameter in model.parameters()) * size
        tally.weights[name] = weights
        self.__dict__.update(_tally=tally, _bytes=weights, _last=last, _seen={})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.__dict__["_model"]
        given = inspect.signature(model.forward).bind(*args, **kwargs)
        if type(model).__module__.startswith("transformers") and "attention_mask" in given.arguments:
            given.arguments["attention_mask"] = None  # its values would be looked at; it changes no operation
        return self._count(model, given.args, given.kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        self._count(self.__dict__["_model"].decode, args, kwargs)
        raise StopStage

    def _count(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        import torch
        from torch.utils._pytree import tree_map
        from torch.utils.flop_counter import FlopCounterMode

        def meta(leaf: Any) -> Any:
            return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

        def shape(leaf: Any) -> Any:
            return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

        def zeros(leaf: Any) -> Any:
            return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

        seen, tally = self.__dict__["_seen"], self.__dict__["_tally"]
        key = repr(tree_map(shape, (args, kwargs)))  # steps differ in their numbers only
        if key not in seen:
            with FlopCounterMode(display=False) as counter:
                result = function(*tree_map(meta, args), **tree_map(meta, kwargs))
            counts = {str(name): count for name, count in counter.get_flop_counts().get("Global", {}).items()}
            attention = sum(count for name, count in counts.items() if any(part in name for part in _ATTENTION))
            seen[key] = result, sum(counts.values()) - attention, attention
        result, linear, attention = seen[key]
        tally.calls += 1
        tally.linear += linear
        tally.attention += attention
        tally.bytes_moved += self.__dict__["_bytes"]
        return tree_map(zeros, result)
