"""Ask the pipeline itself, before anything is computed, whether it takes the job and what it will make."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dfdask.arguments import USUAL_ARGUMENTS, canonical_json, check_argument_name, nearest
from dfdask.errors import ModelError, SpecError
from dfdask.images import Picture, is_picture
from dfdask.items import Item, pictures_in
from dfdask.stages.call import pipeline_call
from dfdask.stages.cut import StopStage, open_pipeline, pipeline_anatomy, stage_names
from dfdask.stages.model import WHOLE, ModelRef, locate

_MAX_CHECKED = 1000
_FROM_A_PICTURE = ("Img2Img", "Inpaint", "ImageToVideo", "Image2Video")
"""Parts of the names of pipelines that do nothing without the argument ``image``."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a job will make: the largest item's shape, and each item's (y, x) where they differ."""

    kind: Literal["image", "video"]
    item_shape: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """A model that takes the job: its stages in order, what comes out, and why it is not cut where it is not."""

    stages: tuple[str, ...]
    output: Output
    uncut: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """A model's stages in order, and the shape that it makes of each sample, without the channels.

    ``uncut`` says why a pipeline runs whole, else it is empty.
    """

    stages: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    uncut: str = ""


def check_job(
    ref: ModelRef, items: Iterable[Item], inspector: Callable[[ModelRef, list[Item]], Inspected] | None = None
) -> Checked:
    """What ``ref`` makes of ``items``; ``inspector`` calls ``inspect_model`` where the libraries are.

    Raises SpecError for arguments that the pipeline refuses, ModelError for one that cannot be opened.
    """
    if ref.fake is not None:
        return Checked(tuple(ref.fake.stages), Output("image", (ref.fake.height, ref.fake.width, 3)))
    places: dict[str, int] = {}
    samples: list[Item] = []
    sample_of: list[int] = []
    for item in items:
        key = canonical_json({name: _sized(value) for name, value in item.arguments.items() if "prompt" not in name})
        if key not in places:
            if len(samples) >= _MAX_CHECKED:
                raise SpecError(f"arguments: more than {_MAX_CHECKED} different combinations in one job; split the job")
            places[key] = len(samples)
            samples.append(item.without_pictures())
        sample_of.append(places[key])
    inspected = (inspector or inspect_model)(ref, samples)
    kinds = set(inspected.shapes)
    if len({shape[:-2] for shape in kinds}) > 1:
        raise SpecError(
            f"arguments: items of one run must have the same number of frames, got {sorted(kinds)}; make a run for each"
        )
    height, width = max(shape[-2] for shape in kinds), max(shape[-1] for shape in kinds)
    frames = inspected.shapes[0][:-2]
    sizes = None
    if len(kinds) > 1:
        sizes = tuple((inspected.shapes[place][-2], inspected.shapes[place][-1]) for place in sample_of)
    output = Output("video" if frames else "image", (*frames, height, width, 3), sizes)
    return Checked(inspected.stages, output, inspected.uncut)


def _sized(value: Any) -> Any:
    """``value`` with the sizes of pictures for the pictures: that is all that the size of the output depends on."""
    if isinstance(value, list):
        return [_sized(entry) for entry in value]
    return {"picture": [value.width, value.height]} if isinstance(value, Picture) else value


