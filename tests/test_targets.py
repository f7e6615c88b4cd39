"""Where runs are kept: storage files, names, paths and what a location tells about itself."""

from __future__ import annotations

import os
import pickle
import re
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import obstore
import pytest
from stored import BUCKET, KEYS, new_run

from dfdask.errors import StorageError
from dfdask.store import RunStore
from dfdask.targets import Location, resolve_output, storage_error

ROOT = Path(__file__).parents[1]
S3 = "kind: s3\nbucket: pictures\n"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DFDASK_STORAGE", raising=False)


def target(text: str | bytes, name: str = "disk", folder: str = "storage") -> Path:
    path = Path(folder) / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(output: str) -> str:
    with pytest.raises(StorageError) as caught:
        resolve_output(output)
    return str(caught.value)


def test_the_built_in_target(tmp_path: Path) -> None:
    location = resolve_output("local/demo")
    assert location == Location("local", str(tmp_path / "runs"), "demo")
    assert location.path == tmp_path / "runs" / "demo"
    assert str(location) == "runs/demo"
    assert not (tmp_path / "runs").exists()


def test_a_local_target_is_relative_to_what_holds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target("kind: local\npath: ./big/../disk\n", "disk", "elsewhere/storage")
    target(f"kind: local\npath: {tmp_path}/absolute\n", "local", "elsewhere/storage")
    monkeypatch.setenv("DFDASK_STORAGE", "elsewhere/storage")
    assert resolve_output("disk/demo").path == tmp_path / "elsewhere" / "disk" / "demo"
    assert resolve_output("local/demo").path == tmp_path / "absolute" / "demo"


def test_the_folder_here_comes_before_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target("kind: local\npath: here\n")
    target("kind: local\npath: there\n", folder="other/storage")
    target(S3, "cloud", folder="other/storage")
    monkeypatch.setenv("DFDASK_STORAGE", str(tmp_path / "other" / "storage"))
    assert resolve_output("disk/demo").path == tmp_path / "here" / "demo"
    assert str(resolve_output("cloud/demo")) == "s3://pictures/demo"


def test_an_s3_target() -> None:
    text = "prefix: /a/b-c/\nendpoint: http://minio:9000\nallow_http: true\nregion: eu-west-1\nanonymous: true\n"
    target(S3 + text, "cloud")
    location = resolve_output("cloud/demo")
    assert location == Location("s3", "pictures/a/b-c", "demo", "http://minio:9000", "eu-west-1", True, True)
    assert str(location) == "s3://pictures/a/b-c/demo"
    assert resolve_output(str(location)) == resolve_output(f"{location}/") == location
    with pytest.raises(StorageError, match="has no local path"):
        location.path  # noqa: B018


