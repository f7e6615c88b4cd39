"""Jobs on real worker processes, from submitting to the data: what is computed, what is kept, what is said."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from fleet import ROOT, family, until
from tiny_models import ARGUMENTS, SIZE, monolithic

from dfdask.batching import micro_batches
from dfdask.errors import ModelError, SpecError, StorageError
from dfdask.prompts import read_items
from dfdask.run import Run, open_run, submit
from dfdask.spec import JobSpec
from dfdask.stages.fake import fake_pixels
from dfdask.stages.model import model_ref
from dfdask.store_events import read_events
from dfdask.store_objects import Objects

PROMPTS = ["a red Apple", "two dogs, 1 cat", "nothing but the sea"]
Tiny = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' DPM solver, with numpy 2


@pytest.fixture(autouse=True)
def strict_settings() -> Iterator[None]:
    """As strict workers have them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job(model: Any, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompts": PROMPTS, "output": str(tmp_path / "run"), "batch": 2, "shard": 2, **more}


def fake(tmp_path: Path, items: int = 12, fields: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    prompts = [{"prompt": f"prompt {number}", "id": f"item-{number}"} for number in range(items)]
    return job({"fake": dict(fields or {})}, tmp_path, **{"prompts": prompts, **more})


def check_pixels(run: Run, spec: JobSpec) -> None:
    """Each micro-batch bit for bit as one call of the pipeline makes it."""
    table, ref = read_items(spec), model_ref(spec)
    items = table.items(0, len(table))
    data = run.dataset().load()
    stored = data["video" if "video" in data else "image"].values
    layout = run.store.layout
    done, batch = 0, run.store.attributes["dfdask"]["batch"]
    for start in range(0, len(items), layout.shard_items):
        for micro in micro_batches(0, items[start : start + layout.shard_items], batch):
            together = [items[row] for row in micro.items]
            lists: dict[str, list[Any]] = defaultdict(list)
            for item in together:
                for name, value in item.arguments.items():
                    if "prompt" in name:
                        lists[name].append(value)
            for item, picture in zip(together, monolithic(ref, together, **lists), strict=True):
                room = stored[item.index]
                assert np.array_equal(room[tuple(map(slice, picture.shape))], picture), item.id
                assert room.sum() == picture.sum(), "what the picture does not fill is black"
                done += 1
    assert done == len(items) and (data["status"].values == 1).all()


@pytest.mark.parametrize("family", sorted(ARGUMENTS))
def test_a_strict_job_makes_what_the_pipeline_makes(client: Client, tiny: Tiny, tmp_path: Path, family: str) -> None:
    spec = JobSpec.from_mapping(
        job(str(tiny(family)), tmp_path, strict=True, arguments={"num_inference_steps": 2, **ARGUMENTS[family]})
    )
    check_pixels(submit(spec, client=client).wait(60), spec)


@pytest.mark.parametrize("family", ["sd3", "pixart_sigma"])
def test_bfloat16_goes_from_process_to_process(client: Client, tiny: Tiny, tmp_path: Path, family: str) -> None:
    arguments = {"num_inference_steps": 2, **ARGUMENTS[family]}
    spec = JobSpec.from_mapping(job(str(tiny(family)), tmp_path, strict=True, dtype="bfloat16", arguments=arguments))
    check_pixels(submit(spec, client=client).wait(60), spec)


@pytest.mark.parametrize("family", ["pixart_alpha", "sd"])
def test_items_have_sizes_texts_and_numbers_of_their_own(
    client: Client, tiny: Tiny, tmp_path: Path, family: str
) -> None:
    own: list[dict[str, Any]] = [{}, {"width": 2 * SIZE}, {"negative_prompt": "blurry"}, {"guidance_scale": 1.0}]
    prompts = [{"prompt": f"{prompt} {number}", **own[number % 4]} for number, prompt in enumerate(PROMPTS * 3)]
    prompts[4]["negative_prompt"] = "dark"
    arguments = {"num_inference_steps": 2, **ARGUMENTS[family]}
    spec = JobSpec.from_mapping(
        job(
            str(tiny(family)),
            tmp_path,
            strict=True,
            prompts=prompts,
            images_per_prompt=2,
            batch=4,
            shard=10,
            arguments=arguments,
        )
    )
    run = submit(spec, client=client).wait(60)
    check_pixels(run, spec)
    data = run.dataset()
    assert data["image"].shape == (18, SIZE, 2 * SIZE, 3)
    assert sorted(set(data["width"].values.tolist())) == [SIZE, 2 * SIZE]
    assert len({picture.tobytes() for picture in data["image"].values}) == 18


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_an_item_that_fails_costs_one_row(client: Client, tmp_path: Path, stage: str) -> None:
    fields = {"fail": ["item-3", "item-8"], "fail_stage": stage, "handoff_bytes": 5}
    run = submit(fake(tmp_path, fields=fields, batch=5, shard=5), client=client).wait(30)
    data = run.dataset().load()
    for row in range(12):
        if row in (3, 8):
            assert data["status"].values[row] == 2 and not data["image"].values[row].any()
            assert data["error"].values[row] == f"{stage}: RuntimeError: fake failure of item-{row}"
        else:
            assert data["status"].values[row] == 1 and data["error"].values[row] == ""
            assert np.array_equal(data["image"].values[row], fake_pixels(int(data["seed"].values[row]), 8, 8))
    assert [(row["item"], row["id"]) for row in run.failures()] == [(3, "item-3"), (8, "item-8")]
    assert run.progress.failed_items == 2 and run.progress.phase == "finished"


def test_a_job_that_is_stopped_goes_on_where_it_was(client: Client, tmp_path: Path) -> None:
    spec = fake(tmp_path, items=120, fields={"stages": {"encode": 0.0, "denoise": 0.05, "decode": 0.0}})
    seen: list[int] = []
    run = submit(spec, client=client, on_commit=lambda event: seen.append(event.shard))
    until(lambda: seen, 20, "a commit")
    run.stop()
    run.wait(30)
    assert run.progress.phase == "stopped" and 0 < run.progress.committed_shards < 60
    before = {int(commit["shard"]) for commit in run.store.commits()}
    assert before == set(seen)
    again: list[int] = []
    done = submit(spec, client=client, on_commit=lambda event: again.append(event.shard)).wait(30)
    assert sorted([*seen, *again]) == list(range(60)) and done.progress.phase == "finished"
    assert done.progress.resumed_items == 2 * len(seen)
    third = submit(spec, client=client, on_commit=lambda event: again.append(event.shard)).wait(30)
    assert third.progress.phase == "finished" and len(again) == 60 - len(seen)
    assert open_run(tmp_path / "run").progress.phase == "finished"


def test_an_observer_that_fails_stops_nothing(client: Client, tmp_path: Path) -> None:
    def observe(event: Any) -> None:
        raise KeyError("mine")

    with pytest.warns(UserWarning, match="on_commit raised KeyError"):
        run = submit(fake(tmp_path), client=client, on_commit=observe).wait(30)
    assert run.progress.phase == "finished"


def test_too_little_memory_says_so(client: Client, tmp_path: Path) -> None:
    from dfdask.errors import ClusterError

    run = submit(fake(tmp_path, fields={"handoff_bytes": 1 << 60}), client=client)
    with pytest.raises(ClusterError, match=r"encode: worker .* too little memory for 2 items .* smaller `batch`"):
        run.wait(30)
    assert run.progress.phase == "failed"


def test_what_the_pipeline_refuses_makes_no_run(client: Client, tiny: Tiny, tmp_path: Path) -> None:
    spec = job(str(tiny("sd")), tmp_path, arguments={"height": 60})
    with pytest.raises(SpecError, match=r"arguments.height: 60 pixels"):
        submit(spec, client=client)
    assert not (tmp_path / "run").exists()
    assert submit(fake(tmp_path), client=client).wait(30).progress.phase == "finished", "the user's client stays open"


def test_an_output_that_goes_away_says_so(client: Client, tmp_path: Path) -> None:
    spec = fake(tmp_path, items=40, fields={"stages": {"encode": 0.0, "denoise": 0.05, "decode": 0.0}})
    run = submit(spec, client=client)
    until(lambda: list((tmp_path / "run/commits").glob("0*")), 20, "a commit")
    (tmp_path / "run").rename(tmp_path / "gone")  # at once: workers are writing
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError):
        run.wait(30)


@pytest.fixture
def damaged(tiny: Tiny, tmp_path: Path) -> Path:
    """A model whose VAE has numbers of a kind that does not exist; nobody sees that before it is loaded."""
    folder = Path(shutil.copytree(tiny("sd"), tmp_path / "model"))
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F33"', 1))
    return folder


def test_a_model_that_was_cut_short_makes_no_run(client: Client, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("sd"), tmp_path / "model"))
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"vae/.* cannot be loaded: .* bytes where its head announces"):
        submit(job(str(folder), tmp_path, arguments={"num_inference_steps": 1, **ARGUMENTS["sd"]}), client=client)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_loaded_says_so(client: Client, damaged: Path, tmp_path: Path) -> None:
    spec = job(str(damaged), tmp_path, arguments={"num_inference_steps": 1, **ARGUMENTS["sd"]})
    with pytest.raises(ModelError, match=r"vae \(AutoencoderKL\) cannot be loaded.*0 of 2 shards are committed"):
        submit(spec, client=client).wait(60)


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dfdask", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it puts into the background with interrupts ignored, the tests too.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_a_users_mistake_shows_no_traceback(damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"model: {damaged}\nprompts: [a cat, a dog]\nworkers: 1\nbatch: 1\nshard: 1\n"
        f"arguments: {{num_inference_steps: 1, height: {SIZE}, width: {SIZE}}}\n"
    )
    process = command(tmp_path, "run", "job.yaml")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2, out + err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: model: ") and "cannot be loaded" in lines[0], err
    assert "Traceback" not in out and "distributed" not in out, out


