"""Work spread over machines by Ray: connect, see that there is room, hand out items, give up in time.

The only home of ray, which is an extra (``pip install 'sparring[ray]'``) and is imported when it is used. Items and
answers are small; what is large lies in files that every node sees. No wait here is without an end.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from sparring.machine import cpus
from sparring.types import InputError

logger = logging.getLogger("sparring")

T = TypeVar("T")
Answer = dict[str, Any]
_Told: TypeAlias = "queue.Queue[tuple[T | None, BaseException | None]]"

LOCAL = "local"
_AGAIN = "run the same command again: it goes on from the shards that are finished"
_FIELDS = ("what", "where", "expected", "got", "fix")
_TASK_RETRIES = 3  # attempts at a shard after its worker died; workers themselves are started again without limit
_POLL = 0.2
_LATER = 30.0
_LEAVE = 20.0  # seconds for a job that is no longer wanted to end, before the connection does
_HERE = threading.local()  # .stop: the event that ends the job which this thread plans


class Work(Protocol):
    """What a worker does with each item."""

    def __call__(self, item: Mapping[str, Any]) -> Answer: ...


@dataclass(frozen=True)
class _Room:
    """Workers, and CPUs and GPUs (0 or 1) of each."""

    workers: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.workers} workers, {self.cpus} CPU{'s' * (self.cpus > 1)}{' and a GPU' * self.gpus} each"


@dataclass(frozen=True)
class Cluster:
    """Which Ray to use, and how.

    Attributes:
        address: ``host:port`` of a running Ray; "" is $RAY_ADDRESS, or else a Ray of this machine's own, which is
            started for each job. A Ray to which this process is connected already is used as it is.
        workers: processes that work at once; 0 is one for each GPU, or one for each CPU but one.
        shard: rows of one item.
        timeout: seconds in which at least one item must be finished.
        start_timeout: seconds for a connection, and for CPUs that others have to become free.
    """

    address: str = ""
    workers: int = 0
    shard: int = 8192
    timeout: float = 1800.0
    start_timeout: float = 120.0

    @property
    def place(self) -> str:
        """The address that is meant: "local", or ``host:port``."""
        return self.address or os.environ.get("RAY_ADDRESS", "") or LOCAL

    def check(self) -> None:
        """InputError unless the cluster answers and has room for the workers."""
        with self.connected() as ray:
            self._room(ray)

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """A connection for a while; one that is there already is used and left."""
        ray = _ray()
        if ray.is_initialized():
            yield ray
            return
        if self.place != LOCAL:
            _require_answer(self.place, self.start_timeout)
        told: _Told[None] = queue.Queue()
        leave = threading.Event()
        threading.Thread(target=self._keep, args=(ray, told, leave), daemon=True).start()
        _awaited(told, self.start_timeout, "Ray did not start in time", self.place)
        try:
            yield ray
        finally:
            leave.set()
            try:
                _awaited(told, self.start_timeout, "Ray did not stop in time", self.place)
            except InputError as error:
                logger.warning("%s", error)

    def _keep(self, ray: Any, told: _Told[None], leave: threading.Event) -> None:
        """In a thread that lives as long as the connection: the kernel ends what Ray has started with the thread that
        started it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._connect(ray)
        except BaseException as error:
            told.put((None, error))
            return
        told.put((None, None))
        leave.wait()
        try:
            ray.shutdown()
            told.put((None, None))
        except BaseException as error:
            told.put((None, error))

    def _connect(self, ray: Any) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.place == LOCAL:  # one CPU more than there are workers: it is a number to Ray, and reads need it
            options |= {"num_cpus": (self.workers or cpus().usable) + 1, "include_dashboard": False}
        try:
            ray.init(address=self.place, **options)
        except (Exception, SystemExit) as error:  # Ray's client exits where it gives up
            raise InputError(
                "Ray cannot be used", where=self.place, got=_first_line(error),
                fix="see that the address, the token (RAY_AUTH_TOKEN) and the version of Ray are the cluster's",
            ) from error  # fmt: skip

    def _room(self, ray: Any, *, threads: bool = False) -> _Room:
        """How many workers there will be, and what each has. ``threads``: see `map`."""
        total = _within(self.start_timeout, ray.cluster_resources, "the cluster does not answer", self.place)
        have, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
        wanted = self.workers or gpus or have - 1
        each = self._cpus_of_a_gpu(ray) if gpus and threads else 1
        needs = {"CPU": wanted * each + 1, "GPU": wanted if gpus else 0}
        if wanted < 1 or needs["CPU"] > have or needs["GPU"] > gpus:
            raise InputError(
                "the cluster is too small for these workers", where=self.place,
                expected=f"a CPU for each worker and one that stays free for reads: {max(2, needs['CPU'])}"
                + (f", and {needs['GPU']} GPUs" if gpus else ""),
                got=f"{have} CPUs, {gpus} GPUs", fix="ask for fewer workers (run.ray_workers), or add nodes",
            )  # fmt: skip
        until = time.monotonic() + self.start_timeout
        while True:
            free = _within(self.start_timeout, ray.available_resources, "the cluster does not answer", self.place)
            if all(free.get(kind, 0) >= count for kind, count in needs.items()):
                break
            if time.monotonic() > until:
                raise InputError(
                    "the cluster is busy", where=self.place, expected=_listed(needs) + " free", got=_listed(free),
                    fix="wait for the other jobs, or ask for fewer workers (run.ray_workers)",
                )  # fmt: skip
            time.sleep(_POLL)
        room = _Room(wanted, each, int(gpus > 0))
        logger.info("Ray at %s: %s", self.place, room)
        return room

    def _cpus_of_a_gpu(self, ray: Any) -> int:
        """CPUs for each worker where every GPU has one: on each node one stays free for reads."""
        nodes = _within(self.start_timeout, ray.nodes, "the cluster does not answer", self.place)
        have = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
        return max(1, min(int((node.get("CPU", 0) - 1) // node["GPU"]) for node in have)) if have else 1

    def map(
        self, make: Callable[..., Work], arguments: tuple[Any, ...], items: Sequence[Answer], *, threads: bool = False
    ) -> Generator[Answer, None, None]:
        """What workers answer to items, in the order in which they are done, as a Ray Data job.

        A worker is made once in each process, by ``make(*arguments)``. One that dies is made again, and its item is
        done again, up to three times. The job ends with the generator (close it).

        Args:
            make: a class or function that the nodes can import.
            items: JSON objects, and so are the answers.
            threads: the work is done by CPUs: where there is a worker for each GPU, it gets its share of its node's.

        Raises:
            InputError: no Ray, no room, no answer in time, a worker that dies at every attempt, or what a worker
                raised, with its node's name in front of ``where``.
        """
        with self.connected() as ray:
            room = self._room(ray, threads=threads)
            rows = self._job(ray, make, arguments, items, room)
            answers: queue.Queue[Answer | Exception | None] = queue.Queue()
            stop = threading.Event()
            reader = threading.Thread(target=_forward, args=(rows, answers, stop), daemon=True)
            reader.start()
            try:
                while (answer := self._next(answers)) is not None:
                    yield answer
            finally:
                stop.set()
                reader.join(_LEAVE)

    def _job(
        self, ray: Any, make: Callable[..., Work], arguments: tuple[Any, ...], items: Sequence[Answer], room: _Room
    ) -> Any:
        """A lazy Ray Data set of answers: one block an item, so that a worker's death costs one item."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray warns of its own defaults
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            context.execution_no_progress_timeout_s = self.timeout + _LATER  # ends the job, should this process not
            if _Ender not in context.custom_execution_callback_classes:
                context.custom_execution_callback_classes.append(_Ender)
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            told = [{"item": json.dumps(item)} for item in items]
            return ray.data.from_items(told, override_num_blocks=len(items)).map(
                _Worker, fn_constructor_args=(make, arguments), num_cpus=room.cpus, num_gpus=room.gpus,
                compute=ray.data.ActorPoolStrategy(size=min(room.workers, len(items)), max_tasks_in_flight_per_actor=1),
                max_restarts=-1,
                max_task_retries=_TASK_RETRIES,
            )  # fmt: skip

    def _next(self, answers: queue.Queue[Answer | Exception | None]) -> Answer | None:
        try:
            found = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise InputError(
                "no shard was finished in time", where=self.place, expected=f"one in {self.timeout:g} s",
                fix=f"look at the nodes (ray status), raise run.ray_timeout or lower run.ray_shard; then {_AGAIN}",
            ) from None  # fmt: skip
        if isinstance(found, Exception):
            raise _explained(found, self.place) from found
        if found is not None and "error" in found:
            raise _worker_error(found["error"])
        return found


def _forward(rows: Any, answers: queue.Queue[Answer | Exception | None], stop: threading.Event) -> None:
    """In a thread of its own, since Ray's iterators wait without end: each answer, then None."""
    _HERE.stop = stop
    try:
        for row in rows.iter_rows():
            if stop.is_set():
                return
            answers.put(json.loads(row["answer"]))
        answers.put(None)
    except Exception as error:
        answers.put(error)


class _Ender:
    """Ray Data's callback for each turn of a job's loop: ends a job that nobody reads any more.

    Otherwise the loop goes on after the connection has ended, fails, or connects again. Ray makes the object in the
    thread that plans the job; the class travels to the nodes by name, so the event is not in it.
    """

    def __init__(self) -> None:
        self.stop: threading.Event | None = getattr(_HERE, "stop", None)

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing."""

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002  (Ray's interface)
        """Raises in the loop's thread, which Ray Data hands to the reader."""
        if self.stop is not None and self.stop.is_set():
            raise RuntimeError("the job was given up")

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing."""


class _Worker:
    """Runs on a node. No error leaves it but as an answer: Ray would start it again and again."""

    def __init__(self, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self.work: Work | None = None
        self.failed: Answer = {}
        try:
            # Ray sets it for some of its processes alone. faiss reads it when it is loaded, workers of torch themselves
            os.environ["OMP_NUM_THREADS"] = str(int(_ray().get_runtime_context().get_assigned_resources()["CPU"]))
            self.work = make(*arguments)
        except Exception as error:
            self.failed = _told(error)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        answer = self.failed
        if self.work is not None:
            try:
                answer = self.work(json.loads(row["item"]))
            except Exception as error:
                answer = _told(error)
        return {"answer": json.dumps(answer)}


def _told(error: Exception) -> Answer:
    told: dict[str, str] = {"node": _node()}
    if isinstance(error, InputError):
        told |= {name: getattr(error, name) for name in _FIELDS}
    else:
        told["traceback"] = "".join(traceback.format_exception(error))
    return {"error": told}


def _node() -> str:
    """This node, as people know it."""
    ray = _ray()
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, {ray.get_runtime_context().get_node_id()[:8]})"


def _worker_error(told: Mapping[str, str]) -> Exception:
    if "traceback" in told:
        return RuntimeError(f"a worker on node {told['node']} failed:\n{told['traceback']}")
    place = {"where": f"node {told['node']}: {told['where']}"}
    return InputError(told["what"], **{**{name: told[name] for name in _FIELDS[1:]}, **place})


def _explained(error: Exception, place: str) -> InputError:
    """What Ray raised, as one message."""
    text = str(error)
    if "No module named" in text:
        lines = [line for line in text.splitlines() if "No module named" in line]
        return InputError(
            "a node lacks a package", where=place, expected="the same packages on every node", got=lines[-1].strip(),
            fix="install sparring on the nodes, at this version",
        )  # fmt: skip
    if any(name in type(error).__name__ + text for name in ("ActorDied", "ActorUnavailable", "WorkerCrashed", "OutOf")):
        return InputError(
            "workers died at every attempt at a shard", where=place, got=_first_line(error),
            fix=f"look at Ray's logs on the nodes; give more memory, or lower run.encode_tokens; then {_AGAIN}",
        )  # fmt: skip
    return InputError("the cluster's job failed", where=place, got=_first_line(error), fix=_AGAIN)


def _ray() -> Any:
    """ray, imported late."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # what ends late would start a Ray of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data
    except ImportError as error:
        raise InputError(
            "Ray is not installed", where="engine", expected="the extra sparring[ray]", got=str(error),
            fix="pip install 'sparring[ray]'",
        ) from None  # fmt: skip
    return ray


def _require_answer(address: str, seconds: float) -> None:
    """InputError unless something at ``host:port`` takes connections and says that it is Ray.

    A child process asks: Ray's own client ends the process that it cannot connect.
    """
    wrong = {"where": address, "fix": "start Ray there (ray start --head), or give another run.ray_address"}
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError("not an address of Ray", expected="host:port, auto, or local", **wrong)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=min(10.0, seconds)).close()
    except (OSError, OverflowError) as error:
        raise InputError("the cluster cannot be reached", got=str(error), **wrong) from None
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise InputError("no Ray answers there", got=f"silence for {seconds:g} s", **wrong) from None
    if done.returncode:
        got = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise InputError("no Ray answers there", got=got[0], **wrong)


def _within(seconds: float, call: Callable[[], T], what: str, where: str) -> T:
    """What a call returns; InputError when it takes longer (its thread is left behind)."""
    told: _Told[T] = queue.Queue()

    def run() -> None:
        try:
            told.put((call(), None))
        except BaseException as error:
            told.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    return _awaited(told, seconds, what, where)


def _awaited(told: _Told[T], seconds: float, what: str, where: str) -> T:
    """What another thread tells: a value or an error, which is raised; InputError when it takes longer."""
    try:
        value, error = told.get(timeout=seconds)
    except queue.Empty:
        fix = "see whether the nodes are up (ray status), and start it again"
        raise InputError(what, where=where, expected=f"an answer in {seconds:g} s", fix=fix) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
