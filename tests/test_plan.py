"""Forecasts before anything runs: right where costs are known, plain about what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dfdask.cli import main
from dfdask.cost import CostModel, TaskWork
from dfdask.errors import SpecError
from dfdask.plan import forecast, parse_fleet
from dfdask.spec import JobSpec
from dfdask.stages.model import model_ref, with_defaults
from dfdask.stages.weights import cost_key

FAKE = {"fake": {"stages": {"encode": 0.05, "denoise": 0.4, "decode": 0.15}}}
STEPS = {"num_inference_steps": 2}
PROMPTS = [f"prompt {number}" for number in range(600)]


def test_known_seconds_give_the_time_of_the_fluid_optimum() -> None:
    found = forecast(JobSpec(model=FAKE, prompts=PROMPTS, batch=4, workers=8))
    assert found.seconds == pytest.approx(600 * 0.6 / 8, rel=1e-3)
    assert found.bound_seconds == pytest.approx(45) and found.deviation_seconds == 0
    assert sum(number for _, number in found.roles) == 8


def test_a_model_on_a_measured_device_is_predicted_with_doubt() -> None:
    found = forecast(JobSpec(model="bundled", prompts=PROMPTS, arguments=STEPS), "2xH100:80GB")
    assert found.seconds is not None and found.deviation_seconds > 0.05 * found.seconds and not found.measured
    assert any(label == "note" and "no measurement of this model yet" in text for label, text in found.rows())


def test_an_unknown_device_is_not_guessed_until_tasks_were_seen() -> None:
    spec = with_defaults(JobSpec(model="bundled", prompts=PROMPTS, arguments=STEPS, batch=8))
    assert forecast(spec, "2xmystery:80GB").seconds is None
    costs = CostModel()
    for stage, seconds in (("encode", 0.1), ("denoise", 1.0), ("decode", 0.2)):
        costs.observe(cost_key(spec, model_ref(spec)), stage, "mystery", TaskWork(8), seconds)
    found = forecast(spec, "2xmystery:80GB", costs)
    assert found.measured and found.seconds == pytest.approx(600 / 8 * 1.3 / 2, rel=0.05)


def test_a_job_for_gpus_is_planned_where_there_is_none() -> None:
    found = forecast(JobSpec(model="bundled", prompts=PROMPTS, arguments=STEPS, device="cuda"), "2xH100:1GB")
    on_any = forecast(JobSpec(model="bundled", prompts=PROMPTS, arguments=STEPS, dtype="bfloat16"), "2xH100:1GB")
    assert found.seconds is not None and found.seconds == pytest.approx(on_any.seconds)


def test_too_little_memory_is_named() -> None:
    found = forecast(JobSpec(model="bundled", prompts=PROMPTS, arguments=STEPS), "2xH100:0.002GB")
    assert "denoise" in found.impossible and found.seconds is None
    assert any(label == "impossible" for label, _ in found.rows())


def test_what_does_not_fit_as_a_whole_is_streamed_and_says_so() -> None:
    spec = JobSpec(model="bundled", prompts=PROMPTS, arguments=STEPS)
    found = forecast(spec, "2xH100:0.009GB")
    assert not found.impossible and found.seconds is not None
    assert any("denoise (streamed)" in text for label, text in found.rows() if label == "roles")
    large = forecast(spec, "2xH100:1GB")
    assert not any("streamed" in text for _, text in large.rows())


def test_fleets_are_read() -> None:
    fleet = parse_fleet("8xh100:80GB, l4:24GB")
    assert len(fleet) == 9 and fleet[0].device_class == "h100" and fleet[8].memory_bytes == 24e9
    assert len({device.name for device in fleet}) == 9
    for wrong in ("", "8x", "0xh100:80GB", "8xh100", "8xh100:80MB", "999999999xh100:80GB"):
        with pytest.raises(SpecError, match="--workers"):
            parse_fleet(wrong)


def test_the_command(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: {fake: {stages: {encode: 0.5, denoise: 4.0}}}\nprompts: [a, b, c, d]\nworkers: 2\n")
    result = CliRunner().invoke(main, ["plan", str(job)])
    assert result.exit_code == 0, result.output
    assert "time" in result.output and "9.0 s" in result.output
    result = CliRunner().invoke(main, ["plan", str(job), "--workers", "8xh100"])
    assert result.exit_code == 2 and "lacks its memory" in result.output and "Traceback" not in result.output
