"""Where runs are kept: storage targets, as the YAML files of ``storage/`` define them.

A target is data: a folder on a disk or a prefix in an S3 bucket. Secrets never stand in it; they come from the
environment (``AWS_ACCESS_KEY_ID``, ...) of the process that reads or writes.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfdask.errors import StorageError
from dfdask.target_files import (
    DEFAULT_TARGET,
    NAME,
    STORAGE_FOLDER,
    STORAGE_VARIABLE,
    Target,
    at_home,
    read_target,
    target_files,
)

if TYPE_CHECKING:
    from obstore.store import LocalStore, RetryConfig, S3Store

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


PATIENCE = timedelta(seconds=90)  # with a storage that has answered before
# A refused connection fails at once: without pauses, any number of retries is used up within seconds. The time alone
# ends these.
_PATIENT: RetryConfig = {
    "max_retries": 1000,
    "retry_timeout": PATIENCE,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=5), "base": 2},
}
_QUICK: RetryConfig = {"max_retries": 10, "retry_timeout": timedelta(seconds=10)}


@dataclass(frozen=True, slots=True)
class Location:
    """Where one run is kept. Holds no secret, so it may travel to workers and into logs.

    ``root`` is the absolute folder (local) or ``bucket/prefix`` (s3) that the run called ``name`` lies in.
    """

    kind: Literal["local", "s3"]
    root: str
    name: str
    endpoint: str | None = None
    region: str | None = None
    allow_http: bool = False
    anonymous: bool = False

    def __str__(self) -> str:
        """The path (from the current directory where the run lies below it) or the ``s3://`` URL."""
        return f"s3://{self.root}/{self.name}" if self.kind == "s3" else _short(self.path)

    @property
    def address(self) -> str:
        """What ``resolve_output`` takes for this place, from any directory."""
        return f"s3://{self.root}/{self.name}" if self.kind == "s3" else str(self.path)

    @property
    def path(self) -> Path:
        """The run's folder. Raises StorageError where the run is on no disk."""
        if self.kind != "local":
            raise StorageError(f"{self} is in object storage and has no local path; read it with run.dataset()")
        return Path(self.root) / self.name

    def object_store(self, *, create: bool = False, quick: bool = False) -> LocalStore | S3Store:
        """The obstore store whose root is the run; ``create`` makes a local run's folder. Raises StorageError.

        It rides out an outage of about ``PATIENCE``; ``quick`` gives up after seconds.
        """
        return self._open(self.name, create=create, quick=quick)

    def check_writable(self) -> None:
        """Create and delete a small object beside the runs. Raises StorageError, within seconds.

        Also where creating it a second time works: then two writers of a shard would not notice each other.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        probe, guarded = probe_key(), False
        try:
            store = self._open("", create=True, quick=True)
            obstore.put(store, probe, b"dfdask", mode="create")
            try:
                obstore.put(store, probe, b"again", mode="create")
            except AlreadyExistsError:
                guarded = True
            finally:
                obstore.delete(store, probe)
        except (BaseError, OSError) as error:
            raise storage_error(f"cannot write to {self}", error, self._advice()) from None
        if not guarded:
            raise StorageError(
                f"the storage of {self} replaces objects that are there although told not to (it ignores "
                "If-None-Match), so that nothing guards a run; use a storage or a release of it that knows it"
            )

    def _open(self, name: str, *, create: bool, quick: bool = False) -> LocalStore | S3Store:
        """The store below ``root``; ``quick`` gives up after seconds, not a minute, without an answer."""
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, S3Store

        try:
            if self.kind == "local":
                folder = Path(self.root) / name
                there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
                if not there.is_dir():
                    raise StorageError(f"cannot open {self}: {_short(there)} is not a folder; use another path")
                return LocalStore(folder, mkdir=create)
            bucket, _, prefix = self.root.partition("/")
            options: dict[str, Any] = {"endpoint": self.endpoint, "region": self.region}
            return S3Store(
                bucket,
                prefix=f"{prefix}/{name}".strip("/") or None,
                client_options={
                    "allow_http": self.allow_http,
                    "connect_timeout": "5 s",
                    "timeout": "10 s" if quick else "300 s",
                },
                retry_config=_QUICK if quick else _PATIENT,
                skip_signature=self.anonymous,
                **{key: value for key, value in options.items() if value is not None},
            )
        except (BaseError, OSError, ValueError) as error:
            raise storage_error(f"cannot open {self}", error, self._advice()) from None

    def _advice(self) -> str:
        if self.kind == "local":
            return "check the path, its permissions and the free space"
        if not self.anonymous and not os.environ.get("AWS_ACCESS_KEY_ID"):
            return "AWS_ACCESS_KEY_ID is not set here; set the AWS_* variables of your storage"
        return "check the bucket, the endpoint and the rights of the key"


def probe_key() -> str:
    """The name of an object beside the runs that lives for a moment."""
    return f"dfdask-probe-{secrets.token_hex(8)}"


def storage_error(what: str, error: BaseException, advice: str = "") -> StorageError:
    """``error`` in one line, without the debugging output of the storage library and without secrets."""
    text = str(error).split("\n\nDebug source")[0]
    text = re.sub(r"<\?xml.*<Message>(.*?)</Message>.*</Error>", r"\1", text, flags=re.DOTALL)  # what S3 answers
    text = re.sub(r"\s+", " ", text).strip() or type(error).__name__
    for variable in SECRET_VARIABLES:
        if len(secret := os.environ.get(variable, "")) >= 4:
            text = text.replace(secret, f"<{variable}>")
    if not advice and re.search(r"os error (28|122)\b|No space left", text):
        advice = "free some space and run the same command again; what is committed is kept"
    return StorageError(f"{what}: {text}" + (f"; {advice}" if advice else ""))


def resolve_output(output: str) -> Location:
    """The location that ``<target>/<name>``, a path or an ``s3://`` URL below a target means.

    Paths start with ``/``, ``./``, ``../`` or ``~`` or end in ``.zarr``; an existing folder is taken as a path
    too where no target has its first part's name. Raises StorageError.
    """
    if not output or any(ord(character) < 32 for character in output):
        raise StorageError(f"an output is {_FORMS}, got {output!r}")
    if "://" in output:
        return _by_url(output)
    if output.startswith(("/", "./", "../", "~")) or output.rstrip("/").endswith(".zarr"):
        return _by_path(output)
    target, _, name = output.partition("/")
    files = target_files()
    known = sorted({"local", *files})
    if name and (target in files or target == "local"):
        return _below(read_target(files[target]) if target in files else DEFAULT_TARGET, name, output)
    if os.path.isdir(output):
        return _by_path(output)
    if not name:
        raise StorageError(f"an output is {_FORMS}, got {output!r}; write local/{output} or ./{output}")
    near = difflib.get_close_matches(target, known, 1)
    advice = f"did you mean {near[0]}/{name}?" if near else f"for a path write ./{output}"
    raise StorageError(
        f"no storage target is called {target!r} (known: {', '.join(known)}); {advice} "
        f"(targets are YAML files in ./{STORAGE_FOLDER} or in the folder that {STORAGE_VARIABLE} names)"
    )


def _short(path: Path) -> str:
    """``path`` from the current directory where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