@pytest.mark.parametrize("name", ["local", "s3-example"])
def test_the_storage_files_of_the_project(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFDASK_STORAGE", str(ROOT / "storage"))
    location = resolve_output(f"{name}/demo")
    assert str(location) in (str(ROOT / "runs" / "demo"), "s3://my-bucket/dfdask/demo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: local\n", ["path: is missing", "path: ./runs"]),
        ("kind: local\npath: ''\n", ["path: is missing"]),
        ("kind: local\npath: 3\n", ["path: must be text, got 3"]),
        ("kind: local\npath:\n", ["path: must be text, got None"]),
        ("kind: local\npath: ~nobody-of-that-name/x\n", ["home directory"]),
        ("kind: local\npaht: ./runs\n", ["paht: unknown key; did you mean path?"]),
        ("path: ./runs\n", ["kind: must be local or s3, got None"]),
        ("kind: [local]\npath: ./runs\n", ["kind: must be local or s3, got a list"]),
        ("kind: gcs\n", ["kind: must be local or s3, got 'gcs'"]),
        ("kind: local\npath: ./a\npath: ./b\n", ["'path' is there twice"]),
        ("kind: local\npath: !!python/object/apply:os.getcwd []\n", ["cannot be read as YAML", "python"]),
        ("kind: local\npath: !secret x\n", ["cannot be read as YAML", "!secret"]),
        ("kind: local\n? [a]\n: b\n", ["cannot be read as YAML"]),
        ("- local\n", ["a storage target is a mapping"]),
        ("", ["a storage target is a mapping"]),
        ("kind: local\npath: [\n", ["cannot be read as YAML"]),
        (b"kind: local\npath: \xff\n", ["cannot be read as YAML", "utf-8"]),
        (b"kind: local\npath: a\x00b\n", ["cannot be read as YAML"]),
        ("#" * 100_001, ["100,000 bytes"]),
        ("[" * 600, ["cannot be read as YAML"]),
        ("kind: s3\n", ["bucket: must be the name of an S3 bucket, got ''"]),
        ("kind: s3\nbucket: Not_A_Bucket\n", ["bucket: must be the name", "'Not_A_Bucket'"]),
        ("kind: s3\nbucket: [a, b]\n", ["bucket: must be text, got a list"]),
        (S3 + "prefix: ../up\n", ["prefix: must be"]),
        (S3 + "prefix: a/./b\n", ["prefix: must be"]),
        (S3 + "prefix: a//b\n", ["prefix: must be"]),
        (S3 + "endpoint: minio:9000\n", ["endpoint: must be a http(s) URL, got 'minio:9000'"]),
        (S3 + "endpoint: https://\n", ["endpoint: must be a http(s) URL"]),
        (S3 + "endpoint: 9000\n", ["endpoint: must be text, got 9000"]),
        (S3 + "endpoint: http://minio:9000\n", ["not encrypted", "allow_http: true"]),
        (S3 + "allow_http: 'yes'\n", ["allow_http: must be true or false, got 'yes'"]),
        (S3 + "path: ./runs\n", ["path: unknown key", "bucket, prefix, endpoint"]),
    ],
)
def test_a_file_that_is_wrong(text: str | bytes, words: list[str]) -> None:
    path = target(text)
    message = refusal("disk/demo")
    assert str(path) in message or "nobody" in message
    for word in words:
        assert word in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "key", ["secret_access_key", "aws_access_key_id", "access-key", "AccessKey", "session_token", "password", "api_key"]
)
def test_a_file_with_a_secret(key: str) -> None:
    target(f"{S3}{key}: hunter2\n")
    message = refusal("disk/demo")
    assert key in message and "AWS_SECRET_ACCESS_KEY in the environment" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("scheme", ["https", "ftp"])
def test_an_endpoint_with_a_password(scheme: str) -> None:
    target(f"{S3}endpoint: {scheme}://me:hunter2@minio\n")
    assert "hunter2" not in refusal("disk/demo")


def test_a_value_that_is_endless_when_written_out() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    target("\n".join(["kind: local", "path:", *(f"  {line}" for line in lines)]) + "\n")
    assert len(refusal("disk/demo")) < 500


def test_a_folder_is_no_storage_file() -> None:
    Path("storage/disk.yaml").mkdir(parents=True)
    assert "cannot be read" in refusal("disk/demo")


@pytest.mark.parametrize(
    "name", ["..", ".", ".hidden", "a/b", "a/../../b", "a\\b", "a b", "ä", "a..b", "x" * 129, "a%2fb"]
)
def test_names_that_are_refused(name: str) -> None:
    assert "a run's name is made of letters" in refusal(f"local/{name}")


@pytest.mark.parametrize("output", ["", "local/a\nb", "local/a\0b", "\x1b[2J", "/"])
def test_outputs_that_are_none(output: str) -> None:
    refusal(output)


def test_what_is_meant_when_no_target_has_that_name() -> None:
    target(S3, "cloud")
    assert "(known: cloud, local); did you mean cloud/demo?" in refusal("clout/demo")
    assert "for a path write ./qqqq/demo" in refusal("qqqq/demo")
    assert "write local/demo or ./demo" in refusal("demo")
    assert "no storage target holds 's3://other/demo'" in refusal("s3://other/demo")
    assert "no storage target holds" in refusal("gs://pictures/demo")
    assert "no storage target is called" in refusal(f"{'long' * 2000}/demo")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_output("./a/../b").path == tmp_path / "b"
    assert resolve_output("../b").path == tmp_path.parent / "b"
    assert resolve_output("~/b").path == tmp_path / "home" / "b"
    assert resolve_output("b.zarr/").path == tmp_path / "b.zarr"
    assert resolve_output("deep/er/b.zarr").path == tmp_path / "deep" / "er" / "b.zarr"
    assert resolve_output(f"{tmp_path}/b c/ä").path == tmp_path / "b c" / "ä"
    assert "home directory" in refusal("~nobody-of-that-name/b")
    (tmp_path / "runs" / "b").mkdir(parents=True)
    assert resolve_output("runs/b") == resolve_output("local/b"), "what str(location) says is taken as an output"


