"""Measures how well a bundled model draws what it is asked for.

    python -m dfdask.bundled.measure glyphs.npz MODEL

For every glyph's name it draws one picture and looks for the nearest glyph, by squared differences of the
pixels: top-1 is the share of names whose own glyph is nearest, top-5 that among the five nearest. Each
picture has its glyph's index as its seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfdask.bundled import ARGUMENTS
from dfdask.bundled.architecture import Pipeline, load_pipeline, make_scheduler
from dfdask.bundled.render import GlyphFileError, Pixels, load_glyphs

_FREE = (
    "red apple|yellow star|a cat with sunglasses|green heart|rocket|blue car|green apple|red car|a dog|pizza|"
    "purple butterfly|a sad face|snowy mountain|pink flower|fire|a ghost|blue fish|a house with a garden|"
    "green frog|purple car|an orange cat|birthday cake|a robot|yellow umbrella|red balloon|blue bird|tree|"
    "a happy cat|pink heart|moon and stars|cup of coffee|guitar"
)
FREE_PROMPTS = _FREE.split("|")
"""Some name a glyph, some are captions that training made up, some are neither."""


def draw(pipeline: Pipeline, prompts: list[str], batch: int, **arguments: float) -> Pixels:
    """(n, size, size, 3) uint8, the prompt's place as its seed."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + place) for place in range(len(part))]
        drawn = pipeline(part, generator=seeds, output_type="np", **{**ARGUMENTS, **arguments}).images
        pictures.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def ranks(drawn: Pixels, glyphs: Pixels, wanted: list[int]) -> list[int]:
    """For each drawn picture, how many glyphs are nearer to it than the one it was to show."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = _flat(glyphs, device)
    places = []
    for picture, index in zip(_flat(drawn, device), wanted, strict=True):
        distances = (every - picture).square().sum(1)
        places.append(int((distances < distances[index]).sum()))
    return places


def _flat(pixels: Pixels, device: str) -> Tensor:
    return torch.from_numpy(pixels).to(device).flatten(1).float() / 255


def sheet(pictures: Pixels, columns: int) -> Image.Image:
    """A contact sheet, row by row; the last row may have to be filled with white."""
    size = pictures.shape[1]
    missing = -len(pictures) % columns
    filled = np.concatenate([pictures, np.full((missing, size, size, 3), 255, np.uint8)])
    rows = filled.reshape(-1, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(rows.reshape(-1, columns * size, 3))


def measure(options: argparse.Namespace) -> None:
    """Prints one JSON line for each combination of the settings; writes contact sheets to `options.out`."""
    glyphs, pixels = load_glyphs(options.glyphs)
    pipeline = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    wanted = list(range(0, len(glyphs), options.every))
    names = [glyphs[index].name for index in wanted]
    for steps, guidance, shift in itertools.product(options.steps, options.guidance, options.shift):
        pipeline.scheduler = make_scheduler(shift)
        start = time.monotonic()
        drawn = draw(pipeline, names, options.batch, num_inference_steps=steps, guidance_scale=guidance)
        seconds = time.monotonic() - start
        places = np.array(ranks(drawn, pixels, wanted))
        facts = {
            "steps": steps,
            "guidance": guidance,
            "shift": shift,
            "names": len(names),
            "top1": round(float((places < 1).mean()), 4),
            "top5": round(float((places < 5).mean()), 4),
            "error": round(float(np.abs(drawn.astype(np.float32) - pixels[wanted]).mean()), 2),
            "seconds_each": round(seconds / len(names), 3),
        }
        print(json.dumps(facts), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        wrong = [place for place in range(len(places)) if places[place] >= 1][:64]
        print("wrong:", "; ".join(names[place] for place in wrong))
        spread = np.linspace(0, len(names) - 1, min(64, len(names))).astype(int).tolist()
        for label, chosen in (("pairs", spread), ("wrong", wrong)):
            both = [picture for place in chosen for picture in (pixels[wanted[place]], drawn[place])]
            if both:
                sheet(np.stack(both), 16).save(options.out / f"{label}.png")
        free = draw(pipeline, list(FREE_PROMPTS), options.batch, num_inference_steps=steps, guidance_scale=guidance)
        sheet(free, 8).save(options.out / "free.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure how well a bundled model draws what it is asked for.")
    parser.add_argument("glyphs", type=Path, help="what python -m dfdask.bundled.render wrote")
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[int(ARGUMENTS["num_inference_steps"])])
    parser.add_argument("--guidance", type=float, nargs="+", default=[float(ARGUMENTS["guidance_scale"])])
    parser.add_argument("--shift", type=float, nargs="+", default=[1.0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th name")
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 1)
    parser.add_argument("--out", type=Path, help="where contact sheets of the last combination go")
    try:
        measure(parser.parse_args(arguments))
    except GlyphFileError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
