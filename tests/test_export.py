"""Pictures of a run for other programs."""

from __future__ import annotations

import io
import json
import resource
import signal
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import obstore
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from stored import TEXT, columns, new_run, pixels, put

from dfdask.errors import StorageError
from dfdask.export import ExportSummary, export_run, file_name
from dfdask.store import OK, Layout, RunStore
from dfdask.targets import Location, resolve_output

FORMATS: list[Any] = ["png", "webdataset", "parquet"]


@pytest.fixture
def store(local: Location) -> RunStore:
    """Shards 0 and 2 of three are committed; items 1 failed, 3 to 5 are not there: 0, 2 and 6 are ok."""
    return partly(local)


def partly(location: Location) -> RunStore:
    guidance = np.array([1.5, np.nan, np.inf, 3, 4, 5, 6.5])
    store = new_run(
        location, guidance_scale=guidance, clip_skip=np.arange(7), note=np.array(list("abcdefg"), dtype=TEXT)
    )
    put(store, 0, failed=(1,))
    put(store, 2)
    return store


def decoded(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path, format: str) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """All pictures of an export by file name (without ending), with what is said about each."""
    if format == "png":
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
        return {Path(line["file_name"]).stem: ((folder / line["file_name"]).read_bytes(), line) for line in lines}
    found: dict[str, tuple[bytes, dict[str, Any]]] = {}
    if format == "parquet":
        for path in sorted((folder / "data").iterdir()):
            for row in pq.read_table(path).to_pylist():
                image = row.pop("image")
                found[Path(image["path"]).stem] = (image["bytes"], row)
        return found
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member) for member in tar}
            data = {name: file.read() for name, file in members.items() if file}
        for name in data:
            if name.endswith(".png"):
                found[name[:-4]] = (data[name], json.loads(data[f"{name[:-4]}.json"]))
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exported(location: Location, tmp_path: Path, format: Any) -> None:
    store = partly(location)
    out = tmp_path / "new" / "out"
    summary = export_run(store, format, out)
    assert (summary.items, summary.skipped, summary.failed) == (3, 4, 1)
    found = contents(out, format)
    assert list(found) == ["id-0", "id-2", "id-6"]
    for shard, row, item in ((0, 0, 0), (0, 2, 2), (2, 0, 6)):
        png, about = found[f"id-{item}"]
        assert np.array_equal(decoded(png), pixels(store, shard)[row])
        assert about["id"] == f"id-{item}" and about["seed"] == item * 7 and about["clip_skip"] == item
        assert about["text" if format == "png" else "prompt"] == f"prompt {item}: café, 猫"
        assert about["guidance_scale"] == {0: 1.5, 2: None, 6: 6.5}[item]
        assert about["note"] == "abcdefg"[item]
    failures = [json.loads(line) for line in (out / "failures.log").read_text("utf-8").splitlines()]
    assert failures == [{"id": "id-1", "prompt": "prompt 1: café, 猫", "seed": 7, "error": "denoise: row 1 ✗"}]
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside it"


def test_png_is_an_imagefolder(store: RunStore, tmp_path: Path) -> None:
    summary = export_run(store, "png", tmp_path / "out")
    names = ["images/id-0.png", "images/id-2.png", "images/id-6.png", "metadata.jsonl"]
    assert files(tmp_path / "out") == [".dfdask-export.json", "failures.log", *names]
    assert summary == ExportSummary(files=4, items=3, skipped=4, failed=1)
    first = (tmp_path / "out" / "metadata.jsonl").read_text("utf-8").splitlines()[0]
    assert first.startswith('{"file_name": "images/id-0.png", "text": "prompt 0: café, 猫", "id": "id-0", "seed": 0')
    assert "prompt" not in json.loads(first)


