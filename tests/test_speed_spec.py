"""``speed:`` of a job: checked to the letter, and part of what identifies a run."""

from __future__ import annotations

from typing import Any

import pytest

from dfdask.errors import SpecError
from dfdask.spec import JobSpec, diff_specs
from dfdask.stages.model import with_defaults

JOB: dict[str, Any] = {"model": "bundled", "prompts": ["a"]}


def test_a_job_without_speed_is_what_it_always_was() -> None:
    assert "speed" not in JobSpec(**JOB).canonical()
    assert "speed" not in JobSpec(**JOB, speed={}).canonical()


def test_speed_identifies_the_run() -> None:
    plain, fast = JobSpec(**JOB), JobSpec(**JOB, speed={"compile": True, "tf32": False})
    assert fast.canonical()["speed"] == {"compile": True, "tf32": False}
    assert diff_specs(plain.canonical(), fast.canonical()) == [
        "speed.compile: not set in the stored run, True now",
        "speed.tf32: not set in the stored run, False now",
    ] or diff_specs(plain.canonical(), fast.canonical()) == [
        "speed.compile: not set in the stored run, true now",
        "speed.tf32: not set in the stored run, false now",
    ]


def test_what_loses_detail_is_known() -> None:
    assert JobSpec(**JOB, speed={"compile": True, "attention": "native"}).speed.lossy == ()
    quantize = {"transformer": {"backend": "bitsandbytes_4bit", "options": {"bnb_4bit_quant_type": "nf4"}}}
    assert JobSpec(**JOB, speed={"quantize": quantize}).speed.lossy == ("quantize",)
    assert JobSpec(**JOB, speed={"first_block_cache": 0.1}).speed.lossy == ("first_block_cache",)


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        ({"compil": True}, r"speed.compil: unknown key, got True; did you mean|speed.compil: unknown key"),
        ({"compile": 1}, r"speed.compile: must be true or false, got 1"),
        ({"attention": "flash_hub"}, r"speed.attention: must be 'native'.* got"),
        ({"first_block_cache": 1.5}, r"speed.first_block_cache: .* got 1.5"),
        ({"first_block_cache": "0.1"}, r"speed.first_block_cache: must be a number"),
        (
            {"compile": True, "first_block_cache": 0.1},
            r"speed: `compile` and `first_block_cache` cannot be used together",
        ),
        ({"quantize": {"vae": {"backend": "gguf"}}}, r"speed.quantize.vae.backend: must be"),
        ({"quantize": {"vae": {}}}, r"speed.quantize.vae.backend: is missing"),
        ({"quantize": {"vae": {"backend": "torchao", "options": {"x": [1]}}}}, r"speed.quantize.vae.options.x"),
        (True, r"speed: must be a mapping, got True"),
    ],
)
def test_what_is_wrong_is_said(speed: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        JobSpec(**JOB, speed=speed)


def test_cuda_computes_in_bfloat16_unless_told_otherwise() -> None:
    assert with_defaults(JobSpec(**JOB)).dtype == "float32"
    assert with_defaults(JobSpec(**JOB, device="cuda")).dtype == "bfloat16"
    assert with_defaults(JobSpec(**JOB, device="cuda", dtype="float32")).dtype == "float32"
