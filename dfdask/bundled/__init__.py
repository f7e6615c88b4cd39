"""The small text-to-image model that comes with dfdask, and the scripts that made it.

``model/`` is an ordinary diffusers directory; ``model/README.md`` is its card. To make it again::

    python -m dfdask.bundled.render glyphs.npz
    python -m dfdask.bundled.train glyphs.npz out/
    python -m dfdask.bundled.measure glyphs.npz out/model
"""

from __future__ import annotations

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""What ``DiffusionPipeline.from_pretrained`` takes."""

ARGUMENTS: dict[str, int | float | bool] = {
    "num_inference_steps": 8,
    "guidance_scale": 3.0,
    # PixArt's bins start at 256 pixels: with binning its pipeline refuses a model of 128.
    "use_resolution_binning": False,
    # Else two warnings a call where beautifulsoup4 and ftfy are missing, and a dependence on them where not.
    "clean_caption": False,
}
"""The arguments that the model was measured with; only the resolution binning must stay as it is."""