def inspect_model(ref: ModelRef, samples: Sequence[Item]) -> Inspected:
    """Open the pipeline of ``ref`` without weights and try ``samples`` on it. Raises SpecError and ModelError."""
    folder = locate(ref.source, ref.revision)
    stages = stage_names(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = open_pipeline(ref, None, "cpu")
    shapes = tuple(_shape(pipeline, item, stages) for item in samples)
    return Inspected(stages, shapes, pipeline_anatomy(folder).uncut)


def _shape(pipeline: Any, item: Item, stages: tuple[str, ...]) -> tuple[int, ...]:
    """(y, x) or (frame, y, x) that the pipeline will make of ``item``, by its own defaults and rules."""
    kind = type(pipeline).__name__
    accepted = inspect.signature(pipeline.__call__).parameters
    for argument in item.arguments:
        if argument not in accepted:
            raise SpecError(f"arguments: {kind} has no argument {argument!r}{_hint(argument, accepted)}")
    _check_pictures(kind, accepted, item)
    if stages == (WHOLE,):
        return _whole_shape(pipeline, item)
    for name in ("height", "width"):
        if isinstance(item.arguments.get(name), int):
            _check_size(pipeline, item, name, item.arguments[name])
    local: dict[str, Any] = {}

    def stop(*args: Any, **kwargs: Any) -> Any:
        # The pipeline has checked its inputs and filled in its defaults by now: its own numbers are the truth.
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_locals.get("self") is pipeline and frame.f_code.co_name == "__call__":
                local.update(frame.f_locals)
            frame = frame.f_back
        raise StopStage

    object.__setattr__(pipeline, "encode_prompt", stop)
    try:
        pipeline(**pipeline_call(pipeline, [item]))
    except StopStage:
        pass
    except Exception as error:
        raise SpecError(
            f"arguments: {kind} refuses item {item.id!r} with {dict(item.arguments)}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    finally:
        object.__delattr__(pipeline, "encode_prompt")
    height = local.get("orig_height", local.get("height"))
    width = local.get("orig_width", local.get("width"))
    overlaid = item.arguments.get("padding_mask_crop") is not None
    if "height" not in accepted or overlaid:
        if item.arguments.get("image") is None and "image" in accepted:
            raise _missing("image", kind, item)
        height, width = _picture_size(pipeline, item, overlaid)
    if not isinstance(height, int) or not isinstance(width, int):
        raise SpecError(f"arguments: {kind} does not say which size it makes; set height and width")
    if not overlaid:
        _check_size(pipeline, item, "height", height)
        _check_size(pipeline, item, "width", width)
    frames = local.get("num_frames")
    return (frames, height, width) if isinstance(frames, int) else (height, width)


def _hint(argument: str, accepted: Mapping[str, inspect.Parameter]) -> str:
    """The argument that may be meant, else all that a job may set."""
    names = [name for name, parameter in accepted.items() if parameter.kind is not parameter.VAR_KEYWORD]
    names = [name for name in names if _may_be_set(name)]
    usual = [name for name in names if name in USUAL_ARGUMENTS and argument in name.split("_")]
    if len(usual) == 1:  # a word of a usual name says more than letters in common: "steps" means no `timesteps`
        return f"; did you mean {usual[0]!r}?"
    return nearest(argument, names) or f"; it takes {', '.join(names)}"


def _may_be_set(name: str) -> bool:
    try:
        check_argument_name(name)
    except ValueError:
        return False
    return True


def _check_pictures(kind: str, accepted: Mapping[str, inspect.Parameter], item: Item) -> None:
    """Most pipelines call their pictures optional and fail on None later, some with odd words, some in a stage."""
    starts_from_one = "mask_image" in accepted or any(word in kind for word in _FROM_A_PICTURE)
    for name, parameter in accepted.items():
        needed = parameter.default is parameter.empty or (starts_from_one and name in ("image", "mask_image"))
        if is_picture(name) and needed and item.arguments.get(name) is None:
            raise _missing(name, kind, item)


def _missing(name: str, kind: str, item: Item) -> SpecError:
    return SpecError(
        f"arguments.{name}: is missing, and {kind} needs this picture (item {item.id!r}); give its file in `arguments` "
        "or with each prompt"
    )


def _picture_size(pipeline: Any, item: Item, overlaid: bool) -> tuple[int | None, int | None]:
    """(height, width) where the input picture decides: its own, or cut to what the VAE can make."""
    pictures = pictures_in(item.arguments.get("image"))
    if not pictures:
        return None, None
    if overlaid:  # what is made is laid over the picture
        return pictures[0].height, pictures[0].width
    height, width = pipeline.image_processor.get_default_height_width(pictures[0].open())
    return int(height), int(width)


def _check_size(pipeline: Any, item: Item, name: str, pixels: int) -> None:
    processor = getattr(pipeline, "image_processor", None) or getattr(pipeline, "video_processor", None)
    unit = int(getattr(getattr(processor, "config", None), "vae_scale_factor", 1))
    if pixels % unit:
        below, above = pixels // unit * unit, (pixels // unit + 1) * unit
        fits = f"{below} or {above}" if below else str(above)
        raise SpecError(
            f"arguments.{name}: {pixels} pixels are not a multiple of {unit}, which this model's VAE needs; use {fits} "
            f"(item {item.id!r})"
        )


def _whole_shape(pipeline: Any, item: Item) -> tuple[int, ...]:
    height, width = (item.arguments.get(name) for name in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    for part in ("unet", "transformer"):
        size = getattr(getattr(getattr(pipeline, part, None), "config", None), "sample_size", None)
        if size is not None:
            side = (size, size) if isinstance(size, int) else tuple(size)
            return int(side[0]), int(side[1])
    raise ModelError(
        f"model: {type(pipeline).__name__} has no cut points, and its output size is unknown; set height and width"
    )
