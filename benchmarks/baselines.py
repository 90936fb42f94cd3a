"""The other arms of speed.py: sentence-transformers as its documentation uses it, faiss as it is installed.

Nothing of these is tuned against them: batch sizes and mini-batches are the library's defaults. Their trainers run
without checkpoints, evaluation and logging; what is timed lies between the beginning and the end of training.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.util import mine_hard_negatives
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

disable_progress_bars()
SURE = 100.0
"""Label of the right passage: ListNet's softmax of (100, 0, ..., 0) is one-hot, so its loss is ours."""


class _Clock(TrainerCallback):  # type: ignore[misc]
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def ranker_lists(queries: Sequence[str], lists: Sequence[Sequence[str]]) -> Dataset:
    """One labelled list a query, the right passage first."""
    labels = [[SURE] + [0.0] * (len(passages) - 1) for passages in lists]
    return Dataset.from_dict({"query": list(queries), "docs": [list(p) for p in lists], "labels": labels})


def train_ranker(model: CrossEncoder, data: Dataset, *, batch: int, steps: int, lr: float, bf16: bool) -> float:
    """CrossEncoderTrainer with ListNetLoss.  -> seconds of training"""
    return _train(CrossEncoderTrainer, CrossEncoderTrainingArguments, model, ListNetLoss(model), data,
                  batch=batch, steps=steps, lr=lr, bf16=bf16)  # fmt: skip


def train_retriever(model: SentenceTransformer, data: Dataset, *, batch: int, steps: int, lr: float, bf16: bool,
                    scale: float) -> float:  # fmt: skip
    """SentenceTransformerTrainer with DistillKLDivLoss on a teacher's scores.  -> seconds of training"""
    loss = DistillKLDivLoss(model, student_temperature=1 / scale, teacher_temperature=1.0)
    return _train(SentenceTransformerTrainer, SentenceTransformerTrainingArguments, model, loss, data,
                  batch=batch, steps=steps, lr=lr, bf16=bf16)  # fmt: skip


def _train(trainer: Any, arguments: Any, model: Any, loss: Any, data: Dataset, *, batch: int, steps: int, lr: float,
           bf16: bool) -> float:  # fmt: skip
    clock = _Clock()
    with tempfile.TemporaryDirectory() as place, quiet():
        settings = arguments(
            output_dir=place, per_device_train_batch_size=batch, max_steps=steps, learning_rate=lr, bf16=bf16,
            use_cpu=model.device.type == "cpu", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        made = trainer(model=model, args=settings, train_dataset=data, loss=loss, callbacks=[clock])
        for callback in (PrinterCallback, ProgressCallback):
            made.remove_callback(callback)
        made.train()
    return clock.seconds


def mine(model: SentenceTransformer, queries: list[str], positives: list[str], corpus: list[str], depth: int) -> Any:
    """mine_hard_negatives: encodes queries and corpus, searches exactly, takes the known positives out.

    -> query -> its ``depth`` best passages, as texts
    """
    data = Dataset.from_dict({"query": queries, "positive": positives})
    with quiet():
        found = mine_hard_negatives(
            data, model, corpus=corpus, num_negatives=depth, output_format="n-tuple", use_faiss=True, verbose=False
        )
    columns = [f"negative_{number}" for number in range(1, depth + 1)]
    return {row["query"]: [row[column] for column in columns] for row in found}


@contextlib.contextmanager
def quiet() -> Any:
    """Progress bars and notes of the libraries go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


_PLAIN = """
import sys, time, numpy, faiss
folder, threads = sys.argv[1], int(sys.argv[2])
faiss.omp_set_num_threads(threads)
index = faiss.IndexFlatIP(int(numpy.load(folder + "/passages.npy", mmap_mode="r").shape[1]))
index.add(numpy.load(folder + "/passages.npy"))
queries = numpy.load(folder + "/queries.npy")
for line in sys.stdin:
    start = time.perf_counter()
    scores, rows = index.search(queries, int(line))
    print(time.perf_counter() - start, flush=True)
"""


class InstalledFaiss:
    """faiss's exact index as it is installed, in a process of its own: its matrix kernels are chosen at import."""

    def __init__(self, passages: np.ndarray, queries: np.ndarray) -> None:
        self.place = tempfile.TemporaryDirectory()
        np.save(f"{self.place.name}/passages.npy", passages)
        np.save(f"{self.place.name}/queries.npy", queries)
        environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", _PLAIN, self.place.name, str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def search(self, k: int) -> float:
        """Seconds of one search of all queries."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{k}\n")
        self.child.stdin.flush()
        return float(self.child.stdout.readline())

    def close(self) -> None:
        """End the process and remove its files."""
        self.child.communicate()
        self.place.cleanup()
