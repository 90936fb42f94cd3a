"""The method files point at functions that exist, where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILE = re.compile(r"`((?:losses|recipes|phases|models)/\w+\.py)`((?:, `[\w.]+[^`]*`)*)")
"""A file of the package, and the names that follow it."""


@pytest.mark.parametrize("page", ["ar2.md", "rocketqav2.md"])
def test_every_function_that_a_page_names_is_where_it_says(page: str) -> None:
    references = FILE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(references) > 10
    for file, names in references:
        source = (ROOT / "src/sparring" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(?:\w+\.)?(\w+)", names):
            assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), f"{page}: no {name} in {file}"
