"""Record what the encode stage computes and replay it in the others, wherever the pipeline asks for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dfdask.errors import ModelError
from dfdask.stages.batch import Rows
from dfdask.stages.state import Calls, Indivisible, Shape, apart, calls_of, copied, marked, shapes

Tape = dict[str, list[Any]]
"""By the name of a function: what its calls returned, in order."""

_ABSENT = object()
_METHODS = ("forward", "encode", "generate")


def encoders(pipeline: Any, owned: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """What encodes: methods ``encode_...`` of the pipeline, and calls of the components ``owned``.

    Methods that take a generator are left out: they draw noise, which every stage has to do again.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name in dir(type(pipeline)):
        method = inspect.getattr_static(type(pipeline), name)
        encodes = name.lstrip("_").startswith("encode_") and inspect.isfunction(method)
        if encodes and "generator" not in inspect.signature(method).parameters:
            found[name] = (pipeline, name)
    for name in owned:
        component = getattr(pipeline, name, None)
        for method in _METHODS:
            if callable(getattr(component, method, None)) and not (name == "vae" and method == "forward"):
                found[f"{name}.{method}"] = (component, method)
    return found


@contextmanager
def recording(sources: Mapping[str, tuple[Any, str]], keep: bool) -> Iterator[Tape]:
    """Collect what the functions return; with ``keep`` copies of it. Calls inside of calls are not collected."""
    tape: Tape = {}
    depth = 0

    def recorder(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                tape.setdefault(name, []).append(copied(apart(result)) if keep else result)
            return result

        return record

    with ExitStack() as stack:
        for name, (owner, method) in sources.items():
            stack.enter_context(patched(owner, **{method: recorder(name, getattr(owner, method))}))
        yield tape


@contextmanager
def replaying(sources: Mapping[str, tuple[Any, str]], tape: Tape) -> Iterator[None]:
    """Let the functions return what ``tape`` has, in the order of their calls."""

    def player(name: str) -> Callable[..., Any]:
        results = calls_of(tape.get(name, ()))

        def play(*args: Any, **kwargs: Any) -> Any:
            for result in results:
                return result
            raise ModelError(f"model: it calls {name} more often than in its encode stage; it cannot be run in stages")

        return play

    with ExitStack() as stack:
        for name, (owner, method) in sources.items():
            stack.enter_context(patched(owner, **{method: player(name)}))
        yield


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a tape depends on the number of items: what it holds for ``one`` and for ``two``, in shapes.

    ``grouped`` says for functions that are called once for each item and several times over whether all items' first
    calls come first, then all their second ones.
    """

    one: dict[str, list[Any]]
    two: dict[str, list[Any]]
    grouped: Mapping[str, bool]

    @classmethod
    def learn(cls, one: Tape, two: Tape) -> Pattern:
        """From the tapes of an item, and of the same item with another one. Raises Indivisible."""
        grouped = {}
        for name, single in one.items():
            if len(two.get(name, ())) == 2 * len(single) > 2:
                grouped[name] = _distance(two[name][1], single[1]) >= _distance(two[name][2], single[1])
        pattern = cls(shapes(one), shapes(two), grouped)
        pattern.mark(two, 2)
        return pattern

    def mark(self, tape: Tape, count: int) -> Tape:
        """``tape``, made for ``count`` items, with what has a part for each as Rows. Raises Indivisible."""
        if not tape.keys() == self.one.keys() == self.two.keys():
            raise Indivisible("other functions are called for more items")
        return {name: list(self._entries(name, tape[name], count)) for name in tape}

    def _entries(self, name: str, results: Sequence[Any], count: int) -> Iterator[Any]:
        one, two, calls = self.one[name], self.two[name], len(self.one[name])
        if calls == len(two) == len(results):
            for result, single, double in zip(results, one, two, strict=True):
                yield marked(result, single, double, count)
        elif len(two) == 2 * calls and len(results) == count * calls:
            for call in range(calls):
                places = range(call * count, (call + 1) * count) if self.grouped.get(name, True) else None
                places = places or range(call, count * calls, calls)
                yield Calls(Rows([results[place] for place in places]))
        else:
            raise Indivisible(f"{name} is called {calls} times for one item, {len(two)} times for two")


def scales(one: Any, two: Any) -> bool:
    """Whether shapes made for two items are those for one with a first dimension twice as long, or the same."""
    if isinstance(one, Shape):
        return isinstance(two, Shape) and (
            one == two or (bool(one.shape) and two.shape == (2 * one.shape[0], *one.shape[1:]))
        )
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(scales(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(two, type(one)) and len(one) == len(two) and all(map(scales, one, two))
    return True


def _distance(one: Any, other: Any) -> float:
    """The largest difference between the tensors of two results of the same shapes, else infinity."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return float("inf")
        return float((one.float() - other.float()).abs().max()) if one.numel() else 0.0
    if isinstance(one, dict) and isinstance(other, dict):
        return max((_distance(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return max(map(_distance, one, other), default=0.0)
    return 0.0


@contextmanager
def patched(target: Any, **replacements: Any) -> Iterator[None]:
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
