"""One memory-short GPU against a large one: dfdask's job under a cap, and what plain diffusers makes of the same.

python tests/bench/gpu_job.py --model flux --folder /dev/shm/flux [--prompts 64] [--seconds 560] [--out RESULTS]

Weights are random, at the shapes of the real model. Every variant runs in a process of its own; rows are printed and
written as they come, and what does not fit into the seconds that are left is skipped, and said so. Where a variant is
slow it runs a few steps, and its row says ``scaled``: seconds = short call + steps left out x seconds a step.
``--tiny --device cpu`` runs all of it on a CPU with the tests' tiny models, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

GIB = 2**30
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"height": 1024, "width": 1024, "guidance_scale": 3.5, "max_sequence_length": 512},
    "sdxl": {"height": 1024, "width": 1024, "guidance_scale": 5.0},
    "sd35": {"height": 1024, "width": 1024, "guidance_scale": 4.5, "max_sequence_length": 256},
    "wan": {"height": 480, "width": 832, "num_frames": 33, "guidance_scale": 5.0, "max_sequence_length": 512},
}
TINY = {"flux": "flux", "sdxl": "sd", "sd35": "sd3", "wan": "wan"}
BATCHES = {"flux": (1, 4, 8), "sdxl": (1, 4, 8), "sd35": (1, 2, 4), "wan": (1, 2)}
# Each with the least seconds that it needs, so that it is not begun in vain.
VARIANTS = {
    "residency": 45,
    "plain": 45,
    "job": 60,
    "group": 60,
    "model_offload": 60,
    "group_no_record": 60,
    "group_no_stream": 60,
    "sequential_offload": 60,
    "job_uncapped": 60,
}


def row(**values: Any) -> None:
    print("ROW", json.dumps(values), flush=True)


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def cap(options: argparse.Namespace) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(
            options.cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        )


def call_arguments(options: argparse.Namespace) -> dict[str, Any]:
    if options.tiny:
        import tiny_models

        return dict(tiny_models.ARGUMENTS[TINY[options.model]])
    return CALLS[options.model]


def dtype(options: argparse.Namespace) -> str:
    return "bfloat16" if options.device == "cuda" else "float32"


# -- plain diffusers


def pipeline(options: argparse.Namespace) -> Any:
    import diffusers
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    made = diffusers.DiffusionPipeline.from_pretrained(options.folder, torch_dtype=getattr(torch, dtype(options)))
    made.set_progress_bar_config(disable=True)
    return made


def timed_call(made: Any, options: argparse.Namespace, batch: int, steps: int) -> float:
    import torch

    generators = [torch.Generator("cpu").manual_seed(number) for number in range(batch)]
    prompts = [f"a photo of {number} red apples on a table" for number in range(batch)]
    synchronise()
    began = time.perf_counter()
    made(prompt=prompts, num_inference_steps=steps, generator=generators, output_type="np", **call_arguments(options))
    synchronise()
    return time.perf_counter() - began


def measure(name: str, made: Any, options: argparse.Namespace, batches: Any, whole: int = 0) -> None:
    """A row for each batch size: ``whole`` calls of all steps, or else two short ones."""
    import torch

    for batch in batches:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            first = timed_call(made, options, batch, 2)
            if whole and batch == 1:
                each = [timed_call(made, options, batch, options.steps) for _ in range(whole)]
                row(variant=name, batch=batch, seconds_per_item=min(each), calls=each, scaled=False, **memory())
                continue
            few = timed_call(made, options, batch, 2)
            more = timed_call(made, options, batch, 6) if few < 30 else None
            step = ((more or 0) - few) / 4 if more else few / 2
            seconds = few + (options.steps - 2) * step
            row(
                variant=name,
                batch=batch,
                seconds_per_item=seconds / batch,
                seconds_per_step=step,
                first_call_seconds=first,
                scaled=True,
                note="" if more else "a step is taken for half a call of two: too slow for more",
                **memory(),
            )
        except torch.OutOfMemoryError as error:
            row(variant=name, batch=batch, failed=str(error)[:160])
            gc.collect()
            torch.cuda.empty_cache()


def denoiser(made: Any) -> Any:
    return getattr(made, "transformer", None) or made.unet


def plain(options: argparse.Namespace) -> None:
    """Everything on the device, no cap: what a large GPU does."""
    began = time.perf_counter()
    made = pipeline(options).to(options.device)
    row(variant="plain load", seconds=time.perf_counter() - began)
    measure("plain, resident, uncapped", made, options, BATCHES[options.model][:2], whole=2)


def offload_groups(made: Any, options: argparse.Namespace, stream: bool, record: bool) -> None:
    """Diffusers' group offload of the denoiser and the large text encoders; the rest on the device."""
    import torch
    from diffusers.hooks import apply_group_offloading

    settings: dict[str, Any] = {"onload_device": torch.device(options.device), "use_stream": stream}
    settings.update(record_stream=record, non_blocking=options.device == "cuda")
    for component, part in made.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        size = sum(parameter.nbytes for parameter in part.parameters())
        if part is denoiser(made) or size > 4 * GIB:
            # Block level takes lists right below the model; text encoders and UNets have theirs further down.
            kind = "block_level" if component.startswith("transformer") else "leaf_level"
            apply_group_offloading(part, offload_type=kind, num_blocks_per_group=1, **settings)
        else:
            part.to(options.device)
    if hasattr(made.vae, "enable_slicing"):
        made.vae.enable_slicing()


