"""The run in storage: creating it, committing shards, reading them and noticing damage."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import obstore
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from stored import BUCKET, TEXT, columns, everything, new_run, pixels, put

from dfdask.errors import RunNotFoundError, StorageError
from dfdask.store import FAILED, OK, Layout, RunStore
from dfdask.targets import Location, resolve_output

ATTRIBUTES = {"dfdask": {"spec": {"seed": 1}}}
LAYOUT = Layout("image", (6, 5, 3), 7, 3)


def many(number: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of ``work`` in threads that start at the same moment."""
    barrier = threading.Barrier(number)

    def one(place: int) -> Any:
        barrier.wait()
        return work(place)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


def change(location: Location, key: str, edit: Callable[[bytes], bytes]) -> None:
    store = location.object_store()
    obstore.put(store, key, edit(bytes(obstore.get(store, key).bytes())))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]


def test_create_open_exists(location: Location) -> None:
    assert not RunStore.exists(location)
    with pytest.raises(RunNotFoundError, match="there is no run"):
        RunStore.open(location)
    created = new_run(location)
    assert RunStore.exists(location)
    opened = RunStore.open(location)
    assert opened == created == new_run(location), "creating again opens"
    assert opened.layout == LAYOUT
    assert opened.attributes["dfdask"]["spec"] == {"seed": 1}
    assert opened.columns == ["id", "prompt", "seed"]
    assert opened.committed() == set() and opened.commits() == [] and opened.commit(0) is None
    assert opened.verify() == []
    assert not any(key.startswith("creating") for key in everything(location))


def test_a_store_travels_small_and_without_secrets(location: Location) -> None:
    store = new_run(location)
    data = pickle.dumps(store)
    assert len(data) < 20_000 and b"loopback-secret" not in data
    assert pickle.loads(data).attributes == store.attributes


@pytest.mark.parametrize("creators", [2, 5])
def test_creators_of_the_same_run_race(location: Location, creators: int) -> None:
    layout = Layout("image", (6, 5, 3), 5000, 100)

    def create(place: int) -> RunStore:
        return RunStore.create(location, layout, columns(5000), {"dfdask": {"creator": place}})

    found = many(creators, create)
    assert len({store.attributes["dfdask"]["creator"] for store in found}) == 1, "one wins, the others open its run"
    assert found[0].verify() == []
    assert not any(key.startswith("creating") for key in everything(location))


def race(location: Location, creators: int, items: int) -> RunStore:
    """The run of the one that won against creators with other items."""

    def create(place: int) -> RunStore | StorageError:
        layout, values = Layout("image", (6, 5, 3), items + place, 100), columns(items + place)
        try:
            return RunStore.create(location, layout, values, {"dfdask": {}})
        except StorageError as error:
            return error

    found = many(creators, create)
    stores = [store for store in found if isinstance(store, RunStore)]
    assert stores and len({store.layout.items for store in stores}) == 1, found
    errors = [str(error) for error in found if isinstance(error, StorageError)]
    assert all("another process is creating" in error and "choose another name" in error for error in errors), errors
    assert stores[0].verify() == []
    assert not any(key.startswith(("creating", "extra")) for key in everything(location))
    return stores[0]


def test_creators_of_different_runs_race(location: Location) -> None:
    for attempt in range(12 if location.kind == "local" else 3):
        race(replace(location, name=f"{location.name}-{attempt}"), 3, 1000)
    assert not any(key.startswith("dfdask-probe") for key in everything(replace(location, name="")))


def test_heirs_of_a_dead_creator_race(local: Location) -> None:
    """All see that it is dead, and none of them removes what another one has begun."""
    for attempt in range(6):
        here = replace(local, name=f"{local.name}-{attempt}")
        left = here.object_store(create=True)
        obstore.put(left, "creating-0.json", b'{"columns": {}, "arrays": {"extra": {}}}')
        obstore.put(left, "extra/zarr.json", b"{}")
        os.utime(here.path / "creating-0.json", (time.time() - 4000,) * 2)
        race(here, 4, 50)