def test_ctrl_c_while_the_cluster_starts_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: {fake: {stages: {generate: 90.0}}}\nprompts: [a cat]\nworkers: 2\n")
    process = command(tmp_path, "run", "job.yaml")
    try:
        until(lambda: len(family(process.pid)) > 2, 60, "the first worker processes")
        below = family(process.pid)[1:]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err, out + err
    end = time.monotonic() + 10
    while any(one.is_running() for one in below):
        assert time.monotonic() < end, "processes outlived the command"
        time.sleep(0.05)


def test_an_item_that_kills_its_workers_costs_one_row(tmp_path: Path) -> None:
    spec = fake(tmp_path, items=16, fields={"kill": ["item-5"], "handoff_bytes": 5}, batch=4, shard=8, workers=3)
    run = submit(spec).wait(60)
    data = run.dataset().load()
    good = [row for row in range(16) if row != 5]
    assert data["status"].values[good].tolist() == [1] * 15 and set(data["error"].values[good]) == {""}
    for row in good:
        assert np.array_equal(data["image"].values[row], fake_pixels(int(data["seed"].values[row]), 8, 8))
    (failure,) = run.failures()
    assert (failure["item"], failure["id"]) == (5, "item-5")
    assert failure["error"] == "denoise: given up: its worker died 3 times"
    assert run.progress.phase == "finished" and run.progress.failed_items == 1
    events = read_events(Objects(run.location))
    (found,) = [event for event in events if event["event"] == "ItemQuarantined"]
    assert (found["item"], found["stage"], found["kills"]) == (5, "denoise", 3)
    assert sum(event["event"] == "WorkerLeft" for event in events) == 3, "one death for each kill"