def test_columns_called_like_what_imagefolder_needs(local: Location, tmp_path: Path) -> None:
    store = new_run(local, items=3, file_name=np.array(["x"] * 3, dtype=TEXT), text=np.array(["y"] * 3, dtype=TEXT))
    put(store, 0)
    export_run(store, "png", tmp_path / "out")
    assert list(contents(tmp_path / "out", "png")) == ["id-0", "id-1", "id-2"]
    assert contents(tmp_path / "out", "png")["id-0"][1]["text"] == "prompt 0: café, 猫"


def test_webdataset_tars(store: RunStore, tmp_path: Path) -> None:
    assert export_run(store, "webdataset", tmp_path / "out").files == 1
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        members = tar.getmembers()
        first = tar.extractfile("id-0.txt")
        assert first and first.read().decode() == "prompt 0: café, 猫"
    names = [f"id-{item}.{suffix}" for item in (0, 2, 6) for suffix in ("png", "txt", "json")]
    assert [member.name for member in members] == names
    assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
    again = tmp_path / "again"
    export_run(store, "webdataset", again)
    assert (again / "000000.tar").read_bytes() == (tmp_path / "out" / "000000.tar").read_bytes()


def test_parquet_is_shown_as_pictures(store: RunStore, tmp_path: Path) -> None:
    assert export_run(store, "parquet", tmp_path / "out").files == 1
    file = pq.ParquetFile(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    assert file.num_row_groups == 2, "one for each shard"
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert {name: value["dtype"] for name, value in features.items() if name != "image"} == {
        "id": "string",
        "prompt": "string",
        "seed": "int64",
        "guidance_scale": "float64",
        "clip_skip": "int64",
        "note": "string",
    }
    assert list(features) == file.schema_arrow.names
    image = file.schema_arrow.field("image").type
    assert [(field.name, str(field.type)) for field in image] == [("bytes", "binary"), ("path", "string")]
    file.close()


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_large_exports_are_cut_into_files(
    store: RunStore, tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfdask.export_formats._FILE_BYTES", 1)
    assert export_run(store, format, tmp_path / "out").files == {"webdataset": 3, "parquet": 2}[format]
    assert list(contents(tmp_path / "out", format)) == ["id-0", "id-2", "id-6"]
    names = [name for name in files(tmp_path / "out") if name.endswith(("tar", "parquet"))]
    assert names == {
        "webdataset": ["000000.tar", "000001.tar", "000002.tar"],
        "parquet": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    }[format]  # fmt: skip


NASTY = ["a/b", "../up", "a.b", "a b", "a_b", "C:\\x", "", "-", "猫", "🐈", "x" * 300, "x" * 301, "ok", "ok--3", "a\nb"]


@pytest.mark.parametrize("format", FORMATS)
def test_ids_become_file_names(local: Location, tmp_path: Path, format: Any) -> None:
    """Ids that differ only in what file names cannot hold do not overwrite each other, or anything else."""
    values = {**columns(len(NASTY)), "id": np.array(NASTY, dtype=TEXT)}
    store = RunStore.create(local, Layout("image", (6, 5, 3), len(NASTY), len(NASTY)), values, {"dfdask": {}})
    put(store, 0)
    assert export_run(store, format, tmp_path / "out").items == len(NASTY)
    found = contents(tmp_path / "out", format)
    assert len({name.lower() for name in found}) == len(NASTY)
    assert [about["id"] for _, about in found.values()] == NASTY
    for (name, (png, _)), wanted in zip(found.items(), pixels(store, 0), strict=True):
        assert np.array_equal(decoded(png), wanted)
        assert len(name) <= 120 and not set(name) & set("./\\: \n") and not name.startswith("-")
    assert {"a_b", "ok"} <= set(found), "what can be a file name stays"
    assert not (tmp_path / "up.png").exists()


def test_file_names_are_unique() -> None:
    assert file_name("cat", 3) == "cat"
    assert file_name("c/t", 3) == "c_t--3"
    assert file_name("c_t--3", 4) == "c_t--3--4"
    assert file_name("", 5) == "_--5"


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_are_cut_to_their_own_size(local: Location, tmp_path: Path, format: Any) -> None:
    sizes = np.array([6, 2, 4]), np.array([5, 5, 3])
    store = new_run(local, items=3, height=sizes[0], width=sizes[1])
    put(store, 0)
    export_run(store, format, tmp_path / "out")
    found = contents(tmp_path / "out", format)
    for item, (height, width) in enumerate(zip(*sizes, strict=True)):
        assert np.array_equal(decoded(found[f"id-{item}"][0]), pixels(store, 0)[item, :height, :width])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (4, "RGBA")])
