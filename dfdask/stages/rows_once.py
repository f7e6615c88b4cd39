"""Equal texts are encoded once: a pipeline has the same negative prompt encoded for every item of every call."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zict import LRU

from dfdask.stages.model import ModelRef

MOST_BYTES = 128 * 2**20
MOST_ROW_BYTES = 16 * 2**20
"""An encoding that is larger, as of all layers of a language model, is not remembered."""
_MOST_SEEN = 10_000


def encode_rows_once(pipeline: Any, ref: ModelRef) -> None:
    """Have the text encoders of ``pipeline`` encode each text once, within a call and from call to call.

    Not in strict mode: an embedding differs by rounding with the number of texts that it is computed with.
    """
    import transformers

    # Where a pipeline listens inside an encoder, it must hear every text of every call.
    if ref.strict or "register_forward_hook" in inspect.getsource(inspect.getmodule(type(pipeline)) or type(pipeline)):
        return
    for part in pipeline.components.values():
        if isinstance(part, transformers.PreTrainedModel) and "input_ids" in inspect.signature(part.forward).parameters:
            forward = part.forward
            # An adapter may get another weight with each call, which changes what the encoder makes of a text.
            once = RowsOnce(forward, most_bytes=0 if ref.adapters else MOST_BYTES)
            part.__dict__["forward"] = functools.update_wrapper(once, forward)


@dataclass(frozen=True, slots=True)
class _Row:
    """What an encoder returns for one text: tensors with a first dimension of 1, or None, and what they stand in."""

    form: Any
    leaves: list[Any]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves if leaf is not None)


class RowsOnce:
    """The ``forward`` of a text encoder; of its rows of input only those are computed that are new.

    Calls that have other tensors than a row for each text are passed on as they are, and so are all calls of an
    encoder that does not return a part for each row.
    """

    def __init__(self, forward: Callable[..., Any], most_bytes: int = MOST_BYTES) -> None:
        self._forward = forward
        self._signature = inspect.signature(forward)
        self._most_bytes = most_bytes
        self._rows: LRU[str, _Row] = LRU(most_bytes, {}, weight=lambda _, row: row.nbytes)
        self._seen: LRU[str, None] = LRU(_MOST_SEEN, {})
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        # Whether it returns a part for each row: None before it was seen with several, for one row cannot tell.
        self._divides: bool | None = False if inspect.Parameter.VAR_POSITIONAL in kinds else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._by_name(args, kwargs)
        rows = None if self._divides is False else _rows_of(call)
        if rows is None:
            return self._forward(*args, **kwargs)
        keys = _keys(call, rows)
        known = {key: self._rows[key] for key in keys if key in self._rows}
        # Until it is known to divide, all of a call is computed.
        new = keys if self._divides is None else [key for key in dict.fromkeys(keys) if key not in known]
        if self._divides is None and len(keys) == 1:
            if keys[0] not in self._seen or not self._most_bytes:
                self._seen[keys[0]] = None
                return self._forward(*args, **kwargs)
            new = keys * 2  # it comes again, and one row cannot tell: computed twice this once
        if new:
            if len(new) != len(keys):
                places = [keys.index(key) for key in new]
                call.update({name: tensor[places] for name, tensor in rows.items()})
            made = self._forward(**call)
            parts = _divided(made, len(new))
            self._divides = parts is not None
            if parts is None:
                return self._forward(*args, **kwargs)
            known.update(zip(new, parts, strict=True))
            self._remember(keys, {key: known[key] for key in new})
            if len(new) == len(keys):
                return made
        return _united(known, keys, rows["input_ids"].device)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                call.update(value)
            else:
                call[name] = value
        if "use_cache" in self._signature.parameters:
            call.setdefault("use_cache", False)  # of a language model: what nothing is generated from
        return call

    def _remember(self, keys: Sequence[str], made: Mapping[str, _Row]) -> None:
        """Texts that come more than once: most prompts do not, and copies cost more than they would save."""
        for key, row in made.items():
            comes_again = key in self._seen or keys.count(key) > 1
            self._seen[key] = None
            if comes_again and row.nbytes <= min(MOST_ROW_BYTES, self._most_bytes):
                copies = [None if leaf is None else leaf.to("cpu", copy=True) for leaf in row.leaves]
                self._rows[key] = _Row(row.form, copies)


def _rows_of(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tensors of a call where each has a row for each text; None where there are others."""
    import torch

    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    others = (value for name, value in call.items() if name not in tensors)
    if "input_ids" not in tensors or not all(
        value is None or isinstance(value, (bool, int, float)) for value in others
    ):
        return None
    count = len(tensors["input_ids"])
    return tensors if all(value.ndim == 2 and len(value) == count > 0 for value in tensors.values()) else None


def _keys(call: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """For each text, what its encoding depends on."""
    same = repr(sorted((name, value) for name, value in call.items() if name not in rows))
    digests = [hashlib.sha256(same.encode()) for _ in rows["input_ids"]]
    for name in sorted(rows):
        for digest, row in zip(digests, rows[name].double().cpu().numpy(), strict=True):
            digest.update(f"{name} {len(row)} ".encode() + row.tobytes())
    return [digest.hexdigest() for digest in digests]


def _divided(made: Any, count: int) -> list[_Row] | None:
    """What was made for so many texts, for each; None where it has other parts."""
    import torch
    from torch.utils._pytree import tree_flatten

    leaves, form = tree_flatten(made)
    if not all(leaf is None or (isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (count,)) for leaf in leaves):
        return None
    places = (slice(place, place + 1) for place in range(count))
    return [_Row(form, [None if leaf is None else leaf[place] for leaf in leaves]) for place in places]


def _united(rows: Mapping[str, _Row], keys: Sequence[str], device: Any) -> Any:
    """What an encoder returns for these texts, from the row of each of them."""
    import torch
    from torch.utils._pytree import tree_unflatten

    places = {key: place for place, key in enumerate(rows)}
    order = torch.tensor([places[key] for key in keys], device=device)

    def joined(leaves: Sequence[Any]) -> Any:
        return None if leaves[0] is None else torch.cat([leaf.to(device) for leaf in leaves])[order]

    each = list(rows.values())
    return tree_unflatten(list(map(joined, zip(*(row.leaves for row in each), strict=True))), each[0].form)