def test_a_shard_is_written_while_the_next_is_computed(tmp_path: Path) -> None:
    """With one thread it waits for the end of the next call. Stages have only one thread, however many there are."""
    cluster = LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0", silence_logs="ERROR")
    with cluster, Client(cluster, set_as_default=False) as client:
        spec = fake(tmp_path, items=5, fields={"stages": {"generate": 1.0}}, batch=1, shard=1)
        run = submit(spec, client=client).wait(60)
    calls = [event for event in read_events(Objects(run.location)) if event["event"] == "TaskDone"]
    starts, ends = sorted(call["start"] for call in calls), sorted(call["start"] + call["seconds"] for call in calls)
    written = sorted(commit["written"] for commit in run.store.commits())
    for shard in range(4):
        assert ends[shard] <= written[shard] < ends[shard + 1]
        assert ends[shard] <= starts[shard + 1] + 0.01, "one stage task at a time"


def test_an_address_is_no_client() -> None:
    with pytest.raises(SpecError, match=r"client: must be a distributed.Client, got 'tcp://x:1'; .* `scheduler`"):
        submit(model={"fake": {}}, prompts=["a"], client="tcp://x:1")  # type: ignore[arg-type]


def test_the_noise_scheduler_may_be_a_keyword_beside_a_client(client: Client, tiny: Tiny, tmp_path: Path) -> None:
    fields = job(str(tiny("sd")), tmp_path, arguments={"num_inference_steps": 2, **ARGUMENTS["sd"]})
    run = submit(fields, client=client, scheduler={"class": "EulerDiscreteScheduler"}).wait(60)
    assert run.spec["scheduler"]["class"] == "EulerDiscreteScheduler"
    with pytest.raises(SpecError, match="there is a client already, got 'tcp://127.0.0.1:1' too"):
        submit(fields, client=client, scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_program_that_ends_before_its_job_stops_it(tmp_path: Path, interrupted: bool) -> None:
    fields = fake(tmp_path, items=400, fields={"stages": {"encode": 0.0, "denoise": 0.05}}, workers=1)
    wait = "os.kill(os.getpid(), signal.SIGINT); run.wait()" if interrupted else ""
    script = f"""
import dfdask, os, signal, time
if __name__ == "__main__":
    run = dfdask.submit(**{fields!r})
    while not run.progress.committed_items:
        time.sleep(0.05)
    {wait}
"""
    (tmp_path / "script.py").write_text(script)
    told = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert told.stderr.count("Traceback") == interrupted, told.stderr
    assert "the program ends before its job, which is stopped" in told.stderr
    run = open_run(fields["output"])
    assert 0 < run.progress.committed_items < 400 and run.store.verify() == []
    assert run.store.last_end()["reason"] == "stopped"


def test_a_complete_run_needs_no_cluster(tmp_path: Path) -> None:
    fields = fake(tmp_path, items=4)
    submit(fields, workers=1).wait(60)
    again = submit(fields, scheduler="tcp://127.0.0.1:1").wait(60)  # nobody is there, and nobody is asked
    assert (again.progress.phase, again.progress.resumed_items, again.failures()) == ("finished", 4, [])