def test_other_channels(local: Location, tmp_path: Path, channels: int, mode: str) -> None:
    store = new_run(local, items=3, shape=(6, 5, channels), width=np.array([5, 4, 3]))
    put(store, 0)
    export_run(store, "png", tmp_path / "out")
    with Image.open(tmp_path / "out" / "images" / "id-1.png") as image:
        assert image.mode == mode and image.size == (4, 6)
        assert np.array_equal(np.asarray(image).reshape(6, 4, channels), pixels(store, 0)[1, :, :4])


@pytest.mark.parametrize("format", FORMATS)
def test_channels_that_no_picture_has(local: Location, tmp_path: Path, format: Any) -> None:
    store = new_run(local, items=3, shape=(6, 5, 5))
    put(store, 0)
    with pytest.raises(StorageError, match=r"5 channels cannot be exported; read them with run.dataset\(\)"):
        export_run(store, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_videos_are_refused(local: Location, tmp_path: Path, format: Any) -> None:
    store = new_run(local, shape=(2, 6, 5, 3))
    put(store, 0)
    with pytest.raises(StorageError, match=rf"holds videos, which {format} is not for; choose mp4"):
        export_run(store, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("height", "width"), [(32, 48), (17, 15)])
def test_videos_become_mp4(local: Location, tmp_path: Path, height: int, width: int) -> None:
    layout = Layout("video", (5, height, width, 3), 3, 3)
    store = RunStore.create(local, layout, columns(3), {"dfdask": {"spec": {"seed": 1}}})
    rows, columns_ = np.mgrid[0:height, 0:width]
    frames = [np.stack([rows * 5 + 9 * frame, columns_ * 4, rows * 0 + 90], -1) for frame in range(5)]
    data = np.stack([np.stack(frames).astype(np.uint8)] * 3)
    store.write_shard(0, data, np.array([OK, OK, 2], np.uint8), ["", "", "denoise: no"], {"stage_seconds": {}})
    done = export_run(store, "mp4", tmp_path / "out", frames_per_second=8)
    assert done == ExportSummary(files=3, items=2, skipped=1, failed=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["videos/id-0.mp4", "videos/id-1.mp4"]
    with av.open(tmp_path / "out" / "videos" / "id-1.mp4") as container:
        assert container.streams.video[0].average_rate == 8
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert shown.shape == data.shape[1:]
    assert np.abs(shown.astype(int) - data[1]).mean() < 6, "that is what compressing costs"


def test_pictures_are_no_videos(store: RunStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds images, which mp4 is not for; choose png"):
        export_run(store, "mp4", tmp_path / "out")


def test_mp4_without_its_library(local: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_run(local, shape=(2, 6, 5, 3))
    put(store, 0)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(StorageError, match=r"need PyAV.*pip install 'dfdask\[video\]'"):
        export_run(store, "mp4", tmp_path / "out")


def test_runs_with_nothing_to_export(local: Location, tmp_path: Path) -> None:
    store = new_run(local)
    with pytest.raises(StorageError, match="has no finished pictures yet"):
        export_run(store, "png", tmp_path / "out")
    put(store, 0, failed=(0, 1, 2))
    with pytest.raises(StorageError, match="all 3 finished items of .* failed"):
        export_run(store, "png", tmp_path / "out")
    with pytest.raises(StorageError, match="unknown format 'gif'; choose one of png, webdataset, parquet"):
        export_run(store, "gif", tmp_path / "out")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("there", ["folder", "file", "link", "broken link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_that_is_taken(store: RunStore, tmp_path: Path, there: str, overwrite: bool) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    if there == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    elif there == "file":
        out.write_text("years of work")
    else:
        if there == "link":
            other.mkdir()
        out.symlink_to(other)
    before = files(tmp_path)
    with pytest.raises(StorageError, match="is no earlier export" if overwrite else "is there already"):
        export_run(store, "png", out, overwrite=overwrite)
    assert files(tmp_path) == before


def test_an_empty_destination(store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_run(store, "png", tmp_path / "out")
    assert len(contents(tmp_path / "out", "png")) == 3


def test_an_earlier_export_is_replaced_when_asked(store: RunStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(store, "png", out)
    before = files(out)
    with pytest.raises(StorageError, match=r"is there already; .*\(--overwrite\)"):
        export_run(store, "parquet", out)
    assert files(out) == before
    put(store, 1)
    assert export_run(store, "parquet", out, overwrite=True).items == 6
    assert files(out) == [".dfdask-export.json", "data/train-00000-of-00001.parquet", "failures.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


@pytest.mark.parametrize("place", ["runs/demo", "runs/demo/out", "runs", "."])
def test_a_run_is_not_exported_into_itself(store: RunStore, tmp_path: Path, place: str) -> None:
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="overlap; export to another folder"):
            export_run(store, "png", tmp_path / place, overwrite=overwrite)
    assert store.verify() == []


def test_a_destination_that_cannot_be_written(store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in ("file/out", "file/deep/er/out"):
        with pytest.raises(StorageError, match="cannot export to .*/file/.*[Nn]ot a directory"):
            export_run(store, "png", tmp_path / place)
    with pytest.raises(StorageError, match="cannot export to .*too long"):
        export_run(store, "png", tmp_path / ("long" * 100))


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_shard_is_no_export(store: RunStore, tmp_path: Path, format: Any) -> None:
    export_run(store, format, tmp_path / "out")
    before = contents(tmp_path / "out", format)
    objects = store.location.object_store()
    data = bytearray(obstore.get(objects, "image/c/2/0/0/0").bytes())
    data[len(data) // 2] ^= 1
    obstore.put(objects, "image/c/2/0/0/0", bytes(data))
    with pytest.raises(StorageError, match="is damaged: shard 2, image"):
        export_run(store, format, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out", format) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk(local: Location, tmp_path: Path, format: Any) -> None:
    store = new_run(local, items=24, shard_items=3, shape=(64, 64, 3))
    for shard in range(8):
        put(store, shard)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000 if format == "png" else 60_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot export to .*File too large") as caught:
            export_run(store, format, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert export_run(store, format, tmp_path / "out").items == 24


@pytest.mark.parametrize("format", FORMATS)
def test_memory_does_not_grow_with_the_run(tmp_path: Path, format: Any) -> None:
    def peak(shards: int) -> int:
        store = new_run(resolve_output(str(tmp_path / f"run-{shards}")), shards * 8, 8, (96, 96, 3))
        for shard in range(shards):
            put(store, shard)
        tracemalloc.start()
        try:
            export_run(store, format, tmp_path / f"out-{shards}")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is imported and kept at the first export
    small, large = peak(2), peak(6)
    assert large < 1.3 * small + 100_000, f"{small:,} bytes for 2 shards, {large:,} for 6"


def test_an_interrupted_export_leaves_nothing(local: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of it."""
    from dfdask import export_formats

    store = new_run(local, items=9)
    for shard in range(3):
        store.write_shard(shard, pixels(store, shard), np.full(3, OK, np.uint8), [""] * 3, {})
    add: Callable[..., None] = export_formats.PngFolder.add
    added = 0

    def interrupted(self: export_formats.PngFolder, picture: export_formats.Picture) -> None:
        nonlocal added
        if added == 5:
            raise KeyboardInterrupt
        added += 1
        add(self, picture)

    monkeypatch.setattr(export_formats.PngFolder, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(store, "png", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
