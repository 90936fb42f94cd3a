"""What is refused before a cluster is asked for anything."""

from __future__ import annotations

import sys

import pytest

from sparring.cluster import Cluster
from sparring.recipes.settings import RunConfig
from sparring.types import InputError


def test_a_missing_extra_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="not installed") as error:
        Cluster().check()
    assert error.value.fix == "pip install 'sparring[ray]'"


def test_the_address_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert Cluster().place == "local"
    monkeypatch.setenv("RAY_ADDRESS", "a:1")
    assert Cluster().place == "a:1"
    assert Cluster("b:2").place == "b:2"


def test_settings() -> None:
    assert RunConfig().cluster() is None
    assert RunConfig(engine="ray", ray_address="a:1", ray_workers=3, ray_shard=9, ray_timeout=7).cluster() == Cluster(
        "a:1", 3, 9, 7
    )


@pytest.mark.parametrize("more", [{"index": "hnsw"}, {"reencode": "focused"}])
def test_what_a_cluster_does_not_do(more: dict[str, str]) -> None:
    with pytest.raises(InputError, match="search exactly"):
        RunConfig(engine="ray", **more)  # type: ignore[arg-type]


def test_a_run_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparring.recipes.train import require_cluster

    monkeypatch.setenv("WORLD_SIZE", "2")
    require_cluster(RunConfig())
    with pytest.raises(InputError, match="several processes"):
        require_cluster(RunConfig(engine="ray"))
