"""Where a pipeline class can be cut, read from its source: no family is known by name."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dfdask.stages.model import Component

_LOOPS = (ast.For, ast.While, ast.ListComp, ast.GeneratorExp)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a pipeline class does with its components.

    ``uncut`` says why it has no cuts, else it is empty. ``conditions`` is true where it encodes pictures with its
    VAE: the encode stage then holds the VAE too. ``overlays`` is true where input pictures are laid over the output.
    """

    uncut: str
    conditions: bool
    overlays: bool


def anatomy(kind: Any, parts: Sequence[Component]) -> Anatomy:
    """The cuts of the pipeline class ``kind`` with these components."""
    weighty = {part.name for part in parts if part.stage is not None}
    calls = _calls(kind)
    decoders = {call.target for call in calls if call.method == "decode"} & weighty
    conditions = any((call.target, call.method) == ("vae", "encode") for call in calls)
    overlays = any(call.method == "apply_overlay" for call in calls)
    owners = {part.stage for part in parts} - {None}
    uncut = ""
    if not hasattr(kind, "encode_prompt"):
        uncut = "it has no encode_prompt"
    elif "vae" not in decoders:
        uncut = "it does not decode with a VAE"
    elif len(decoders) > 1:
        uncut = f"it decodes with several components ({', '.join(sorted(decoders))})"
    elif _decodes_in_pieces(calls):
        uncut = "it decodes in pieces"
    elif owners != {"encode", "denoise", "decode"}:
        uncut = f"it has nothing to {' or '.join(sorted({'encode', 'denoise', 'decode'} - owners))} with"
    return Anatomy(uncut, conditions, overlays)


@dataclass(frozen=True, slots=True)
class _Call:
    """``self.target.method(...)`` or, without target, ``self.method(...)`` in the method ``inside``."""

    inside: str
    target: str
    method: str
    in_loop: bool


@functools.lru_cache(maxsize=64)
def _calls(kind: Any) -> tuple[_Call, ...]:
    found: list[_Call] = []
    seen: set[str] = set()
    for ancestor in kind.__mro__:
        if not ancestor.__module__.startswith("diffusers.pipelines.") or ancestor.__name__ == "DiffusionPipeline":
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
        for function in getattr(tree, "body", ()):
            if isinstance(function, ast.FunctionDef) and function.name not in seen:
                seen.add(function.name)
                found.extend(_calls_in(function, function.name, False))
    return tuple(found)


def _calls_in(node: ast.AST, inside: str, in_loop: bool) -> Iterator[_Call]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
            owner = child.func.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                yield _Call(inside, "", child.func.attr, in_loop)
            elif isinstance(owner, ast.Attribute):
                yield _Call(inside, owner.attr, child.func.attr, in_loop)
        yield from _calls_in(child, inside, in_loop or isinstance(child, _LOOPS))


def _decodes_in_pieces(calls: Sequence[_Call]) -> bool:
    """Whether ``vae.decode``, or a method that comes to it, is called in a loop."""
    decoding: set[str] = set()
    while True:
        to_decode = [
            call
            for call in calls
            if (call.target, call.method) == ("vae", "decode") or (not call.target and call.method in decoding)
        ]
        if any(call.in_loop for call in to_decode):
            return True
        if {call.inside for call in to_decode} <= decoding:
            return False
        decoding.update(call.inside for call in to_decode)
