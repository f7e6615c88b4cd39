"""Pixels are the nearest uint8, whether numpy or the device makes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor, VaeImageProcessorLDM3D
from diffusers.video_processor import VideoProcessor
from hypothesis import given
from hypothesis import strategies as st

from dfdask.stages.pixels import device_pixels, to_pixels


def decoded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a VAE returns: about -1 to 1, some of it beyond."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_pixels_round_to_the_nearest_and_what_is_not_finite_is_an_error() -> None:
    good = np.full((2, 2, 3), 0.5, np.float32)
    bad = good.copy()
    bad[1, 1, 1] = np.nan
    first, second, third = to_pixels(np.stack([good, bad, good * 2.5]))
    assert isinstance(first, np.ndarray) and first.dtype == np.uint8 and (first == 128).all()
    assert isinstance(second, FloatingPointError)
    assert isinstance(third, np.ndarray) and (third == 255).all()


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3))
def test_the_device_makes_the_pixels_that_numpy_makes(seed: int, dtype: torch.dtype, items: int) -> None:
    pipeline = SimpleNamespace(image_processor=VaeImageProcessor())
    image = decoded(items, 3, 8, 16, seed=seed, dtype=dtype)
    expected = to_pixels(pipeline.image_processor.postprocess(image, "np"))
    with device_pixels(pipeline) as finite:
        made = pipeline.image_processor.postprocess(image, output_type="np")
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(to_pixels(made, finite), expected)
    assert pipeline.image_processor.postprocess(image, "np").dtype == np.float32  # as it was before


def test_of_videos_the_one_with_a_bad_frame_fails() -> None:
    pipeline: Any = SimpleNamespace(video_processor=VideoProcessor(), other=None)
    videos = decoded(2, 3, 5, 8, 8)
    expected = to_pixels(pipeline.video_processor.postprocess_video(videos, "np"))
    videos[1, 0, 3, 2, 2] = torch.nan
    with device_pixels(pipeline) as finite:
        first, second = to_pixels(pipeline.video_processor.postprocess_video(videos, "np"), finite)
    np.testing.assert_array_equal(first, expected[0])
    assert isinstance(second, FloatingPointError)


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_what_a_safety_checker_asks_for_stays(output_type: str) -> None:
    pipeline = SimpleNamespace(image_processor=VaeImageProcessor())
    image = decoded(1, 3, 8, 8)
    expected = pipeline.image_processor.postprocess(image, output_type)
    with device_pixels(pipeline) as finite:
        made = pipeline.image_processor.postprocess(image, output_type)
    assert not finite
    np.testing.assert_array_equal(np.asarray(made[0]), np.asarray(expected[0]))


def test_a_processor_with_a_postprocess_of_its_own_keeps_it() -> None:
    pipeline = SimpleNamespace(image_processor=VaeImageProcessorLDM3D())
    with device_pixels(pipeline):
        assert "postprocess" not in vars(pipeline.image_processor)
