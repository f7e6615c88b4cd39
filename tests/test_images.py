"""Input pictures: looked at where the job is submitted, then on their way as bytes to the stages that need them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from pictures import make_picture, png
from PIL import Image
from tiny_models import monolithic

from dfdask import images
from dfdask.batching import call_key, micro_batches
from dfdask.errors import PromptError
from dfdask.images import Picture, is_picture
from dfdask.items import Item
from dfdask.prompts import ItemTable, read_items
from dfdask.run import submit
from dfdask.spec import JobSpec
from dfdask.stages.model import model_ref


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., ItemTable]:
    """The items of a job file whose only prompt has these values."""

    def read(**own: Any) -> ItemTable:
        path = tmp_path / "jobs" / "job.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"model: bundled\nprompts:\n- { ({'prompt': 'a cat', **own})!r}\n")
        return read_items(JobSpec.from_yaml(path))

    return read


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        *((name, True) for name in ("image", "mask_image", "control_image", "last_image", "image_2", "images")),
        *((name, False) for name in ("image_guidance_scale", "prompt", "image_size", "original_size")),
    ],
)
def test_which_arguments_are_pictures(name: str, taken: bool) -> None:
    assert is_picture(name) is taken


def test_a_picture_becomes_part_of_its_item(tmp_path: Path, job: Callable[..., ItemTable]) -> None:
    file = tmp_path / "jobs" / "in" / "cat.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(png(1, (40, 24)))
    table = job(image="in/cat.png", strength=0.5)
    light, heavy = table[0].arguments["image"], table.items(0, 1)[0].arguments["image"]
    assert (light.name, light.width, light.height, light.data) == ("in/cat.png", 40, 24, b"")
    assert heavy.data == file.read_bytes() and heavy.digest == light.digest
    assert table.items(0, 1)[0].without_pictures() == table[0]
    assert np.array_equal(np.asarray(heavy.open()), np.asarray(Image.open(file)))
    assert np.asarray(light.open()).shape == (24, 40, 3) and not np.asarray(light.open()).any()


def test_what_is_in_the_file_is_part_of_the_run(tmp_path: Path, job: Callable[..., ItemTable]) -> None:
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "cat.png"
    file.write_bytes(png(1))
    table = job(image="cat.png")
    first = table.digest()
    assert job(image="cat.png").digest() == first
    file.write_bytes(png(2))
    assert job(image="cat.png").digest() != first
    with pytest.raises(PromptError, match="has changed since the job was submitted"):
        table.items(0, 1)
    file.unlink()
    with pytest.raises(PromptError, match="cannot be read any more"):
        table.items(0, 1)


def problem(job: Callable[..., ItemTable], value: Any) -> str:
    with pytest.raises(PromptError) as caught:
        job(image=value)
    assert "\n" not in str(caught.value) and "item 0: image: " in str(caught.value)
    return str(caught.value)


def test_pictures_that_cannot_be_taken(
    tmp_path: Path, job: Callable[..., ItemTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "jobs"
    home.mkdir()
    (home / "folder").mkdir()
    (home / "text.png").write_text("no picture at all")
    (home / "code.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "outside.png").write_bytes(png(1))
    (home / "link.png").symlink_to(tmp_path / "outside.png")
    (home / "good.png").write_bytes(png(1))
    os.mkfifo(home / "pipe.png")
    monkeypatch.chdir(home)
    assert "is no file; check the path" in problem(job, "gone.png")
    assert "is a directory" in problem(job, "folder")
    assert "is not a regular file" in problem(job, "pipe.png")
    for name in ("text.png", "code.eps"):
        assert "must be a picture (PNG, JPEG, WEBP)" in problem(job, name)
    for name in ("../outside.png", str(tmp_path / "outside.png"), "link.png"):
        assert "must lie in the folder of the job file" in problem(job, name)
    assert "got the address 'https://here/a.png'; download it first" in problem(job, "https://here/a.png")
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    assert "must have at most 10 bytes" in problem(job, "good.png")
    monkeypatch.undo()
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert "must have at most 100 pixels, got 32 x 32" in problem(job, "good.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_picture_that_may_not_be_read(tmp_path: Path, job: Callable[..., ItemTable]) -> None:
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "cat.png"
    file.write_bytes(png(1))
    file.chmod(stat.S_IWUSR)
    assert "must be readable" in problem(job, "cat.png")


def test_a_bomb_is_not_unpacked(tmp_path: Path, job: Callable[..., ItemTable]) -> None:
    (tmp_path / "jobs").mkdir()
    data = bytearray(png(1))
    data[16:24] = struct.pack(">II", 60_000, 60_000)  # the size in the header, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "jobs" / "bomb.png").write_bytes(data)
    assert "pixels" in problem(job, "bomb.png")


def test_a_damaged_picture_costs_its_item() -> None:
    good = make_picture(1)
    damaged = Picture(good.name, "x", 32, 32, good.data[:-60])
    with pytest.raises(ValueError, match=r"the picture '1.png' is damaged"):
        damaged.open()


def test_a_picture_stands_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    assert images._size("a.jpg", file.getvalue()) == (4, 8)
    assert Picture("a.jpg", "", 4, 8, file.getvalue()).open().size == (4, 8)


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, job: Callable[..., ItemTable], name: str) -> None:
    values = np.array([[0, 128, 129, 257], [1000, 25_700, 65_406, 65_535]], np.uint16)
    file = tmp_path / "jobs" / "grey.png"
    file.parent.mkdir()
    Image.fromarray(values).save(file)
    picture = job(**{name: "grey.png"}).items(0, 1)[0].arguments[name]
    pixels = np.asarray(picture.open())
    assert pixels.shape == (2, 4, 3) and pixels.dtype == np.uint8
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [4, 100, 254, 255]]
    assert picture.digest == hashlib.sha256(file.read_bytes()).hexdigest(), "of the file, not of its pixels"
    wide = Image.fromarray(values).convert("I")  # as older versions of PIL open it
    assert np.array_equal(np.asarray(images._eight_bits(wide)), pixels[..., 0])


def test_pictures_of_one_size_share_a_call() -> None:
    def item(row: int, size: int) -> Item:
        return Item(row, str(row), "a", row, {"image": make_picture(row, (size, size))})

    rows = [item(0, 32), item(1, 16), item(2, 32)]
    assert [batch.items for batch in micro_batches(0, rows, 8)] == [(0, 2), (1,)]
    assert call_key(rows[0]) == call_key(rows[0].without_pictures())


def test_a_job_that_starts_from_pictures(tiny: Callable[[str], Path], client: Any, tmp_path: Path) -> None:
    """From the files to the store, through workers that cannot see the files."""
    arguments = {"num_inference_steps": 3, **tiny_families.ARGUMENTS["sd_img2img"]}
    prompts = []
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(png(row, (40, 32)) if row < 2 else png(row)[:-60])
        prompts.append({"prompt": f"picture {row}", "image": f"{row}.png"})
    path = tmp_path / "job.yaml"
    path.write_text(f"model: {tiny('sd_img2img')}\nprompts: {prompts}\narguments: {arguments}\nstrict: true\n")
    spec = JobSpec.from_yaml(path, overrides={"output": str(tmp_path / "out")})
    run = submit(spec, client=client)
    run.wait(timeout=100)
    (failure,) = run.failures()
    assert failure["error"].startswith("encode: ValueError: the picture '2.png' is damaged")
    pixels = run.dataset()["image"].values
    assert pixels.shape[1:] == (32, 40, 3)
    items = read_items(spec).items(0, 2)
    torch.set_num_threads(1)
    expected = monolithic(model_ref(spec), items, image=[item.arguments["image"].open() for item in items])
    assert np.array_equal(pixels[0], expected[0]) and np.array_equal(pixels[1], expected[1])