def group(options: argparse.Namespace, stream: bool = True, record: bool = True) -> None:
    """Diffusers' group offload, at each batch size, under the cap."""
    cap(options)
    made = pipeline(options)
    began = time.perf_counter()
    stream = stream and options.device == "cuda"
    record = record and stream
    offload_groups(made, options, stream, record)
    row(variant="group offload load", seconds=time.perf_counter() - began)
    name = f"diffusers group offload, stream={stream}, record_stream={record}, capped"
    measure(name, made, options, BATCHES[options.model] if stream else (1,))


def model_offload(options: argparse.Namespace) -> None:
    cap(options)
    made = pipeline(options)
    if options.device != "cuda":
        return row(variant="model offload", skipped="accelerate's offloading needs a GPU")
    made.enable_model_cpu_offload()
    if hasattr(made.vae, "enable_slicing"):
        made.vae.enable_slicing()
    measure("diffusers model offload, capped", made, options, (1, 4))


def sequential_offload(options: argparse.Namespace) -> None:
    cap(options)
    made = pipeline(options)
    if options.device != "cuda":
        return row(variant="sequential offload", skipped="accelerate's offloading needs a GPU")
    made.enable_sequential_cpu_offload()
    measure("diffusers sequential offload, capped", made, options, (1,))


# -- dfdask


