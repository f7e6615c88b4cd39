"""How micro-batches and tensors travel between processes: any dtype, out of band, with their true size.

distributed on its own hangs on a bf16 result and takes every tensor for 80 bytes. Importing this module, on
clients and workers, registers both mends.
"""

from __future__ import annotations

import pickle
from typing import Any

from dask.sizeof import sizeof
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from dfdask.stages.batch import Batch, nbytes

PICKLE_PROTOCOL = 5


class _Pickler(pickle.Pickler):
    """Takes tensors apart into a buffer that is not copied: torch's own way holds the GIL for each byte."""

    def reducer_override(self, value: Any) -> Any:
        if _is_tensor(value):
            order = _order(value)
            value = value.detach().permute(order)
            return _rebuild, (*_describe(value), order, pickle.PickleBuffer(_as_bytes(value)))
        return NotImplemented


@dask_serialize.register(Batch)  # type: ignore[untyped-decorator]
def serialize_batch(batch: Batch) -> tuple[dict[str, Any], list[Any]]:
    """Frames: a pickle of the skeleton, then one buffer per tensor or array."""
    import io

    buffers: list[pickle.PickleBuffer] = []
    skeleton = io.BytesIO()
    _Pickler(skeleton, protocol=PICKLE_PROTOCOL, buffer_callback=buffers.append).dump(batch)
    return {}, [skeleton.getvalue(), *(buffer.raw() for buffer in buffers)]


@dask_deserialize.register(Batch)  # type: ignore[untyped-decorator]
def deserialize_batch(header: dict[str, Any], frames: list[Any]) -> Batch:
    result: Batch = pickle.loads(frames[0], buffers=frames[1:])
    return result


@sizeof.register(Batch)  # type: ignore[untyped-decorator]
def sizeof_batch(batch: Batch) -> int:
    return 200 * len(batch.groups) + nbytes([group.state for group in batch.groups])


@sizeof.register_lazy("torch")  # type: ignore[untyped-decorator]
def _register_torch_sizeof() -> None:
    import torch

    @sizeof.register(torch.Tensor)  # type: ignore[untyped-decorator]
    def sizeof_tensor(tensor: torch.Tensor) -> int:
        return 80 + tensor.numel() * tensor.element_size()


def _is_tensor(value: Any) -> bool:
    kind = type(value)
    return kind.__module__.startswith("torch") and kind.__name__ in ("Tensor", "Parameter")


def _order(tensor: Any) -> tuple[int, ...]:
    """Its dimensions from the outermost to the innermost in memory.

    It is kept, for kernels round by it: what a channels-last convolution made is rounded otherwise once laid out anew.
    """
    places = range(tensor.dim())
    order = tuple(sorted(places, key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else tuple(places)


def _describe(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _as_bytes(tensor: Any) -> Any:
    import torch

    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape: it keeps odd strides of tensors with one or no number, which cannot be viewed as bytes.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()


def _rebuild(dtype: str, shape: tuple[int, ...], order: tuple[int, ...], data: Any) -> Any:
    import torch

    kind = getattr(torch, dtype)
    back = sorted(range(len(order)), key=order.__getitem__)
    if memoryview(data).nbytes == 0:
        return torch.empty(shape, dtype=kind).permute(back)
    if memoryview(data).readonly:  # torch tensors are writable, so this one needs bytes of its own
        data = bytearray(data)
    return torch.frombuffer(data, dtype=torch.uint8).view(kind).reshape(shape).permute(back)