def test_a_run_is_there_only_with_its_root(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever put is the last one before a creator dies: no run, and the next creator makes a whole one."""
    from dfdask.store_objects import Objects

    put_object = Objects.put
    puts, last = 0, 0

    class Died(BaseException):
        pass

    def dying(self: Objects, key: str, data: bytes, *, create: bool = False) -> None:
        nonlocal puts
        if puts == last:
            raise Died
        puts += 1
        put_object(self, key, data, create=create)

    while True:
        here = replace(location, name=f"{location.name}-{last}")
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "put", dying)
            puts = 0
            try:
                new_run(here)
                break
            except Died:
                pass
        assert not RunStore.exists(here)
        assert new_run(here).verify() == []
        last += 1 if location.kind == "local" else 3
    assert last > 8, "claim, folders, arrays, columns and root are puts of their own"


def test_leftovers_of_a_dead_creator(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had other items, and more of them: nothing of them must stay."""
    with monkeypatch.context() as patch:
        patch.setattr("dfdask.store_layout._COLUMN_CHUNKS_AN_OBJECT", 1)
        new_run(location, items=3_000, extra=np.arange(3_000))
    left = location.object_store()
    assert "prompt/c/2" in everything(location)
    arrays = ["image", "status", "error", "id", "prompt", "seed", "extra"]
    obstore.delete(left, "zarr.json")
    obstore.put(left, "creating-0.json", json.dumps({"columns": {}, "arrays": arrays}).encode())

    with pytest.raises(StorageError, match="another process is creating .* try again in 1[12][0-9] s"):
        new_run(location)
    monkeypatch.setattr("dfdask.store_create.CLAIM_SECONDS", 0.0)
    store = new_run(location)
    assert store.verify() == []
    fresh = replace(location, name=f"{location.name}-fresh")
    new_run(fresh)
    assert set(everything(location)) == set(everything(fresh))


def test_another_deletes_an_object_before_it_is_on_the_disk(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """As creators with the same columns do with each other's claims."""
    claim, stored = local.path / "creating-0.json", obstore.put

    def put_and_lose(store: Any, key: str, *rest: Any, **options: Any) -> None:
        stored(store, key, *rest, **options)
        if key == claim.name:
            claim.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", put_and_lose)
        with pytest.raises(StorageError, match="another process took over creating"):
            new_run(local)
    assert not RunStore.exists(local)


@pytest.mark.parametrize("claim", [b"", b"{", b"[1, 2]", b"null", b'{"arrays": 3}', b'{"arrays": [3, ""]}'])
def test_a_claim_that_says_nothing(local: Location, claim: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    obstore.put(local.object_store(create=True), "creating-0.json", claim)
    monkeypatch.setattr("dfdask.store_create.CLAIM_SECONDS", 0.0)
    assert new_run(local).verify() == []


def test_what_is_no_run_is_left_alone(location: Location) -> None:
    store = location.object_store(create=True)
    obstore.put(store, "holiday/beach.jpg", b"a picture")
    with pytest.raises(StorageError, match=r"holds things that are no run \(holiday/beach.jpg\)"):
        new_run(location)
    assert everything(location) == {"holiday/beach.jpg": b"a picture"}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"zarr_format": 3, "node_type": "group", "attributes": {}}',
        b'{"attributes": {"dfdask": {"layout": 3}}}',
        b'{"attributes": {"dfdask": {"layout": {"kind": "sound", "item_shape": [1], "items": 1, "shard_items": 1}}}}',
    ],
)
def test_a_group_of_someone_else(local: Location, document: bytes) -> None:
    obstore.put(local.object_store(create=True), "zarr.json", document)
    assert RunStore.exists(local)
    for attempt in (lambda: RunStore.open(local), lambda: new_run(local)):
        with pytest.raises(StorageError, match="is no dfdask run"):
            attempt()
    assert everything(local) == {"zarr.json": document}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("image", np.zeros(7), "cannot be called 'image'"),
        ("commits", np.zeros(7), "cannot be called"),
        ("a/b", np.zeros(7), "cannot be called 'a/b'"),
        ("short", np.zeros(6), r"must have the shape \(7,\), got \(6,\)"),
        ("thing", np.array([object()] * 7), "numbers, booleans or texts"),
    ],
)
def test_columns_that_do_not_fit(local: Location, name: str, values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        new_run(local, **{name: values})
    assert not local.path.exists()


@pytest.mark.parametrize(
    ("kind", "shape", "items", "shard_items"),
    [("image", (6, 5), 7, 3), ("video", (6, 5, 3), 7, 3), ("image", (6, 0, 3), 7, 3), ("image", (6, 5, 3), 0, 3)],
)
def test_layouts_that_make_no_sense(kind: Any, shape: tuple[int, ...], items: int, shard_items: int) -> None:
    with pytest.raises(ValueError):
        Layout(kind, shape, items, shard_items)


@pytest.mark.parametrize(
    ("kind", "shape", "shard_items"),
    [
        ("image", (1024, 1024, 3), 16),
        ("image", (64, 64, 3), 509),
        ("image", (4096, 4096, 4), 2),
        ("video", (48, 480, 832, 3), 2),
        ("video", (3, 2160, 3840, 3), 1),
    ],
)
def test_chunks_are_neither_tiny_nor_huge(kind: Any, shape: tuple[int, ...], shard_items: int) -> None:
    from dfdask.store_layout import array_documents

    document = array_documents(Layout(kind, shape, 40, shard_items), {})[kind]
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [shard_items, *shape]
    (sharding,) = document["codecs"]
    inner = int(np.prod(sharding["configuration"]["chunk_shape"]))
    assert min(inner, np.prod(shape)) >= 12_000
    assert inner <= max(4 << 20, np.prod(shape[-3:]))


def test_commit_and_read_back(location: Location) -> None:
    store = new_run(location, guidance=np.linspace(0, 3, 7), flag=np.arange(7) % 2 == 0)
    for shard, failed in ((2, ()), (0, (1,))):
        commit = put(store, shard, failed)
        assert not commit.stale and commit.shard == shard
    assert store.committed() == {0, 2}
    first, last = store.commits()
    assert (first["shard"], first["start"], first["stop"], first["failed"]) == (0, 0, 3, 1)
    assert (last["shard"], last["start"], last["stop"], last["failed"]) == (2, 6, 7, 0)
    assert first["stage_seconds"] == {"denoise": 0.5} and first == store.commit(0)
    assert set(first["checksums"]) == {"image", "status", "error"}
    assert store.verify() == [] == store.verify([0])

    values = store.read_shard(0, first)
    assert values["status"].tolist() == [OK, FAILED, OK]
    assert values["error"].tolist() == ["", "denoise: row 1 ✗", ""]
    assert np.array_equal(values["image"][[0, 2]], pixels(store, 0)[[0, 2]]) and not values["image"][1].any()
    assert values["prompt"].tolist() == [f"prompt {item}: café, 猫" for item in range(3)]
    assert values["flag"].tolist() == [True, False, True] and values["guidance"].dtype == np.float64

    across = store.read(2, 7, ["status", "id", "seed"])
    assert across["status"].tolist() == [OK, 0, 0, 0, OK] and across["seed"].dtype == np.uint32
    assert across["id"].tolist() == ["id-2", "id-3", "id-4", "id-5", "id-6"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_what_is_read(tmp_path: Path, data: st.DataObject) -> None:
    video = data.draw(st.booleans())
    items, shard_items = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=3 + video, max_size=3 + video)))
    prompts = np.array(data.draw(st.lists(texts, min_size=items, max_size=items)), dtype=TEXT)
    number = data.draw(arrays.arrays(data.draw(st.sampled_from(["f8", "i8", "u2", "?", ">i4"])), items))
    location = resolve_output(str(tmp_path / uuid4().hex))
    layout = Layout("video" if video else "image", shape, items, shard_items)
    store = RunStore.create(location, layout, {"prompt": prompts, "number": number}, ATTRIBUTES)
    written = {}
    for shard in data.draw(st.permutations(range(layout.shards))):
        rows = layout.rows(shard)
        picture = data.draw(arrays.arrays(np.uint8, (len(rows), *shape)))
        status = data.draw(arrays.arrays(np.uint8, len(rows), elements=st.sampled_from([OK, FAILED])))
        errors = data.draw(st.lists(texts, min_size=len(rows), max_size=len(rows)))
        assert not store.write_shard(shard, picture, status, errors, {}).stale
        written[shard] = (picture, status, errors)
    assert store.verify() == []
    found = RunStore.open(location).dataset().load()
    assert np.array_equal(found["prompt"].values, prompts)
    assert np.array_equal(found["number"].values, number, equal_nan=number.dtype.kind == "f")
    for shard, (picture, status, errors) in written.items():
        rows = found.isel(item=slice(layout.rows(shard).start, layout.rows(shard).stop))
        assert np.array_equal(rows[layout.kind].values, picture)
        assert np.array_equal(rows["status"].values, status) and rows["error"].values.tolist() == errors