def residency(options: argparse.Namespace) -> None:
    """Where weights are and what moving them costs, in one process under the cap, without Dask."""
    import torch

    from dfdask.items import Item
    from dfdask.spec import JobSpec
    from dfdask.stages.batch import Batch, run_batch
    from dfdask.stages.model import model_ref
    from dfdask.stages.residency import held_stage

    set_budget(options)
    ref = model_ref(JobSpec(model=options.folder, prompts=["x"], dtype=dtype(options), device=options.device))
    held, state = {}, {}
    batches = BATCHES[options.model][:2]
    for batch in batches:
        call = {**call_arguments(options), "num_inference_steps": 3}
        items = [Item(number, f"i{number}", f"apple {number}", number, call) for number in range(batch)]
        work = Batch.start(items)
        for name in ("encode", "denoise", "decode"):
            began = time.perf_counter()
            held[name] = held_stage(ref, name)
            read = time.perf_counter() - began
            held[name].prepare(items)
            switch = held[name].switch_seconds
            began = time.perf_counter()
            state[batch, name] = work
            work = run_batch(name, held[name], work)
            first = time.perf_counter() - began
            held[name].prepare(items)
            began = time.perf_counter()
            run_batch(name, held[name], state[batch, name])
            synchronise()
            again = time.perf_counter() - began
            row(
                variant=f"dfdask stage {name}, capped",
                batch=batch,
                load_from_disk_seconds=read,
                switch_seconds=switch,
                first_seconds=first,
                seconds=again,
                seconds_per_step=again / 3 if name == "denoise" else None,
                device_seconds=held[name].device_seconds,
                working_gib=held[name].peak_bytes / GIB,
                streamed_blocks=sum(len(weights.streamed) for weights in held[name].weights),
                blocks=sum(len(weights.block_bytes) for weights in held[name].weights),
                groups=[len(group.items) for group in work.groups],
                **memory(),
            )
    largest = max(held["denoise"].weights, key=lambda weights: weights.nbytes)
    for place in ([], range(len(largest.block_bytes))):
        for weights in (weights for stage in held.values() for weights in stage.weights):
            weights.drop()
        synchronise()
        began = time.perf_counter()
        try:
            largest.place(tuple(place))
            synchronise()
            row(
                variant=f"switch: denoiser {'streamed' if place else 'resident'} from host memory",
                seconds=time.perf_counter() - began,
                gigabytes=largest.nbytes / 1e9,
            )
        except torch.OutOfMemoryError as error:
            row(variant="switch", failed=str(error)[:100])
        began = time.perf_counter()
        largest.drop()
        row(variant="switch: denoiser dropped", seconds=time.perf_counter() - began)
    for batch in batches:
        streamed_pass(held["denoise"], largest, state[batch, "denoise"], batch, options)


def streamed_pass(held: Any, largest: Any, work: Any, batch: int, options: argparse.Namespace) -> None:
    """A step with every block streamed, as diffusers' group offload does it."""
    import torch

    for weights in held.weights:
        weights.place(tuple(range(len(weights.block_bytes))) if weights is largest else ())
    try:
        with torch.no_grad():
            for group in work.groups:
                held.stage.run(group.items, group.state)
            synchronise()
            began = time.perf_counter()
            for group in work.groups:
                held.stage.run(group.items, group.state)
            synchronise()
        row(variant="dfdask, all blocks streamed", batch=batch, seconds_per_step=(time.perf_counter() - began) / 3)
    except torch.OutOfMemoryError as error:
        row(variant="dfdask, all blocks streamed", batch=batch, failed=str(error)[:100])


