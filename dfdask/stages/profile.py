"""What each stage of a model has to do for an item, counted without its weights.

The pipeline runs as it is, on the CPU; each call of a component runs on the meta device, where operations are counted
and nothing is computed, and zeros of the right shape go on. Equal calls, as those of the denoising steps, are counted
once and added up.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from dfdask.cost import ItemWork
from dfdask.errors import ModelError
from dfdask.images import Picture
from dfdask.items import Item
from dfdask.stages.batch import describe, nbytes
from dfdask.stages.cut import Phantom, PipelineStage, open_pipeline, pipeline_anatomy, stage_names, stage_parts
from dfdask.stages.model import ModelRef, locate
from dfdask.stages.state import Shape, map_leaves, shapes

_VIEWS = {
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze"),
    *("squeeze", "split", "split_with_sizes", "chunk", "alias", "detach", "unbind", "as_strided"),
}
_STAND_IN_NUMBERS = 1 << 26
_METHODS = ("forward", "encode", "decode")


@dataclass(frozen=True, slots=True)
class StageProfile:
    """One stage's work for one item. ``problem`` says why operations are not counted; the counts are zero then.

    ``weight_bytes`` is by component; ``bytes_moved`` is what its operations read and write, weights included, with
    attention as one operation; ``handoff_bytes`` is what it hands to the next stage, for the last one its pixels.
    """

    weight_bytes: Mapping[str, int]
    parameters: Mapping[str, int]
    linear_flops: float = 0.0
    attention_flops: float = 0.0
    bytes_moved: float = 0.0
    handoff_bytes: int = 0
    calls: Mapping[str, int] = field(default_factory=dict)  # by component: how often it is called
    problem: str = ""

    @property
    def item_work(self) -> ItemWork:
        """As the cost model takes it: weights are read once a call."""
        weights = sum(self.weight_bytes.get(name, 0) * calls for name, calls in self.calls.items())
        moved, calls = max(self.bytes_moved - weights, 0.0), max(sum(self.calls.values()), 1)
        return ItemWork(self.linear_flops, self.attention_flops, moved, weights, calls)


def stage_profiles(
    ref: ModelRef, item: Item, opening: AbstractContextManager[Any] | None = None
) -> dict[str, StageProfile]:
    """By stage, in order, what ``item`` costs it. Raises ModelError.

    The pipeline is opened within ``opening``: for threads of which only one may import libraries at a time.
    """
    ref = replace(ref, device="cpu")  # whatever it will run on, and be it not there
    folder = locate(ref.source, ref.revision)
    with opening or nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = open_pipeline(ref, None, "cpu")
    phantoms = {name: part for name, part in pipeline.components.items() if isinstance(part, Phantom)}
    for phantom in phantoms.values():
        model = phantom.__dict__["_model"]
        if hasattr(model, "tie_weights"):  # embeddings that are the same tensor are loaded once
            model.tie_weights()
    known = _known_calls(repr(ref))
    profiles: dict[str, StageProfile] = {}
    state: Any = None
    problem = ""
    for stage in stage_names(folder):
        own = [part.name for part in stage_parts(folder, stage) if part.name in phantoms]
        sizes = {name: _size(phantoms[name]) for name in own}
        weights = {name: numbers * phantoms[name].dtype.itemsize for name, numbers in sizes.items()}
        counter = _Counter(known)
        for name, phantom in phantoms.items():
            pipeline.__dict__[name] = _Counted(name, phantom, counter) if name in own else phantom
        if not problem:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    state = PipelineStage(ref, stage, pipeline).run([item], state)
            except _NotCounted as error:
                problem = str(error)
            except Exception as error:
                problem = describe(error)
        if problem:
            profiles[stage] = StageProfile(weights, sizes, problem=problem)
        else:
            handoff = sum(getattr(array, "nbytes", 0) for array in state) if isinstance(state, list) else nbytes(state)
            total = counter.total
            profiles[stage] = StageProfile(
                weights, sizes, total.linear_flops, total.attention_flops, total.bytes_moved, handoff, counter.calls
            )
    return profiles


def example_item(ref: ModelRef, arguments: Mapping[str, Any]) -> Item:
    """An item of the pipeline's default size with these arguments, and a picture where it starts from one."""
    from dfdask.stages.cut import pipeline_class
    from dfdask.stages.model import components

    folder = locate(ref.source, ref.revision)
    given = dict(arguments)
    accepted = inspect.signature(pipeline_class(components(folder)[0]).__call__).parameters
    if pipeline_anatomy(folder).conditions:
        size = (int(given.get("width") or 512), int(given.get("height") or 512))
        for name in ("image", "mask_image"):
            if name in accepted:
                given.setdefault(name, Picture("example", "", *size))
    return Item(0, "example", "a photograph of an astronaut riding a horse", 0, given)