def test_errors_that_cannot_be_stored_as_they_are(location: Location) -> None:
    store = new_run(location, items=2, shard_items=2)
    errors = ["half a character: \ud83d", "long " * 10_000]
    store.write_shard(0, pixels(store, 0), np.array([FAILED, FAILED], np.uint8), errors, {})
    found = store.read(0, 2, ["error"])["error"]
    assert found[0] == "half a character: ?" and len(found[1]) == 4000
    assert store.verify() == []


@pytest.mark.parametrize(
    ("shape", "status", "errors"),
    [
        ((3, 6, 5, 4), [1, 1, 1], 3),
        ((2, 6, 5, 3), [1, 1, 1], 3),
        ((3, 6, 5, 3), [1, 0, 1], 3),
        ((3, 6, 5, 3), [1, 1], 3),
        ((3, 6, 5, 3), [1, 1, 1], 2),
    ],
)
def test_shards_that_do_not_fit(local: Location, shape: tuple[int, ...], status: list[int], errors: int) -> None:
    store = new_run(local)
    with pytest.raises(ValueError, match="must be"):
        store.write_shard(0, np.zeros(shape, np.uint8), np.array(status, np.uint8), [""] * errors, {})
    with pytest.raises(ValueError, match="must be uint8"):
        store.write_shard(0, np.zeros((3, 6, 5, 3)), np.ones(3, np.uint8), [""] * 3, {})  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="shard 3 of a run with 3"):
        put(store, 3)
    assert store.committed() == set()