def set_budget(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        os.environ["DFDASK_MEMORY_BYTES"] = str(int(options.cap_gib * GIB))
    os.environ["DFDASK_HOST_MEMORY_BYTES"] = str(90 * GIB)


def trace_plugin() -> Any:
    """On the scheduler: what each stage task reported."""
    from distributed.diagnostics.plugin import SchedulerPlugin

    class Plugin(SchedulerPlugin):  # type: ignore[misc]
        name = "bench-trace"

        def __init__(self) -> None:
            self.rows: list[Any] = []

        def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
            if start == "processing" and finish == "memory":
                told = (kwargs.get("metadata") or {}).get("dfdask")
                if told and "seconds" in told:
                    stage = key[0].rpartition("-")[0]
                    moves = [entry for entry in kwargs.get("startstops") or () if entry["action"] == "transfer"]
                    place = {"worker": kwargs.get("worker"), "nbytes": kwargs.get("nbytes") or 0}
                    place["transfer_seconds"] = sum(entry["stop"] - entry["start"] for entry in moves)
                    self.rows.append({"stage": stage, "items": key[3], **told, **place, "key": list(key)})

    return Plugin()


def job(options: argparse.Namespace, capped: bool = True) -> None:
    """The prompts as a dfdask job with one real worker process, which takes turns between the stages."""
    from distributed import Client

    import dfdask
    from dfdask.cluster import LocalFleet

    if capped:
        set_budget(options)
    else:
        os.environ["DFDASK_HOST_MEMORY_BYTES"] = str(90 * GIB)
    name = "dfdask job, capped" if capped else "dfdask job, uncapped"
    prompts = [f"a photo of {number} red apples on a table" for number in range(options.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        fleet = LocalFleet(1)
        client = Client(fleet.address, set_as_default=False)
        client.register_plugin(trace_plugin())
        spec: dict[str, Any] = {
            "model": options.folder,
            "dtype": dtype(options),
            "device": options.device,
            "arguments": {**call_arguments(options), "num_inference_steps": 2},
        }
        began = time.perf_counter()
        dfdask.submit(spec, prompts=prompts[:16], output=f"{folder}/warm", client=client).wait()
        row(variant=f"{name}: start, load and first calls of two steps", seconds=time.perf_counter() - began)
        client.run_on_scheduler(_clear)
        spec["arguments"]["num_inference_steps"] = options.steps
        busy = Utilisation()
        began = time.perf_counter()
        run = dfdask.submit(spec, prompts=prompts, output=f"{folder}/run", client=client).wait()
        wall = time.perf_counter() - began
        busy.stop()
        rows = client.run_on_scheduler(_rows)
        peaks = client.run(memory)
        residencies = client.run(residency_report)
        failed = run.progress.failed_items
        client.close()
        fleet.close()
    row(
        variant=name,
        seconds_per_item=wall / options.prompts,
        prompts=options.prompts,
        failed=failed,
        scaled=False,
        **stage_times(rows),
        **busy.figures(),
        **next(iter(peaks.values())),
    )
    for entry in next(iter(residencies.values())):
        row(variant=f"{name}: {entry.pop('stage')}", **{key: entry[key] for key in entry if key != "block_bytes"})
    if options.out:
        (Path(options.out) / f"trace-{options.model}-{'capped' if capped else 'uncapped'}.json").write_text(
            json.dumps(rows)
        )


def residency_report() -> list[dict[str, Any]]:
    from dfdask.stages.residency import report

    return report()


def _clear(dask_scheduler: Any) -> None:
    dask_scheduler.plugins["bench-trace"].rows.clear()


def _rows(dask_scheduler: Any) -> list[Any]:
    return list(dask_scheduler.plugins["bench-trace"].rows)


def stage_times(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums by stage, and the part of the time from the first task to the last in which the device did nothing."""
    found: dict[str, Any] = {"stages": {}}
    for told in rows:
        sums = found["stages"].setdefault(
            told["stage"], {"items": 0, "seconds": 0.0, "device_seconds": 0.0, "switch_seconds": 0.0, "calls": 0}
        )
        sums["items"] += told["items"]
        sums["calls"] += 1
        sums["seconds"] += told["seconds"]
        switch, facts = told.get("load_seconds", 0.0), told.get("facts", {})
        sums["device_seconds"] += facts.get("device_seconds", 0.0)
        sums["batch"] = max(facts.get("batch", 0), sums.get("batch", 0))
        sums["working_gib"] = max(facts.get("peak_bytes", 0) / GIB, sums.get("working_gib", 0))
        sums["streamed_blocks"] = facts.get("streamed_blocks", 0)
        sums["switch_seconds"] += switch
        sums["longest_switch_seconds"] = max(switch, sums.get("longest_switch_seconds", 0))
    if rows:
        first = min(told["start"] for told in rows)
        last = max(told["start"] + told["seconds"] for told in rows)
        working = sum(told["seconds"] for told in rows)
        switching = sum(told.get("load_seconds", 0.0) for told in rows)
        found["task_span_seconds"] = last - first
        found["idle_share"] = 1 - (working + switching) / max(last - first, 1e-9)
        device = sum(told.get("facts", {}).get("device_seconds", 0.0) for told in rows)
        found["idle_share_by_device"] = 1 - device / max(last - first, 1e-9)
        found["switch_share"] = switching / max(last - first, 1e-9)
    return found


def visible_gpus(count: int) -> list[str]:
    """The first of this process's GPUs, as CUDA_VISIBLE_DEVICES names them: the driver's own count is of them all."""
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (given or [str(number) for number in range(count)])[:count]


class Utilisation:
    """How much of the time a kernel ran, by the driver's own count, sampled ten times a second."""

    def __init__(self, gpu: int = 0) -> None:
        self._device = visible_gpus(gpu + 1)[gpu]
        self._samples: list[int] = []
        self._used = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            by_index = self._device.isdigit()
            device = (
                pynvml.nvmlDeviceGetHandleByIndex(int(self._device))
                if by_index
                else pynvml.nvmlDeviceGetHandleByUUID(self._device)
            )
        except Exception:
            return
        while not self._stop.wait(0.1):
            self._samples.append(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)
            self._used = max(self._used, pynvml.nvmlDeviceGetMemoryInfo(device).used)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self) -> dict[str, Any]:
        if not self._samples:
            return {}
        return {
            "gpu_busy_share": sum(self._samples) / len(self._samples) / 100,
            "device_used_gib": round(self._used / GIB, 2),
        }


def quiet() -> None:
    import logging
    import warnings

    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


RUNS: dict[str, Callable[[argparse.Namespace], None]] = {
    "residency": residency,
    "plain": plain,
    "job": job,
    "job_uncapped": lambda options: job(options, capped=False),
    "group": group,
    "group_no_record": lambda options: group(options, record=False),
    "group_no_stream": lambda options: group(options, stream=False),
    "model_offload": model_offload,
    "sequential_offload": sequential_offload,
}


def run_all(
    options: argparse.Namespace, least_seconds: Mapping[str, float] = VARIANTS, script: str = __file__
) -> list[dict[str, Any]]:
    """Every variant in a process of its own, as far as the seconds go; what it leaves behind is ended with it."""
    from gpu_models import save

    prefix = "" if script == __file__ else f"{Path(script).stem}-"
    deadline = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []

    def keep(**values: Any) -> None:
        rows.append(values)
        print(format_row(values), flush=True)
        if options.out:
            path = Path(options.out) / f"{prefix}{options.model}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"options": {**vars(options)}, "machine": machine(), "rows": rows}, indent=1))

    began = time.perf_counter()
    if not (Path(options.folder) / "model_index.json").exists():
        save(options.model, Path(options.folder), options.tiny)
        keep(variant="write the model", seconds=time.perf_counter() - began)
    for name in options.only.split(",") if options.only else least_seconds:
        left = deadline - time.monotonic()
        if left < least_seconds[name] and not options.tiny:
            keep(variant=name, skipped=f"{left:.0f} s left, {least_seconds[name]:.0f} s needed")
            continue
        command = [sys.executable, "-u", script, *sys.argv[1:], "--variant", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            timer = threading.Timer(max(left, 1), _end_session, [process.pid])
            timer.start()
            for line in process.stdout or ():
                if line.startswith("ROW "):
                    keep(**json.loads(line[4:]))
                else:
                    print(line, end="", flush=True)
            timer.cancel()
            process.wait()
            _end_session(process.pid)
        if process.returncode:
            keep(variant=name, failed=f"exit {process.returncode}")
    return rows


def _end_session(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def machine() -> dict[str, Any]:
    import diffusers
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__}


def format_row(values: dict[str, Any]) -> str:
    parts = [f"{values['variant']:62}"]
    for name, value in values.items():
        if name != "variant" and value not in (None, ""):
            parts.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(parts)


def arguments(description: str | None, variants: Iterable[str], runs: Iterable[str]) -> argparse.ArgumentParser:
    """The options of this benchmark, and of others that run variants of a model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CALLS), default="flux")
    parser.add_argument("--folder", required=True, help="where the model is, or is written")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cap-gib", type=float, default=24)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help=f"of {', '.join(variants)}")
    parser.add_argument("--out", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--variant", choices=list(runs), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = arguments(__doc__, VARIANTS, RUNS).parse_args()
    if options.variant:
        quiet()
        RUNS[options.variant](options)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