class _NotCounted(ModelError):
    pass


@dataclass(slots=True)
class _Work:
    linear_flops: float = 0.0
    attention_flops: float = 0.0
    bytes_moved: float = 0.0


class _Counter:
    """Sums the work of all calls; remembers that of equal ones with the shapes of what they return."""

    def __init__(self, known: dict[str, tuple[_Work, Any]]) -> None:
        self.total = _Work()
        self.calls: dict[str, int] = {}
        self.known = known

    def add(self, name: str, work: _Work) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.total.linear_flops += work.linear_flops
        self.total.attention_flops += work.attention_flops
        self.total.bytes_moved += work.bytes_moved


class _Counted(Phantom):
    """A phantom whose calls are counted."""

    def __init__(self, name: str, phantom: Phantom, counter: _Counter) -> None:
        model = phantom.__dict__["_model"]
        super().__init__(model, phantom.dtype, phantom.device)
        self.__dict__.update(_name=name, _counter=counter, _meta=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._count("__call__", args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self._count("encode", args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._count("decode", args, kwargs)

    def _count(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        counter: _Counter = self._counter
        key = f"{self._name} {method} {map_leaves(_described, shapes([list(args), dict(kwargs)]))}"
        if key not in counter.known:
            counter.known[key] = self._measured(method, args, kwargs)
        work, result = counter.known[key]
        counter.add(self._name, work)
        return _real(result)

    def _measured(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Work, Any]:
        if self._meta is None:
            # Pipelines read some buffers' numbers, so these stay where they are and a copy goes to the meta device.
            self.__dict__["_meta"] = copy.deepcopy(self.__dict__["_model"]).to("meta", self.dtype).eval()
        named = inspect.signature(self._meta.forward if method == "__call__" else getattr(self._meta, method))
        bound = dict(named.bind_partial(*args).arguments) | kwargs if args else kwargs
        unmasked = {name: value for name, value in bound.items() if not name.endswith("mask")}
        problem = ""
        # Some masks are looked into, which those on the meta device cannot be.
        for positional, attempt in ((args, kwargs), ((), unmasked)):
            work = _Work()
            try:
                result = _run(getattr(self._meta, method), _on_meta(positional), _on_meta(attempt), work)
            except Exception as error:
                problem = problem or describe(error)
                continue
            return work, result
        raise _NotCounted(f"{self._name} cannot run without numbers ({problem})")


@lru_cache(maxsize=4)
def _known_calls(model: str) -> dict[str, tuple[_Work, Any]]:
    """The work of a model's calls that were counted in this process: another number of steps makes no others."""
    return {}


def _run(function: Any, args: Any, kwargs: Any, work: _Work) -> Any:
    """Call ``function`` with meta tensors, adding up in ``work`` what it does."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    class Attention(TorchFunctionMode):
        """Attention as one operation, which reads and writes what a fused kernel does."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.nn.functional.scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
            work.attention_flops += 2.0 * query.numel() * key.shape[-2] + 2.0 * output.numel() * key.shape[-2]
            work.bytes_moved += sum(tensor.nbytes for tensor in (query, key, value, output))
            return output

    class Traffic(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func.__name__.split(".")[0] not in _VIEWS:
                leaves = tree_leaves((args, kwargs, output))
                work.bytes_moved += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
            return output

    traffic: Any = Traffic
    with torch.no_grad(), FlopCounterMode(display=False) as flops, traffic(), Attention():
        result = function(*args, **kwargs)
    for operation, count in flops.get_flop_counts().get("Global", {}).items():
        # Attention that is written out multiplies batches of matrices; layers do not.
        if "bmm" in str(operation) or "attention" in str(operation):
            work.attention_flops += count
        else:
            work.linear_flops += count
    return result


def _described(leaf: Any) -> str:
    """The same for calls that do the same: which generator draws, say, makes no difference."""
    plain = leaf is None or isinstance(leaf, (bool, int, float, str, Shape))
    return repr(leaf) if plain else type(leaf).__name__


def _on_meta(value: Any) -> Any:
    import torch

    return map_leaves(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, value)


def _real(value: Any) -> Any:
    """Zeros of the shapes of ``value``, on the CPU, inside whatever objects it is made of."""
    import torch

    from dfdask.stages.state import apart, together

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.numel() > _STAND_IN_NUMBERS:
            return torch.zeros((), dtype=leaf.dtype).expand(leaf.shape)
        return torch.zeros(leaf.shape, dtype=leaf.dtype)

    return together(map_leaves(zeros, apart(value)))


def _size(phantom: Phantom) -> int:
    return sum(parameter.numel() for parameter in phantom.parameters())
