"""What goes wrong in a model, and where its videos go, on real worker processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from safetensors.torch import load_file, save_file
from tiny_models import ARGUMENTS

from dfdask.errors import ModelError
from dfdask.run import submit
from dfdask.spec import JobSpec
from dfdask.stages.model import model_ref
from dfdask.stages.weights import component_bytes

Tiny = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2


def job(model: Path, tmp_path: Path, family: str, **more: Any) -> dict[str, Any]:
    arguments = {"num_inference_steps": 2, **ARGUMENTS[family]}
    output = str(tmp_path / "run")
    return {"model": str(model), "prompts": ["a", "b", "c"], "arguments": arguments, "output": output, **more}


def test_what_is_not_a_number_is_a_failed_item(client: Client, tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("sd"), tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    run = submit(job(model, tmp_path, "sd"), client=client).wait(timeout=100)
    errors = [failure["error"] for failure in run.failures()]
    assert errors == ["decode: FloatingPointError: the output is not finite (NaN or infinity)"] * 3
    data = run.dataset().load()
    assert data["status"].values.tolist() == [2, 2, 2] and not data["image"].values.any()


def test_a_component_that_is_not_there_makes_no_run(client: Client, tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("sd"), tmp_path / "model")
    shutil.rmtree(model / "unet")
    with pytest.raises(ModelError, match="lacks its component 'unet'"):
        submit(job(model, tmp_path, "sd"), client=client)
    assert not (tmp_path / "run").exists()


def test_a_device_that_does_not_hold_a_stage_as_a_whole_gets_it_all_the_same(tmp_path: Path) -> None:
    spec = {"model": "bundled", "prompts": ["a", "b", "c"], "output": str(tmp_path / "run")}
    weights = component_bytes(model_ref(JobSpec(**spec))).whole
    memory = sum(weights["denoise"].values()) - 1
    assert all(sum(weights[stage].values()) < memory for stage in ("encode", "decode"))
    run = submit({**spec, "workers": [{"count": 1, "device_class": "short", "memory": memory}]}).wait(timeout=100)
    assert run.progress.phase == "finished" and not run.failures()


def received(dask_worker: Any) -> dict[str, int]:
    """Bytes that a worker got from others, by the stage whose result they are."""
    found: dict[str, int] = {}
    for transfer in dask_worker.transfer_incoming_log:
        for key, size in transfer["keys"].items():
            stage = str(key[0] if isinstance(key, tuple) else key).split("-")[0]
            found[stage] = found.get(stage, 0) + size
    return found


def test_frames_stay_where_they_are_decoded(client: Client, tiny: Tiny, tmp_path: Path) -> None:
    client.run(lambda dask_worker: dask_worker.transfer_incoming_log.clear())
    run = submit(job(tiny("wan"), tmp_path, "wan", batch=1, shard=1), client=client).wait(timeout=100)
    assert run.dataset()["video"].shape == (3, 5, 16, 16, 3) and run.dataset()["video"].values.any()
    by_stage: dict[str, int] = {}
    for worker in client.run(received).values():
        for stage, size in worker.items():
            by_stage[stage] = by_stage.get(stage, 0) + size
    assert set(by_stage) == {"encode", "denoise"}, "to the other process and back, and no further"
    assert all(size > 0 for size in by_stage.values())
