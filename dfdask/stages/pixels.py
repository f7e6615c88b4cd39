"""The pixels of a pipeline's output: uint8 arrays, one per item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from dfdask.stages.tape import patched

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def to_pixels(output: Any, finite: list[bool] | None = None) -> list[Pixels | Exception]:
    """uint8 (y, x, channel) or (frame, y, x, channel) per item from floats in [0, 1]; NaN is an error.

    An ``output`` that came through ``device_pixels`` is uint8 already, and ``finite`` what that yielded.
    """
    every = np.asarray(output)
    if every.dtype == np.uint8 and finite:
        flags = np.array(finite).reshape(len(every), -1)  # of a video a flag for each frame
        return [array if good.all() else _not_finite() for array, good in zip(every, flags, strict=True)]
    return [
        (array * 255).round().clip(0, 255).astype(np.uint8) if np.isfinite(array).all() else _not_finite()
        for array in every
    ]


def _not_finite() -> Exception:
    return FloatingPointError("the output is not finite (NaN or infinity)")


@contextmanager
def device_pixels(pipeline: Any) -> Iterator[list[bool]]:
    """Have the pipeline's processors of pictures and videos make uint8 of their output where it was computed.

    A GPU does it while a CPU thread would hold it up, and a quarter of the bytes leaves it. The values are those of
    ``to_pixels``: both multiply and round float32. Yields a list that gets, for each picture or frame in order,
    whether all of it is finite. Processors with a ``postprocess`` of their own are left as they are.
    """
    from diffusers.image_processor import VaeImageProcessor

    finite: list[bool] = []
    with ExitStack() as stack:
        processors = [part for part in vars(pipeline).values() if isinstance(part, VaeImageProcessor)]
        for processor in processors:
            if type(processor).postprocess is VaeImageProcessor.postprocess:
                stack.enter_context(patched(processor, postprocess=_to_uint8(processor.postprocess, finite)))
        yield finite


def _to_uint8(postprocess: Callable[..., Any], finite: list[bool]) -> Callable[..., Any]:
    """The ``postprocess`` of a processor, with uint8 (row, y, x, channel) where it returned floats."""
    import torch

    def replaced(image: Any, output_type: str = "pil", *args: Any, **kwargs: Any) -> Any:
        if output_type != "np":
            return postprocess(image, output_type, *args, **kwargs)
        image = postprocess(image, "pt", *args, **kwargs)
        rows, channels, height, width = image.shape
        pixels = torch.empty((rows, height, width, channels), dtype=torch.uint8, device=image.device)
        for row, place in zip(image, pixels, strict=True):  # one by one: floats of a whole video may not fit
            place.copy_((row.float() * 255).round_().clamp_(0, 255).permute(1, 2, 0))
        finite.extend(torch.stack([row.isfinite().all() for row in image]).tolist())
        return pixels.cpu().numpy()

    return replaced
