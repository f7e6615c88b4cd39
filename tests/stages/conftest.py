"""Tiny models for the tests of the stages, built once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tiny_models, when only this folder is run


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


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Strict stages change settings of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