def test_the_first_commit_wins(location: Location) -> None:
    store = new_run(location)
    first = put(store, 1)
    before = everything(location)
    second = put(store, 1, failed=(3,), salt=9)
    assert second.stale and second.record == first.record
    assert everything(location) == before


@pytest.mark.parametrize("same", [True, False], ids=["same pixels", "different pixels"])
def test_writers_of_one_shard_race(location: Location, same: bool) -> None:
    store = new_run(location)
    shards = range(2 if location.kind == "local" else 1)
    for shard in shards:
        found = many(4, lambda place, shard=shard: put(store, shard, salt=0 if same else place))
        if same:
            assert sum(not commit.stale for commit in found) == 1
            assert len({commit.record["writer"] for commit in found}) == 1
        assert store.verify([shard]) == []
        kept = [pixels(store, shard, salt) for salt in range(4)]
        (image,) = [store.read_shard(shard, record)["image"] for record in [store.commit(shard)] if record]
        assert any(np.array_equal(image, one) for one in kept), "one writer's pixels, unmixed"
    assert store.committed() == set(shards)


def test_xarray_opens_it_while_it_grows(location: Location) -> None:
    """Warnings are errors here."""
    store = new_run(location)
    for done in range(3):
        place: Any = location.path if location.kind == "local" else store._objects.zarr()
        for found in (store.dataset(), xr.open_zarr(place), xr.open_zarr(place, consolidated=False)):
            assert set(found.variables) == {"image", "status", "error", "id", "prompt", "seed"}
            assert found["status"].values.tolist() == [OK] * min(3 * done, 7) + [0] * max(0, 7 - 3 * done)
            assert not found["image"][3 * done :].values.any()
            assert found["prompt"].values[6] == "prompt 6: café, 猫"
        put(store, done)
    whole = store.dataset()
    for shard in range(3):
        rows = store.layout.rows(shard)
        assert np.array_equal(whole["image"][rows.start : rows.stop].values, pixels(store, shard))


