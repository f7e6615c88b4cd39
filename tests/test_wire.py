"""Micro-batches travel as they are: any dtype and shape, without a copy of the tensors, with their true size."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dask.sizeof import sizeof
from distributed import Client, LocalCluster
from distributed.protocol import deserialize, serialize
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.items import Item
from dfdask.stages.batch import Batch, Group
from dfdask.wire import deserialize_batch, serialize_batch

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

ITEMS = (Item(0, "one", "a cat", 1, {"guidance_scale": 3.5}), Item(1, "two", "ein Hündchen \U0001f415", 2, {}))
DTYPES = sorted(
    {
        kind
        for kind in vars(torch).values()
        # Quantised and sub-byte ones are shells that torch itself cannot copy.
        if isinstance(kind, torch.dtype) and not re.search(r"qu?int|bits|\.u?int[1-7]$|float4", str(kind))
    },
    key=str,
)


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def there(batch: Batch, writable: bool = True) -> Batch:
    """As it arrives in another process."""
    header, frames = serialize(batch, serializers=["dask"], on_error="raise")
    copies = [bytearray(frame) if writable else bytes(frame) for frame in frames]
    result: Batch = deserialize(header, copies)
    return result


def holding(state: Any) -> Batch:
    return Batch((Group(ITEMS, state),), {3: "encode: ValueError: no"}, {"encode": 0.25})


def state_of(batch: Batch) -> Any:
    return batch.groups[0].state


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random bits of any dtype; some of them views that are not contiguous."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    if draw(st.booleans()) and tensor.dim():
        tensor = tensor[::2]
    return tensor


states = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(states, st.booleans())
def test_any_state_arrives_as_it_left(state: Any, writable: bool) -> None:
    batch = holding(state)
    found = there(batch, writable)
    assert same(state_of(found), state)
    assert (found.groups[0].items, found.failures, found.seconds) == (ITEMS, batch.failures, batch.seconds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    data = torch.frombuffer(bytearray(range(1, 97)) if dtype != torch.bool else bytearray(96), dtype=torch.uint8)
    for tensor in (data.view(dtype), data.view(dtype)[0], data.view(dtype)[:0], data.view(dtype)[1:]):
        assert same(state_of(there(holding(tensor))), tensor)


def test_views_that_torch_has_not_computed_yet() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (numbers.conj(), numbers.conj().imag, torch.ones(3).expand(2, 3), torch.ones(2, 3).T):
        assert same(state_of(there(holding(tensor))), tensor)


def test_the_order_in_memory_is_kept() -> None:
    """CPU kernels round by it."""
    for order in ((0, 2, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3), (1, 0, 2, 3)):
        tensor = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5).permute(order)
        arrived = state_of(there(holding(tensor)))
        assert torch.equal(arrived, tensor) and arrived.stride() == tensor.stride()


def test_parameters_and_gradients_arrive_as_plain_tensors() -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    found = state_of(there(holding([weights, weights * 2])))
    assert [type(part) for part in found] == [torch.Tensor, torch.Tensor]
    assert not any(part.requires_grad for part in found)
    assert found[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.int64, np.complex64, np.bool_])
def test_arrays(kind: type[np.generic]) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    for view in (array, array.T, array[:, ::2], array[:0], array[0, 0, 0:1].reshape(())):
        assert same(state_of(there(holding(view))), view)


def test_what_arrives_can_be_changed_in_place() -> None:
    for writable in (True, False):
        found = state_of(there(holding(torch.zeros(4)), writable))
        found += 1
        assert found.tolist() == [1, 1, 1, 1]


def test_tensors_are_not_copied() -> None:
    tensor, array = torch.zeros(1000, dtype=torch.bfloat16), np.zeros(1000, np.uint8)
    header, frames = serialize_batch(holding([tensor, array]))
    assert len(frames) == 3 and len(frames[0]) < 1500
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [2000, 1000]
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), tensor.view(torch.uint8).numpy())
    assert np.shares_memory(np.frombuffer(frames[2], np.uint8), array)
    arrived = [frames[0], bytearray(frames[1]), bytearray(frames[2])]
    found = state_of(deserialize_batch(header, arrived))
    assert np.shares_memory(np.frombuffer(arrived[1], np.uint8), found[0].view(torch.uint8).numpy())
    assert np.shares_memory(np.frombuffer(arrived[2], np.uint8), found[1])


def test_the_pickled_part_names_nothing_but_dfdasks_own_values() -> None:
    """Tensors are data to it: no function of torch is called to build one."""
    _, frames = serialize_batch(holding([torch.zeros(3), np.zeros(3)]))
    named = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add(module.split(".")[0])
            return super().find_class(module, name)

    Noting(io.BytesIO(frames[0]), buffers=frames[1:]).load()
    assert named == {"dfdask", "numpy"}


@pytest.mark.parametrize("data", [b"", b"no frame", b"\x80\x05"])
def test_bytes_that_are_no_batch_raise(data: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, EOFError, TypeError)):
        deserialize_batch({}, [data])


def test_a_frame_that_got_lost_raises() -> None:
    header, frames = serialize_batch(holding([torch.zeros(3), torch.ones(3)]))
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        deserialize_batch(header, frames[:2])
    with pytest.raises((ValueError, RuntimeError)):
        deserialize_batch(header, [frames[0], bytearray(frames[1])[:7], bytearray(frames[2])])


def test_sizes_are_what_travels() -> None:
    state = {"a": torch.zeros(1000, dtype=torch.bfloat16), "b": [np.zeros(500), torch.zeros(10).expand(100, 10)]}
    assert 2000 + 4000 + 4000 <= sizeof(holding(state)) < 10_500
    assert sizeof(torch.zeros(1000)) == 4080


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=0
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def make(seed: int) -> Batch:
    import dfdask.wire  # noqa: F401

    generator = torch.Generator().manual_seed(seed)
    state = [torch.randn(64, 64, generator=generator).to(torch.bfloat16), torch.ones(3, dtype=torch.bool), None]
    return Batch((Group(ITEMS, {"state": tuple(state)}),), {}, {"encode": 1.0})


def more(batch: Batch) -> Batch:
    import dfdask.wire  # noqa: F401

    state = batch.groups[0].state["state"]
    return Batch((Group(ITEMS, {"state": (state[0] * 2, state[1], str(state[0].dtype))}),), {}, {})


def test_from_process_to_process_through_a_scheduler(client: Client) -> None:
    one, other = (info["id"] for info in client.scheduler_info()["workers"].values())
    made = client.submit(make, 7, workers=[one], pure=False)
    passed = client.submit(more, made, workers=[other], pure=False)
    expected = make(7).groups[0].state["state"]
    found = passed.result(timeout=30).groups[0].state["state"]
    assert found[2] == "torch.bfloat16"
    assert same(found[0], expected[0] * 2) and same(found[1], expected[1])
    assert same(made.result(timeout=30).groups[0].state["state"], expected)
    sizes = client.run_on_scheduler(lambda dask_scheduler: [task.nbytes for task in dask_scheduler.tasks.values()])
    assert min(sizes) > 64 * 64 * 2


def test_from_the_client_to_a_worker(client: Client) -> None:
    found = client.submit(more, make(3), pure=False).result(timeout=30)
    assert same(found.groups[0].state["state"][1], torch.ones(3, dtype=torch.bool))