def test_a_link_must_stay_below_its_target(tmp_path: Path) -> None:
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    runs.mkdir()
    outside.mkdir()
    (runs / "inner").symlink_to(runs / "demo")
    (runs / "loop").symlink_to(runs / "loop")
    (runs / "out").symlink_to(outside)
    assert resolve_output("local/inner").name == "inner"
    assert "is a link that leaves" in refusal("local/out")
    with pytest.raises(StorageError):
        RunStore.open(resolve_output("local/loop"))


def test_a_target_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    resolve_output("local/demo").check_writable()
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_location_travels_without_secrets(s3: Location) -> None:
    RunStore.exists(s3)  # whatever it may keep, it keeps now
    data = pickle.dumps(s3)
    assert pickle.loads(data) == s3
    for secret in (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in data
        assert secret not in repr(s3) + str(s3)


def test_writable(location: Location) -> None:
    location.check_writable()
    assert not RunStore.exists(location)
    if location.kind == "local":
        assert list(location.path.parent.iterdir()) == []
    else:
        keys = [entry["path"] for page in obstore.list(location.object_store()) for entry in page]
        assert keys == []


@pytest.mark.parametrize("place", ["file", "file/demo", "file/deep/er/demo", "link/demo"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    location = resolve_output(f"./{place}")
    for attempt in (location.check_writable, lambda: new_run(location)):
        if place == "file" and attempt == location.check_writable:
            continue  # what it tries lies beside the run
        with pytest.raises(StorageError) as caught:
            attempt()
        assert f"cannot open {place}: {place.split('/')[0]} is not a folder; use another path" in str(caught.value)
        assert "Debug source" not in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "no folder"


class CarelessS3(BaseHTTPRequestHandler):
    """A server that stores whatever comes, as S3 services do that do not know If-None-Match."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self._body()
        self._answer(b"")

    def do_POST(self) -> None:
        """A list of objects is deleted."""
        keys = b"".join(re.findall(rb"<Key>.*?</Key>", self._body()))
        self._answer(b"<DeleteResult><Deleted>%b</Deleted></DeleteResult>" % keys)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_storage_that_ignores_create_only_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), CarelessS3) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            target(f"{S3}endpoint: http://127.0.0.1:{server.server_port}\nallow_http: true\n", "careless")
            with pytest.raises(
                StorageError, match="s3://pictures/demo replaces objects .*If-None-Match.*use a storage"
            ):
                resolve_output("careless/demo").check_writable()
        finally:
            server.shutdown()


def test_not_writable_in_s3(s3: Location, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target(f"kind: s3\nbucket: not-{BUCKET}\nendpoint: {s3_server}\nallow_http: true\n", "other")
    with pytest.raises(StorageError, match=r"cannot write to s3://not-pictures/demo: .*check the bucket") as caught:
        resolve_output("other/demo").check_writable()
    assert KEYS["AWS_ACCESS_KEY_ID"] not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", ["none", pytest.param("silence", marks=pytest.mark.slow)])
def test_a_server_that_does_not_answer(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answer == "silence":
            server.listen()
        target(f"{S3}endpoint: http://127.0.0.1:{server.getsockname()[1]}\nallow_http: true\n", "dead")
        began = time.monotonic()
        with pytest.raises(StorageError, match="cannot write to s3://pictures/demo"):
            resolve_output("dead/demo").check_writable()
        assert time.monotonic() - began < 30


def test_errors_are_one_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2!")
    text = str(storage_error("cannot write", OSError("denied\n  for hunter2!\n\nDebug source:\nGeneric { ... }")))
    assert text == "cannot write: denied for <AWS_SECRET_ACCESS_KEY>"
    answer = '404 Not Found: <?xml version="1.0"?>\n<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist'
    answer += "</Message><RequestId>x1</RequestId></Error>"
    assert str(storage_error("cannot read", OSError(answer))) == "cannot read: 404 Not Found: The bucket does not exist"
    assert str(storage_error("cannot read", ValueError(""))) == "cannot read: ValueError"
    assert "free some space" in str(storage_error("cannot write", OSError(28, os.strerror(28))))