def test_the_dataset(location: Location) -> None:
    store = new_run(location, items=10, shard_items=4)
    found = store.dataset()
    assert found["image"].dims == ("item", "y", "x", "channel") and found["image"].dtype == np.uint8
    for array in found.variables.values():
        assert array.chunks is not None, "nothing is read yet"
        assert array.chunks[0] == (4, 4, 2)
    assert found["status"].attrs == {"flag_values": [0, 1, 2], "flag_meanings": "pending ok failed"}
    for name in ("id", "prompt", "error"):
        assert found[name].dtype == TEXT
    assert found.attrs == store.attributes
    video = new_run(replace(location, name=f"{location.name}-video"), shape=(2, 6, 5, 3))
    assert video.dataset()["video"].dims == ("item", "frame", "y", "x", "channel")


def test_every_object_is_one_put(location: Location) -> None:
    """One object an array and shard: no reader ever sees half a shard of an array."""
    store = new_run(location)
    before = set(everything(location))
    put(store, 0)
    new = set(everything(location)) - before
    assert new == {"image/c/0/0/0/0", "status/c/0", "error/c/0", "commits/00000000.json"}


def test_black_pictures_are_stored(location: Location) -> None:
    store = new_run(location, items=3)
    black = np.zeros((3, 6, 5, 3), np.uint8)
    store.write_shard(0, black, np.full(3, OK, np.uint8), [""] * 3, {})
    assert "image/c/0/0/0/0" in everything(location)
    assert store.verify() == []


@pytest.mark.parametrize(
    ("key", "harm", "where"),
    [
        *(("image/c/1/0/0/0", harm, "local") for harm in ("flip", "cut", "empty", "gone")),
        *(("image/c/1/0/0/0", harm, "s3") for harm in ("flip", "empty", "gone")),
        *(("status/c/1", harm, "local") for harm in ("flip", "gone")),
        *(("error/c/1", harm, "local") for harm in ("flip", "empty")),
    ],
)
def test_damage_is_noticed(request: pytest.FixtureRequest, key: str, harm: str, where: str) -> None:
    location: Location = request.getfixturevalue(where)
    store = new_run(location)
    put(store, 0)
    record = put(store, 1, failed=(4,)).record
    if harm == "gone":
        obstore.delete(location.object_store(), key)
    else:
        edits: dict[str, Callable[[bytes], bytes]] = {"flip": flip, "cut": lambda d: d[:-3], "empty": lambda d: b""}
        change(location, key, edits[harm])
    (damage,) = store.verify()
    assert (damage.shard, damage.array) == (1, key.split("/")[0])
    assert str(damage).startswith(f"shard 1, {damage.array}: ")
    assert store.verify([0]) == []
    with pytest.raises(StorageError, match=r"is damaged: shard 1, .*; delete commits/00000001.json"):
        store.read_shard(1, record)
    try:
        store.read(3, 6, [damage.array])  # either reads, as a hole reads, or says clearly that it cannot
    except StorageError as error:
        assert "is damaged in the items 3 to 5" in str(error) and "\n" not in str(error)


def test_damage_is_mended_as_the_message_says(location: Location) -> None:
    store = new_run(location)
    put(store, 1)
    sound = everything(location)
    change(location, "image/c/1/0/0/0", flip)
    obstore.delete(location.object_store(), "commits/00000001.json")
    assert not put(store, 1).stale
    assert store.verify() == []
    now = everything(location)
    assert now["image/c/1/0/0/0"] == sound["image/c/1/0/0/0"]


