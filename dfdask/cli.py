"""The command line: ``dfdask run``, ``inspect``, ``status``, ``show``, ``export``, ``scheduler`` and ``worker``.

Nothing heavy is imported before a command needs it: ``dfdask --help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dfdask import __version__
from dfdask.errors import DfdaskError, SpecError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from dfdask.spec import JobSpec
    from dfdask.store import RunStore

INTERRUPTED = 130
_RUN_HELP = "RUN is a job file, TARGET/NAME, or the path of a run."


class _Commands(click.Group):
    """Turns everything that a user can mend into ``Error: ...`` and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DfdaskError as error:
            _fail(ctx, str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; everything committed is kept", INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `dfdask show RUN | head`: click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{where}{error.strerror or error}", StorageError.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dfdask")
def main() -> None:
    """Make images and videos in bulk with diffusers pipelines on a Dask cluster.

    Exit codes: 0 the run is complete; 1 every item failed; 2 the command, the job, its prompts or its model
    are not valid; 3 storage; 4 the cluster; 130 stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a prompt in a script that it lacks


@main.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--scheduler", metavar="ADDRESS", help="Use the cluster of this scheduler, e.g. tcp://10.0.0.1:8786.")
@click.option("--workers", type=click.IntRange(min=1), help="Local worker processes [default: the job's].")
@click.option("--output", metavar="TARGET/NAME", help="Where the run goes, instead of the job's `output`.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts to use instead of the job's.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first prompts.")
@click.option("--new-run", is_flag=True, help="Start a run of its own where one of that name exists.")
@click.option("--plain", is_flag=True, help="Lines instead of the live view, as for logs.")
def run(
    job: Path,
    scheduler: str | None,
    workers: int | None,
    output: str | None,
    prompts: Path | None,
    limit: int | None,
    new_run: bool,
    plain: bool,
) -> None:
    """Run JOB, a YAML file, or go on with it where it was.

    A local cluster is started unless --scheduler names one. Ctrl-C stops with all finished work saved.
    """
    if scheduler and workers:
        raise click.UsageError("--workers sizes a local cluster; with --scheduler, start workers there.")
    spec = _job(job, {"workers": workers, "output": output, "prompts": prompts})
    if limit is not None:
        spec = spec.limited(limit)
    console = _console()
    lines = plain or not console.is_terminal
    from dfdask.progress import follow, header, print_rows, summary

    _say(console, f"dfdask {__version__}: preparing {job}")
    from dfdask.run import submit

    _hush_dask()
    started = submit(spec, scheduler=scheduler, new_run=new_run)
    print_rows(console, header(started.progress, _model(spec), lines))
    if uncut := started.store.attributes["dfdask"].get("uncut"):
        print_rows(console, [("stages", f"one, the whole pipeline: {uncut}")])
    progress = follow(started, console, lines)
    print_rows(console, summary(progress))
    if sheet := _sheet(started.store):
        print_rows(console, [("pictures", sheet)])
    if progress.items and progress.failed_items == progress.items:
        raise DfdaskError(f"every item failed; see why with: dfdask show {progress.output}")


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def status(run: str, as_json: bool) -> None:
    """How far RUN is, from its store alone: no cluster is asked."""
    from dfdask.summary import status_of

    found = status_of(_store(run))
    if as_json:
        click.echo(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    from dfdask.progress import print_rows

    print_rows(_console(), found.rows())


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option(
    "--failures",
    "limit",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many failed items to list.",
)
def show(run: str, limit: int) -> None:
    """What RUN was made from and how: spec, model, versions, timings, failures."""
    from dfdask.summary import print_details

    print_details(_console(), _store(run), limit)


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["png", "webdataset", "parquet", "mp4"]),
    help="[default: png for pictures, mp4 for videos]",
)
@click.option("--fps", type=click.IntRange(1, 240), default=16, show_default=True, help="Frames per second of videos.")
@click.option("--overwrite", is_flag=True, help="Replace what is at DESTINATION.")
def export(
    run: str, destination: Path, form: Literal["png", "webdataset", "parquet", "mp4"] | None, fps: int, overwrite: bool
) -> None:
    """Write the pictures of RUN to DESTINATION for other programs.

    png: files with metadata.jsonl, a Hugging Face imagefolder. webdataset: tar files. parquet: a Hugging Face
    dataset with the pictures inside. mp4: the videos of a run of videos, with metadata.jsonl.
    """
    from dfdask.export import export_run
    from dfdask.words import count

    store = _store(run)
    chosen = form or ("mp4" if store.layout.kind == "video" else "png")
    done = export_run(store, chosen, destination, overwrite=overwrite, frames_per_second=fps)
    click.echo(f"wrote {count(done.items, 'item')} in {count(done.files, 'file')} to {destination}")
    if done.skipped:
        waiting = done.skipped - done.failed
        click.echo(f"left out {count(done.skipped, 'item')}: {done.failed} failed, {waiting} not there yet")


@main.command()
@click.argument("model")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the pipeline call, e.g. --set height=512; several times for several.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def inspect(model: str, dtype: str, settings: tuple[str, ...], as_json: bool) -> None:
    """The stages and components of MODEL and what an item costs, without loading weights.

    MODEL is `bundled`, a directory or a hub id.
    """
    from dfdask.inspection import inspected, print_inspected

    found = inspected(model, dtype, _settings(settings))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_inspected(_console(), found)


@main.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Who reaches it can run code: trusted networks only.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8786, show_default=True)
@click.option("--dashboard-address", default="127.0.0.1:8787", show_default=True, metavar="HOST:PORT")
def scheduler(host: str, port: int, dashboard_address: str) -> None:
    """Start a scheduler that workers and `dfdask run --scheduler` connect to. Ctrl-C ends it."""
    from dfdask.cluster import run_scheduler

    run_scheduler(host=host, port=port, dashboard_address=dashboard_address)


@main.command()
@click.argument("address")
@click.option(
    "--stages", metavar="NAME,NAME", help="Bind these workers to stages [default: what there is to do, as it changes]."
)
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Worker processes.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--device-class", metavar="NAME", help="What the workers compute on, e.g. h100 [default: found out].")
@click.option("--memory", metavar="BYTES", help="Device memory that they may use, e.g. 24GB [default: all of it].")
def worker(
    address: str,
    stages: str | None,
    count: int,
    device: Literal["auto", "cpu", "cuda"],
    device_class: str | None,
    memory: str | None,
) -> None:
    """Start workers for the scheduler at ADDRESS. Ctrl-C ends them."""
    names, size = _stage_names(stages), _bytes(memory)
    from dfdask.cluster import run_worker

    run_worker(address, names, count, device, device_class, size)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    ctx.exit(code)


def _hush_dask() -> None:
    """Dask's client logs tracebacks when its scheduler goes away; the command says what happened in one line."""
    import logging

    import distributed  # noqa: F401  sets its loggers' levels when it is imported

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _job(path: Path, overrides: dict[str, Any]) -> JobSpec:
    from dfdask.spec import JobSpec

    given = {key: value for key, value in overrides.items() if value is not None}
    return JobSpec.from_yaml(path, overrides=given)


def _model(spec: JobSpec) -> str:
    model = spec.model if isinstance(spec.model, str) else "fake stages"
    return f"{model} ({spec.dtype})"


def _store(run: str) -> RunStore:
    """The store that RUN means. A job file means the run that it writes to."""
    from dfdask.store import RunStore
    from dfdask.targets import resolve_output

    output: str | None = run
    if run.lower().endswith((".yaml", ".yml")):
        output = _job(Path(run), {}).output
    return RunStore.open(resolve_output(output or run))


def _settings(texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it reads as that, else text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not name or not separator:
            raise SpecError(f"--set: must be NAME=VALUE, got {text!r}; write e.g. --set height=512")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _stage_names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise SpecError(f"--stages: must be different names, got {text!r}; write e.g. encode,decode")
    return names


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    from dask.utils import parse_bytes

    try:
        size = int(parse_bytes(text))
    except ValueError:
        size = 0
    if size < 1:
        raise SpecError(f"--memory: must be a size above 0, got {text!r}; write e.g. 24GB")
    return size


def _sheet(store: RunStore) -> str | None:
    """Write the contact sheet. The pictures are safe by now: a sheet that fails is only a remark."""
    from dfdask.sheet import write_sheet

    try:
        return str(write_sheet(store))
    except (DfdaskError, OSError) as error:
        click.echo(f"No contact sheet: {error}", err=True)
        return None
