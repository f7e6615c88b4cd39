"""What stages hand to each other: trees of tensors, taken apart by item, moved, stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dfdask.stages.batch import Rows, map_entries


class Indivisible(ValueError):
    """A state that belongs to several items together and cannot be taken apart."""


class Calls(NamedTuple):
    """What a function returned that was called for each item on its own: Rows of a list."""

    each: Rows


class Parts(NamedTuple):
    """An object of diffusers by its class and attributes, as ``DiagonalGaussianDistribution``."""

    kind: Any
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor that is not there; slicing it slices its items."""

    shape: tuple[int, ...]
    dtype: str

    def __getitem__(self, part: slice) -> Shape:
        return Shape((len(range(self.shape[0])[part]), *self.shape[1:]), self.dtype)

    def joined(self, other: Shape) -> Shape:
        return Shape((self.shape[0] + other.shape[0], *self.shape[1:]), self.dtype)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (Rows, dict, list, tuple)):
        return map_entries(lambda entry: map_leaves(function, entry), value)
    return function(value)


def moved(value: Any, device: str) -> Any:
    import torch

    return map_leaves(lambda leaf: leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def copied(value: Any) -> Any:
    """With tensors of its own: pipelines change some in place."""
    import torch

    return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def apart(value: Any) -> Any:
    """With the objects of diffusers that hold tensors as ``Parts``."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def part(leaf: Any) -> Any:
        if isinstance(leaf, DiagonalGaussianDistribution):
            return Parts(type(leaf), {"parameters": leaf.parameters, "deterministic": leaf.deterministic})
        if type(leaf).__module__.startswith("diffusers.models.") and hasattr(leaf, "__dict__"):
            return Parts(type(leaf), dict(vars(leaf)))
        return leaf

    return map_leaves(part, value)


def together(value: Any) -> Any:
    """``value`` as the pipeline knows it, without Rows and Parts."""
    if isinstance(value, Rows):
        return together(value.value)
    if isinstance(value, Parts):
        attributes = {name: together(entry) for name, entry in value.attributes.items()}
        if "parameters" in attributes:
            return value.kind(**attributes)
        made = value.kind.__new__(value.kind)
        made.__dict__.update(attributes)
        return made
    return map_entries(together, value) if isinstance(value, (dict, list, tuple)) else value


def shapes(value: Any) -> Any:
    """The shapes and dtypes of tensors: all that decoding needs to know of the embeddings."""
    import torch

    def shape(leaf: Any) -> Any:
        return Shape(tuple(leaf.shape), str(leaf.dtype)[6:]) if isinstance(leaf, torch.Tensor) else leaf

    return map_leaves(shape, value)


def stand_ins(value: Any, device: str) -> Any:
    """Tensors that weigh nothing: a scalar seen as the whole by zero strides."""
    import torch

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Shape):
            return leaf
        return torch.zeros((), dtype=getattr(torch, leaf.dtype), device=device).expand(leaf.shape)

    return map_leaves(stand_in, value)


def marked(many: Any, one: Any, two: Any, count: int) -> Any:
    """``many``, made for ``count`` items, with what has a part for each as Rows.

    ``one`` and ``two`` are the shapes of what was made for one and for two items. Raises Indivisible.
    """
    if isinstance(one, Shape):
        if one == two:
            return many
        divisible = isinstance(two, Shape) and (one.shape[:1], two.shape) == ((1,), (2, *one.shape[1:]))
        if divisible and getattr(many, "shape", ())[:1] == (count,):
            return Rows(many)
        raise Indivisible(f"{one} for one item, {two} for two")
    if isinstance(one, dict):
        if not isinstance(two, dict) or not one.keys() == two.keys() == many.keys():
            raise Indivisible("other entries for more items")
        entries = iter([(many[key], one[key], two[key]) for key in many])
        return map_entries(lambda _: marked(*next(entries), count), many)
    if isinstance(one, (list, tuple)):
        if isinstance(one, list) and (len(one), len(two), len(many)) == (1, 2, count):
            return Rows(many)
        if not len(one) == len(two) == len(many):
            raise Indivisible(f"{len(one)} entries for one item, {len(two)} for two")
        entries = iter(list(zip(many, one, two, strict=True)))
        return map_entries(lambda _: marked(*next(entries), count), many)
    return many


def marked_by_length(value: Any, count: int) -> Any:
    """What goes into the VAE: latents and timesteps by their first dimension, generators as a list."""
    if getattr(value, "shape", ())[:1] == (count,) or (isinstance(value, list) and len(value) == count):
        return Rows(value)
    if isinstance(value, (dict, tuple)):
        return map_entries(lambda entry: marked_by_length(entry, count), value)
    return value


def has_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(has_rows, value.values()))
    return isinstance(value, Rows) or (isinstance(value, (list, tuple)) and any(map(has_rows, value)))


def picked(value: Any, places: Sequence[int]) -> Any:
    """The state of the items at these places, in this order."""
    if isinstance(value, Rows):
        if isinstance(value.value, list):
            return Rows([value.value[place] for place in places])
        return Rows(value.value[list(places)])
    return map_entries(lambda entry: picked(entry, places), value) if isinstance(value, (dict, list, tuple)) else value


def joined(states: Sequence[Any]) -> Any:
    """One state of the items of all. Raises Indivisible where they do not fit together."""
    import torch

    first = states[0]
    if isinstance(first, Rows):
        values = [state.value for state in states]
        if isinstance(first.value, list):
            return Rows([entry for value in values for entry in value])
        if len({(value.shape[1:], value.dtype) for value in values}) > 1:
            raise Indivisible("other shapes")
        return Rows(torch.cat(values))
    if isinstance(first, torch.Tensor):
        if not all(state.shape == first.shape and torch.equal(state, first) for state in states):
            raise Indivisible("what they share differs")
        return first
    if isinstance(first, dict):
        if any(state.keys() != first.keys() for state in states):
            raise Indivisible("other entries")
        entries = iter([[state[key] for state in states] for key in first])
        return map_entries(lambda _: joined(next(entries)), first)
    if isinstance(first, (list, tuple)):
        if any(len(state) != len(first) for state in states):
            raise Indivisible("other lengths")
        entries = iter(list(map(list, zip(*states, strict=True))))
        return map_entries(lambda _: joined(next(entries)), first)
    return first


def calls_of(entries: Sequence[Any]) -> Iterator[Any]:
    """What each call returned, in order, from a list of marked results."""
    for entry in entries:
        if isinstance(entry, Calls):
            yield from map(together, entry.each.value)
        else:
            yield together(entry)