_FORMS = "<target>/<name>, such as local/my-run, or a path, such as ./my-run"


def _below(target: Target, name: str, output: str) -> Location:
    """The run ``name`` of ``target``, which it must not leave."""
    name = name.removesuffix("/")
    if not NAME.fullmatch(name) or ".." in name:
        raise StorageError(
            f"a run's name is made of letters, digits, '.', '_' and '-' and does not start with '.', got "
            f"{name!r} in {output!r}"
        )
    if target.kind == "s3":
        return Location("s3", target.root, name, **target.options)
    root = Path(target.root).absolute()
    if not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
        raise StorageError(f"{root / name} is a link that leaves {root}; remove it or use another name")
    return Location("local", str(root), name)


def _by_path(text: str) -> Location:
    path = Path(os.path.normpath(at_home(text).absolute()))
    if not path.name:
        raise StorageError(f"{text!r} is no place for a run; name a folder of its own")
    return Location("local", str(path.parent), path.name)


def _by_url(url: str) -> Location:
    """An ``s3://`` URL as dfdask prints it; the endpoint comes from the target that it lies in."""
    root, _, name = url.removeprefix("s3://").rstrip("/").rpartition("/")
    targets = {called: read_target(file) for called, file in target_files().items()}
    there = {called: target for called, target in targets.items() if target.kind == "s3" and target.root == root}
    if url.startswith("s3://") and there:
        if len({target.options.get("endpoint") for target in there.values()}) > 1:
            raise StorageError(f"{url!r} may be in any of {', '.join(sorted(there))}; write <target>/{name}")
        return _below(next(iter(there.values())), name, url)
    raise StorageError(
        f"no storage target holds {url!r}; describe its bucket in ./{STORAGE_FOLDER}/<target>.yaml and write "
        "<target>/<name>"
    )
