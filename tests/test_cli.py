"""The command line as people use it: arguments, messages, exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import dfdask
from dfdask import cli, errors

COMMANDS = ["check", "explain", "export", "inspect", "plan", "report", "run", "scheduler", "show", "status", "worker"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def failing() -> Iterator[dict[str, BaseException]]:
    """A command ``dfdask boom`` that raises what is put in."""
    raised: dict[str, BaseException] = {}

    @cli.main.command("boom")
    def boom() -> None:
        raise raised["error"]

    yield raised
    del cli.main.commands["boom"]


def dfdask_(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def failed(result: Result, code: int) -> str:
    """The one message of a command that failed as it should."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: "), result.stderr
    return result.stderr


def test_commands_are_all_there() -> None:
    assert sorted(cli.main.commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_explains_itself(name: str) -> None:
    assert dfdask_(name, "-h").exit_code == 0
    command = cli.main.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.show_default, parameter.name


def test_version() -> None:
    assert dfdask_("--version").output == f"dfdask, version {dfdask.__version__}\n"
    command = [sys.executable, "-m", "dfdask", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert result.stdout == f"dfdask, version {dfdask.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "job.yaml", "--workers", "0"],
        ["run", "job.yaml", "--limit", "0"],
        ["run", "job.yaml", "--workers", "2", "--scheduler", "tcp://127.0.0.1:1"],
        ["export", "local/a", "out", "--format", "gif"],
        ["scheduler", "--port", "70000"],
        ["worker", "tcp://127.0.0.1:1", "--device", "tpu"],
        ["worker", "tcp://127.0.0.1:1", "--count", "0"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    result = dfdask_(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr and "Error:" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DfdaskError("x"), 1),
        (errors.SpecError("x"), 2),
        (errors.PromptError("x"), 2),
        (errors.ModelError("x"), 2),
        (errors.StorageError("x"), 3),
        (errors.RunNotFoundError("x"), 3),
        (errors.RunChangedError("x"), 3),
        (errors.ClusterError("x"), 4),
        (errors.JobStopped("x"), 130),
    ],
)
def test_errors_are_one_message_and_a_code(
    failing: dict[str, BaseException], error: errors.DfdaskError, code: int
) -> None:
    failing["error"] = error
    assert failed(dfdask_("boom"), code) == "Error: x\n"


def test_system_errors_are_messages_too(failing: dict[str, BaseException]) -> None:
    failing["error"] = PermissionError(errno.EACCES, "Permission denied", "runs/a")
    assert failed(dfdask_("boom"), 3) == "Error: runs/a: Permission denied\n"
    failing["error"] = OSError("no luck")
    assert failed(dfdask_("boom"), 3) == "Error: no luck\n"


def test_ctrl_c_is_no_traceback(failing: dict[str, BaseException]) -> None:
    failing["error"] = KeyboardInterrupt()
    assert "interrupted" in failed(dfdask_("boom"), 130)


def test_bugs_are_not_hidden(failing: dict[str, BaseException]) -> None:
    failing["error"] = ZeroDivisionError("a bug")
    assert isinstance(dfdask_("boom").exception, ZeroDivisionError)


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "dfdask", "--help"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=root, check=False)
    os.close(write)
    assert "Traceback" not in result.stderr


def test_run_names_a_missing_job() -> None:
    assert "nowhere.yaml" in failed(dfdask_("run", "nowhere.yaml"), 2)


def test_run_explains_a_bad_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: bundled\nprompt: [a]\n")
    message = failed(dfdask_("run", "job.yaml"), 2)
    assert "prompts" in message and "line 2" in message


@pytest.mark.parametrize("stages", ["", "a,", "a,,b", "a, a"])
def test_worker_stages_must_be_names(stages: str) -> None:
    assert "--stages" in failed(dfdask_("worker", "tcp://127.0.0.1:1", "--stages", stages), 2)


def test_overrides_replace_keys_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: bundled\nprompts: [a]\nbatch: 3\n")
    (tmp_path / "other.txt").write_text("b\nc\n")
    changes: dict[str, Any] = {"workers": 2, "output": "local/x", "prompts": Path("other.txt")}
    spec = cli._job(Path("job.yaml"), {**changes, "seed": None})
    assert (spec.workers, spec.output, spec.batch) == (2, "local/x", 3)
    path = spec.prompt_path()
    assert path is not None and path.resolve() == (tmp_path / "other.txt").resolve()
    assert cli._job(Path("job.yaml"), {}).output == "local/job"
