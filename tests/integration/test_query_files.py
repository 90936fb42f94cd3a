"""Queries' embeddings in a file, where they are many: whole runs with the limit at nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import write_toy
from kill_worker import save_weights
from test_resume import Cut, assert_same
from test_train import CONFIG

from sparring.phases.vectors import Chosen
from sparring.recipes import experiment
from sparring.recipes import train as train_module
from sparring.recipes.train import train

pytestmark = pytest.mark.slow
FOCUSED = ["run.reencode=focused", "run.focus_depth=2", "run.focus_sample=40", "run.focus_missed=1"]


@pytest.mark.parametrize("more", [[], FOCUSED], ids=["whole", "focused"])
def test_a_run_has_the_bits_of_one_in_memory_also_after_a_stop(
    more: list[str], tiny_st: Path, tiny_ce: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Stopped between the last refresh's encoding and its mining: the queries' file is taken up, and then gone."""
    monkeypatch.setattr(train_module, "export", save_weights)
    monkeypatch.setattr(train_module, "write_report", lambda *_: None)
    arguments: dict[str, Any] = {
        "data": str(write_toy(tmp_path / "toy")), "retriever": str(tiny_st), "ranker": str(tiny_ce), "recipe": "ar2",
        "cache": str(tmp_path / "cache"), "config": CONFIG, "assignments": [*more, "run.audit_lists=3"], "command": "a",
    }  # fmt: skip
    files: list[Path] = []
    real, stop = experiment.mine, 10**9

    def looked(queries: Chosen, *args: Any, **kwargs: Any) -> Any:
        files.append(Path(str(getattr(queries.vectors, "filename", ""))))
        assert isinstance(queries.vectors, np.memmap) == (experiment.QUERIES_IN_MEMORY == 0)
        if len(files) == stop:
            raise Cut
        return real(queries, *args, **kwargs)

    monkeypatch.setattr(experiment, "mine", looked)
    train(**arguments, out=tmp_path / "memory")
    stop = len(files)
    files.clear()
    monkeypatch.setattr(experiment, "QUERIES_IN_MEMORY", 0)
    with pytest.raises(Cut):
        train(**arguments, out=tmp_path / "filed")
    assert files[-1].is_file()
    stop = 10**9
    with caplog.at_level(logging.INFO, "sparring"):
        train(**arguments, out=tmp_path / "filed")
    assert f"{files[-1]}: embeddings of an earlier run are reused" in caplog.text
    assert files[-1] == files[-2]
    assert not any(file.exists() for file in files)
    assert_same(tmp_path / "filed", tmp_path / "memory")
