"""What several tests need: a place for a run on a disk and in a real S3 server, tiny models, a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from stored import BUCKET, KEYS, REGION

from dfdask.targets import Location, resolve_output


@pytest.fixture(scope="session", autouse=True)
def any_dashboard_port() -> None:
    """Tests that run beside each other do not race for the same port: Dask leaves a socket open where it lost."""
    from dfdask import cluster  # Dask sets its loggers up when it is imported: not before pytest has set up its own

    cluster.DASHBOARD_PORT = 0


@pytest.fixture(scope="session")
def s3_client() -> Iterator[Any]:
    """A boto3 client of an S3 server that is its own, with the bucket ``BUCKET``."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {name.lower(): value for name, value in KEYS.items() if name != "AWS_DEFAULT_REGION"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name=REGION, **keys)
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    yield client
    client.close()
    server.stop()


@pytest.fixture(scope="session")
def s3_server(s3_client: Any) -> str:
    """The URL of the S3 server."""
    return str(s3_client.meta.endpoint_url)


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A run that is not there yet, in S3, by way of a storage file in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    target = tmp_path / "storage" / "bucket.yaml"
    target.parent.mkdir()
    target.write_text(f"kind: s3\nbucket: {BUCKET}\nprefix: some/where\nendpoint: {s3_server}\nallow_http: true\n")
    return resolve_output(f"bucket/run-{uuid4().hex}")


@pytest.fixture
def local(tmp_path: Path) -> Location:
    """A run that is not there yet, on a disk."""
    return resolve_output(str(tmp_path / "runs" / "demo"))


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest) -> Location:
    """A run that is not there yet, on a disk and in S3."""
    found: Location = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model; it is shared, so copy it before you change it."""
    from tiny_models import save_tiny

    root, made = tmp_path_factory.mktemp("tiny"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, root / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """Of two worker processes: one denoises, the other does the rest, so that all travels from process to process."""
    from distributed import Client

    from dfdask.cluster import LocalFleet
    from dfdask.spec import WorkerGroup

    fleet = LocalFleet([WorkerGroup(stages=["encode", "decode"]), WorkerGroup(stages=["denoise"])])
    with Client(fleet.address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client
    fleet.close()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that tests teach stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFDASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