def test_damaged_columns_are_noticed(location: Location) -> None:
    store = new_run(location)
    change(location, "prompt/c/0", flip)
    obstore.delete(location.object_store(), "seed/c/0")
    assert [(damage.shard, damage.array) for damage in store.verify()] == [(None, "prompt"), (None, "seed")]


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_commit(local: Location, data: bytes) -> None:
    store = new_run(local)
    put(store, 0)
    change(local, "commits/00000000.json", lambda _: data)
    for attempt in (store.commits, lambda: put(store, 0)):
        with pytest.raises(StorageError, match=r"commits/00000000.json is damaged; delete it"):
            attempt()
    assert [str(damage) for damage in store.verify()] == ["shard 0, commit: is damaged"]


def test_what_else_lies_in_the_folder_of_commits(location: Location) -> None:
    store = new_run(location)
    put(store, 1)
    for name in ("commits/.DS_Store", "commits/00000002.json.bak", "commits/x/00000002.json"):
        obstore.put(location.object_store(), name, b"?")
    assert store.committed() == {1}
    assert store.verify() == []


def test_reports(location: Location) -> None:
    store = new_run(location)
    where = store.put_report("sheet.png", b"one")
    assert store.put_report("sheet.png", b"two") == where == f"{location}/report/sheet.png"
    assert everything(location)["report/sheet.png"] == b"two"
    assert store.dataset().sizes["item"] == 7


def test_sweep_removes_what_killed_writers_left_and_nothing_else(local: Location) -> None:
    store = new_run(local)
    put(store, 0)
    before = everything(store.location)
    folder = local.path / "image" / "c" / "0" / "0" / "0"
    old, new, other = folder / "0#1", folder / "0#27", folder / "note #1 of mine.txt"
    for path in (old, new, other):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 4000,) * 2)
    assert store.committed() == {0} and store.verify() == []
    assert store.sweep() == 1
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)
    assert store.sweep(older_than_seconds=0) == 1
    other.unlink()
    assert everything(store.location) == before


def test_sweep_in_s3_has_nothing_to_do(s3: Location) -> None:
    assert new_run(s3).sweep(0) == 0


def test_many_commits_are_all_listed(s3: Location) -> None:
    """More than S3 lists in one answer; put into the server's memory, for each request takes it milliseconds."""
    store = new_run(s3, items=2_345, shard_items=1, shape=(1, 1, 1))
    put(store, 7)
    memory: Any = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    for shard in range(8, 2_345):
        memory.put_object(BUCKET, f"some/where/{s3.name}/commits/{shard:08d}.json", b"{}")
    assert store.committed() == set(range(7, 2_345))


def test_storage_that_goes_away(tmp_path: Path) -> None:
    """The folder of the runs becomes a file: whatever is asked, one clear error."""
    store = new_run(resolve_output(str(tmp_path / "runs" / "demo")))
    record = put(store, 0).record
    (tmp_path / "runs").rename(tmp_path / "away")
    (tmp_path / "runs").write_text("not a folder any more")
    attempts: list[Callable[[], object]] = [
        lambda: put(store, 1),
        lambda: new_run(store.location),
        lambda: store.read_shard(0, record),
        lambda: store.put_report("x", b""),
        store.dataset,
    ]
    for attempt in attempts:
        with pytest.raises(StorageError) as caught:
            attempt()
        assert "\n" not in str(caught.value) and str(store.location) in str(caught.value)
    (tmp_path / "runs").unlink()
    (tmp_path / "away").rename(tmp_path / "runs")
    assert store.committed() == {0} and store.verify() == []


def test_a_bucket_that_goes_away(s3: Location, s3_client: Any) -> None:
    s3_client.create_bucket(Bucket="gone", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    store = new_run(replace(s3, root="gone/some"))
    record = put(store, 0).record
    for key in everything(store.location):
        s3_client.delete_object(Bucket="gone", Key=f"some/{store.location.name}/{key}")
    s3_client.delete_bucket(Bucket="gone")
    for attempt in (lambda: put(store, 0), store.committed, store.dataset, lambda: store.read_shard(0, record)):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert "loopback-secret" not in str(caught.value) and "\n" not in str(caught.value)
