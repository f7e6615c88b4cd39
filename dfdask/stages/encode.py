"""Encode once: items that say the same share their embeddings, within a call and from call to call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from zict import LRU

from dfdask.arguments import canonical_json
from dfdask.batching import call_key
from dfdask.images import Picture
from dfdask.items import Item, pictures_in
from dfdask.stages.batch import is_out_of_memory, nbytes
from dfdask.stages.encodings import Shelf
from dfdask.stages.state import Indivisible, has_rows, joined, picked, shapes
from dfdask.stages.tape import Pattern, Tape, scales

CACHE_BYTES = 256 * 2**20

Run = Callable[[Sequence[Item]], tuple[Tape, Any]]
"""Encodes items: returns the tape, and the arguments of the denoiser's first call where it came to that."""


class TakesNoLists(ValueError):
    """The pipeline cannot take several items with pictures in one call."""


class Encoder:
    """Encodes items that share a call, each kind of input once as long as it is remembered.

    In ``strict`` mode only whole calls are remembered: an embedding differs by rounding (some 1e-7 of its size) with
    the number of texts that it is computed with.
    """

    def __init__(self, run: Run, strict: bool, cache_bytes: int = CACHE_BYTES, shelf: Shelf | None = None) -> None:
        self._run = run
        self._strict = strict
        self._patterns: dict[str, Pattern | None] = {}
        self._cache = _Cache(cache_bytes, shelf)
        self.computed_items = 0
        self.reused_items = 0

    def encode(self, items: Sequence[Item]) -> Tape:
        """What stages after this one replay, divided by item where that is possible. Raises TakesNoLists."""
        keys = [_key(item) for item in items]
        tapes = self._cache.get_all(keys) if not self._strict and len(items) > 1 else []
        if tapes and (known := _joined(tapes)) is not None:
            self.reused_items += len(items)
            return known
        pattern = self._pattern(items) if len(items) > 1 else self._patterns.get(call_key(items[0]))
        if self._strict or len(items) == 1 or pattern is None:
            return self._together(items, " ".join(keys), pattern)
        places = {key: keys.index(key) for key in dict.fromkeys(keys)}  # of the first item of each kind
        missing = [key for key, place in places.items() if not has_rows(tapes[place])]
        while True:
            if missing:
                tape = self._marked([items[places[key]] for key in missing], pattern)
                for place, key in enumerate(missing):
                    self._cache.put(key, picked(tape, [place]))
                if len(missing) == len(places):
                    self.reused_items += len(items) - len(missing)
                    order = {key: place for place, key in enumerate(missing)}
                    return tape if len(missing) == len(items) else picked(tape, [order[key] for key in keys])
            found = _joined(self._cache.get_all(keys))
            if found is None:  # encoded to other lengths, or pushed out of the cache already
                missing = list(places)
                continue
            self.reused_items += len(items) - len(missing)
            return found

    def _together(self, items: Sequence[Item], key: str, pattern: Pattern | None) -> Tape:
        tape = self._cache.get(key)
        if tape is not None:
            self.reused_items += len(items)
            return dict(tape)
        tape = self._marked(items, pattern)
        self._cache.put(key, tape)
        return tape

    def _marked(self, items: Sequence[Item], pattern: Pattern | None) -> Tape:
        tape, _ = self._run(items)
        self.computed_items += len(items)
        return pattern.mark(tape, len(items)) if pattern is not None else tape

    def _pattern(self, items: Sequence[Item]) -> Pattern | None:
        """How the tape of this kind of call is divided by item; None where it is not. Raises TakesNoLists."""
        kind = call_key(items[0])
        first = items[0]
        pictured = any(isinstance(value, Picture) for value in first.arguments.values())
        if kind not in self._patterns:
            self._patterns[kind] = self._learn(first, _with_pictures_of(first, items[1]), pictured)
        if pictured and self._patterns[kind] is None:
            raise TakesNoLists("it takes one item with pictures at a time")
        return self._patterns[kind]

    def _learn(self, first: Item, second: Item, pictured: bool) -> Pattern | None:
        one, one_call = self._run([first])
        try:
            two, two_call = self._run([first, second])
            if pictured and not scales(shapes(one_call), shapes(two_call)):
                return None
            return Pattern.learn(one, two)
        except Indivisible:
            return None
        except Exception as error:
            if not pictured or is_out_of_memory(error):
                raise
            return None


class _Cache:
    """The states used last, up to so many bytes, and those that are kept beside the runs where any are."""

    def __init__(self, most_bytes: int, shelf: Shelf | None) -> None:
        self._shelf = shelf
        self._states: LRU[str, Any] = LRU(most_bytes, {}, weight=lambda _, state: nbytes(state))

    def get(self, key: str) -> Any:
        return self.get_all([key])[0]

    def get_all(self, keys: Sequence[str]) -> list[Any]:
        """The state of each key, or None."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._states] if self._shelf else []
        kept = dict(zip(missing, self._shelf.get(missing), strict=True)) if self._shelf and missing else {}
        found = [kept[key] if key in kept else self._states.get(key) for key in keys]
        self._states.update({key: state for key, state in kept.items() if state is not None})
        return found

    def put(self, key: str, state: Any) -> None:
        self._states[key] = state
        if self._shelf is not None:
            self._shelf.put(key, state)


def _joined(tapes: Sequence[Any]) -> Tape | None:
    """The tape of items that were all encoded before, if theirs go together."""
    try:
        return dict(joined(tapes)) if all(map(has_rows, tapes)) else None
    except Indivisible:
        return None


def _key(item: Item) -> str:
    """Of all that an item is encoded from: everything but its seed."""
    return hashlib.sha256(canonical_json([item.prompt, dict(item.arguments)]).encode()).hexdigest()


def _with_pictures_of(item: Item, other: Item) -> Item:
    pictures = {name: value for name, value in other.arguments.items() if pictures_in(value)}
    return replace(item, arguments={**item.arguments, **pictures}) if pictures else item
