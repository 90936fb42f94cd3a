"""The small dataset of ``dataset_files`` as a folder in BEIR's layout, and an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_files import beir_files


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return beir_files(tmp_path / "beir")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
