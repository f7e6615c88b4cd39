"""The model that is shipped: small, safe to load, quiet, and it draws what it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dfdask.bundled import ARGUMENTS, MODEL_PATH
from dfdask.bundled.architecture import Pipeline, load_pipeline
from dfdask.bundled.captions import hue_and_share
from dfdask.bundled.render import Pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
"""Diffusers' DPM-Solver passes torch's tensors to numpy so."""

LOAD = """
import sys, warnings
warnings.simplefilter("error")
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
parts = pipeline.vae, pipeline.transformer, pipeline.text_encoder
print(type(pipeline).__name__, {str(part.dtype) for part in parts})
"""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    loaded = load_pipeline(MODEL_PATH)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: Pipeline, prompts: list[str], seed: int = 0) -> Pixels:
    """(n, 128, 128, 3) uint8, each prompt from the same noise."""
    seeds = [torch.Generator().manual_seed(seed) for _ in prompts]
    return (pipeline(prompts, generator=seeds, output_type="np", **ARGUMENTS).images * 255).round().astype(np.uint8)


def test_it_is_small_and_has_no_code_and_no_pickles() -> None:
    files = [path for path in MODEL_PATH.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in tensors) <= 16_000_000
    for path in tensors:
        with safe_open(path, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118


def test_diffusers_loads_it_in_32_bits_without_a_word() -> None:
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(MODEL_PATH)], capture_output=True, text=True, env=quiet, check=True
    )
    assert done.stdout.split(maxsplit=1) == ["PixArtAlphaPipeline", "{'torch.float32'}\n"]
    assert done.stderr == ""


def test_it_draws_what_it_is_asked_for(pipeline: Pipeline) -> None:
    colours = {"red heart": "red", "yellow star": "yellow", "green heart": "green", "a purple heart": "purple"}
    drawn = draw(pipeline, ["red apple", *colours], seed=3)
    assert [hue_and_share(picture)[0] for picture in drawn[1:]] == list(colours.values())
    white = (drawn > 240).all(-1)
    assert white[:, :3, :3].all(), "the background is clean"
    apple, red, star, green, _ = ~white
    red_pixels = (drawn[0] >= (190, 0, 0)).all(-1) & (drawn[0] <= (255, 120, 90)).all(-1)
    leaf = drawn[0, :40, :, 1].astype(int) - drawn[0, :40, :, 0] > 30
    assert red_pixels.sum() > 0.5 * apple.sum() and leaf.sum() > 100
    assert apple[75].sum() > 90 > apple[15].sum()
    assert star[45].sum() > 90 and star[115].sum() < 80  # its arms, and the gap between its legs
    assert green[40].sum() > 90 and green[115].sum() < 45  # the round top and the tip
    assert (red & green).sum() > 0.9 * (red | green).sum(), "hearts of two colours have one shape"


def test_a_seed_decides_the_picture(pipeline: Pipeline) -> None:
    first, again, other = (draw(pipeline, ["rocket"], seed) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unseen_words_have_tokens(pipeline: Pipeline) -> None:
    tokenizer = pipeline.tokenizer
    (tokens,) = tokenizer(["zygomorphic flibbertigibbet, 42% (of it)!"]).input_ids
    assert tokenizer.unk_token_id not in tokens
    assert tokens[-1] == tokenizer.eos_token_id and len(tokens) > 8
    one, two = tokenizer(["red apple", "red pear"]).input_ids
    assert len(one) == 3 and one[0] == two[0] and one[1] != two[1]
    assert tokenizer([""]).input_ids == [[tokenizer.eos_token_id]]
