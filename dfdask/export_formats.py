"""What an export looks like on the disk: one writer for each format."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

_FILE_BYTES = 512_000_000
_FILE_ITEMS = 10_000


@dataclass(frozen=True, slots=True)
class Picture:
    """One item on its way out. ``name`` is its id as a file name, unique in the run; ``data`` its PNG or MP4 file."""

    name: str
    id: str
    prompt: str
    seed: int
    arguments: dict[str, Any]
    data: bytes

    def about(self) -> dict[str, Any]:
        """Everything but the pixels, by the name of its column."""
        return {"id": self.id, "prompt": self.prompt, "seed": self.seed, **self.arguments}


class Writer(Protocol):
    """Takes pictures one by one; ``files`` counts what it made."""

    files: int

    def __init__(self, folder: Path) -> None: ...
    def add(self, picture: Picture) -> None: ...
    def end_of_shard(self) -> None: ...
    def close(self) -> None: ...


class PngFolder:
    """``images/<name>.png`` and ``metadata.jsonl``: the layout of Hugging Face's imagefolder."""

    folder, suffix = "images", "png"

    def __init__(self, folder: Path) -> None:
        self.files = 1
        self._folder = folder
        (folder / self.folder).mkdir()
        self._metadata = (folder / "metadata.jsonl").open("w", encoding="utf-8")

    def add(self, picture: Picture) -> None:
        name = f"{self.folder}/{picture.name}.{self.suffix}"
        # Exclusive: on disks that ignore case, Cat.png would silently replace cat.png.
        with (self._folder / name).open("xb") as file:
            file.write(picture.data)
        fixed = {"file_name": name, "text": picture.prompt}
        about = {key: value for key, value in picture.about().items() if key not in ("prompt", *fixed)}
        line = {**fixed, **about}
        self._metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.files += 1

    def end_of_shard(self) -> None:
        self._metadata.flush()

    def close(self) -> None:
        self._metadata.close()


class Mp4Folder(PngFolder):
    """``videos/<name>.mp4`` and ``metadata.jsonl``: the layout of Hugging Face's videofolder."""

    folder, suffix = "videos", "mp4"


class WebDataset:
    """``000000.tar``, ...: for each picture <name>.png, <name>.txt (prompt) and <name>.json."""

    def __init__(self, folder: Path) -> None:
        self.files = 0
        self._folder = folder
        self._tar: tarfile.TarFile | None = None
        self._bytes = self._items = 0

    def add(self, picture: Picture) -> None:
        if self._tar is None or self._bytes >= _FILE_BYTES or self._items >= _FILE_ITEMS:
            self.close()
            self._tar = tarfile.TarFile(self._folder / f"{self.files:06d}.tar", "w", format=tarfile.PAX_FORMAT)
            self.files += 1
            self._bytes = self._items = 0
        about = json.dumps(picture.about(), ensure_ascii=False).encode()
        for suffix, data in (("png", picture.data), ("txt", picture.prompt.encode()), ("json", about)):
            entry = tarfile.TarInfo(f"{picture.name}.{suffix}")  # of no time and no owner: equal runs, equal tars
            entry.size = len(data)
            self._tar.addfile(entry, BytesIO(data))
            self._bytes += len(data)
        self._items += 1

    def end_of_shard(self) -> None:
        pass

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()


class ParquetDataset:
    """``data/train-00000-of-00001.parquet``, ...: Hugging Face `datasets` shows the pictures as pictures."""

    def __init__(self, folder: Path) -> None:
        self.files = 0
        self._folder = folder / "data"
        self._folder.mkdir()
        self._rows: list[dict[str, Any]] = []
        self._schema: Any = None
        self._writer: Any = None
        self._bytes = 0

    def add(self, picture: Picture) -> None:
        image = {"bytes": picture.data, "path": f"{picture.name}.png"}
        self._rows.append({"image": image, **picture.about()})
        self._bytes += len(picture.data)

    def end_of_shard(self) -> None:
        """A shard is a row group: readers hold one of them at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        if self._schema is None:
            self._schema = _schema(self._rows[0])
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._part(self.files), self._schema)
            self.files += 1
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []
        if self._bytes >= _FILE_BYTES:
            self._finish()

    def close(self) -> None:
        self.end_of_shard()
        self._finish()
        for number in range(self.files):
            self._part(number).rename(self._folder / f"train-{number:05d}-of-{self.files:05d}.parquet")

    def _part(self, number: int) -> Path:
        return self._folder / f"train-{number:05d}.parquet"

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0


def _schema(row: dict[str, Any]) -> Any:
    """Arrow types by the first row, and the same in the words of Hugging Face `datasets`."""
    import pyarrow as pa

    types = {bool: ("bool", pa.bool_()), int: ("int64", pa.int64()), float: ("float64", pa.float64())}
    text = ("string", pa.string())
    # A missing number is None in the first row, and a column of texts has no None.
    named = {
        name: types[float] if value is None else types.get(type(value), text)
        for name, value in row.items()
        if name != "image"
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features.update({name: {"dtype": word, "_type": "Value"} for name, (word, _) in named.items()})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", image), *(pa.field(name, kind) for name, (_, kind) in named.items())]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


WRITERS: dict[str, type[Writer]] = {
    "png": PngFolder,
    "webdataset": WebDataset,
    "parquet": ParquetDataset,
    "mp4": Mp4Folder,
}
