"""Options are read into values, or one error says what is wrong."""

from __future__ import annotations

import pytest

from dfdask.cli_options import check_address, read_bytes, read_class, read_settings, read_stage_names
from dfdask.errors import SpecError


@pytest.mark.parametrize(("text", "names"), [(None, None), ("a", ["a"]), (" a , b", ["a", "b"])])
def test_worker_stages(text: str | None, names: list[str] | None) -> None:
    assert read_stage_names(text) == names


@pytest.mark.parametrize("text", ["", "a,", "a,a", "a,,b"])
def test_bad_stage_names(text: str) -> None:
    with pytest.raises(SpecError, match="--stages: must be different names"):
        read_stage_names(text)


@pytest.mark.parametrize("text", ["", " ", "a\nb"])
def test_bad_class_names(text: str) -> None:
    with pytest.raises(SpecError, match="--device-class: must be a name"):
        read_class(text)


@pytest.mark.parametrize("text", ["foo", "", "0.0.0.0:", "host:http"])
def test_bad_dashboard_addresses(text: str) -> None:
    with pytest.raises(SpecError, match="--dashboard-address: must be HOST:PORT"):
        check_address(text)


def test_sizes() -> None:
    assert [read_bytes(text) for text in (None, "24GB", "1 MiB", "7")] == [None, 24_000_000_000, 1 << 20, 7]


@pytest.mark.parametrize("text", ["", "much", "0", "-1GB", "24 apples"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(SpecError, match="--memory: must be a size above 0"):
        read_bytes(text)


def test_settings_are_json_where_they_read_as_that() -> None:
    given = ("height=512", "prompt=a cat = a pet", "scales=[1, 2]", "flag=true")
    assert read_settings(given) == {"height": 512, "prompt": "a cat = a pet", "scales": [1, 2], "flag": True}


@pytest.mark.parametrize("text", ["height", "=512", ""])
def test_bad_settings(text: str) -> None:
    with pytest.raises(SpecError, match="--set: must be NAME=VALUE"):
        read_settings((text,))
