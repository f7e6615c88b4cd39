"""Training on four drawn glyphs: repeatable, resumable, and it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dfdask.bundled import measure
from dfdask.bundled.architecture import build_pipeline, load_pipeline, train_tokenizer
from dfdask.bundled.autoencoder import encode, even_out
from dfdask.bundled.optimizer import Muon, orthogonalise
from dfdask.bundled.progress import Budget
from dfdask.bundled.render import Glyph, Pixels
from dfdask.bundled.train import main, on_device


def train(glyph_file: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    main([str(glyph_file), str(output), "--device", "cpu", "--batch", "4", *options])
    files = sorted((output / "model").rglob("*.safetensors"))
    assert len(files) == 3
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
"""Diffusers' DPM-Solver passes torch's tensors to numpy so."""


@pytest.fixture(scope="module")
def trained(glyph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(glyph_file, output, "--steps", "2")
    return output


def test_the_same_seed_gives_the_same_weights(glyph_file: Path, trained: Path, tmp_path: Path) -> None:
    first = {
        f"{file.parent.name}.{name}": value
        for file in (trained / "model").rglob("*.safetensors")
        for name, value in load_file(file).items()
    }
    again = train(glyph_file, tmp_path / "again", "--steps", "2")
    other = train(glyph_file, tmp_path / "other", "--steps", "2", "--seed", "1")
    assert first.keys() == again.keys()
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_resuming_goes_on_with_the_transformer_alone(glyph_file: Path, trained: Path, tmp_path: Path) -> None:
    before = load_pipeline(trained / "model")
    train(glyph_file, tmp_path, "--steps", "1", "--resume", str(trained / "model"))
    after = load_pipeline(tmp_path / "model")
    for part, same in (("vae", True), ("transformer", False), ("text_encoder", False)):
        one, two = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        assert all(torch.equal(one[name], two[name]) for name in one) is same, part
    prompts = ["red apple", "an unseen word"]
    assert before.tokenizer(prompts).input_ids == after.tokenizer(prompts).input_ids
    parts = [json.loads(line)["part"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert parts == ["start", "autoencoder", "lessons", "done"]


def test_measuring_prints_one_line_a_setting(
    glyph_file: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--steps", "2", "--guidance", "1", "3", "--batch", "2", "--every", "2"]
    measure.main([str(glyph_file), str(trained / "model"), *settings])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["guidance"], line["names"]) for line in lines] == [(1.0, 2), (3.0, 2)]


def test_ranks_count_the_glyphs_that_are_nearer(pixels: Pixels) -> None:
    assert measure.ranks(pixels, pixels, [0, 1, 2, 3]) == [0, 0, 0, 0]
    assert measure.ranks(pixels[[1, 2]], pixels[[1, 2]], [1, 0]) == [1, 1]
    grays = np.array([0, 40, 100, 220], np.uint8).reshape(-1, 1, 1, 1)
    assert measure.ranks(grays[[1]] + np.uint8(5), grays, [0]) == [1]
    assert measure.ranks(grays[[1, 1]] + np.uint8(5), grays, [2, 3]) == [2, 3]


def test_evened_out_latents_draw_the_same_pictures(glyphs: list[Glyph], pixels: Pixels) -> None:
    torch.manual_seed(0)
    vae = build_pipeline(train_tokenizer([glyph.name for glyph in glyphs]), size=32).vae.eval()
    pictures = on_device(pixels, "cpu")
    with torch.no_grad():
        before = vae.decode(encode(vae, pictures)).sample
        even_out(vae, pictures)
        latents = encode(vae, pictures)
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)


def test_muon_evens_out_singular_values_and_lowers_a_loss() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 8) @ torch.diag(torch.logspace(0, -2, 8))))
    assert values.min() > 0.3 and values.max() < 1.5
    matrix, wanted = torch.zeros(6, 4, requires_grad=True), torch.randn(6, 4)
    muon, losses = Muon([matrix]), []
    for _ in range(60):
        matrix.grad = None
        loss = (matrix - wanted).square().mean()
        loss.backward()
        muon.step(0.1)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    matrix.grad = None
    with pytest.raises(ValueError, match=r"shape \(6, 4\) has no gradient"):
        muon.step(0.1)


def test_a_budget_of_steps_ends_exactly() -> None:
    assert [Budget(9, steps=4).progress(step) for step in (0, 2, 4)] == [0, 0.5, 1]
    assert Budget(0).progress(0) == 1
    assert Budget(1).progress(0) == 0
