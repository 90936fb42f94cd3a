"""Export: both models as plain sentence-transformers folders, proven equal in a fresh process.

The proof is part of the export: a folder appears under its name only after plain ``SentenceTransformer(path)`` and
``CrossEncoder(path)``, in a new Python process, gave the scores that the trained models give in this one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparring.models import Ranker, Retriever
from sparring.models.folder import note_export
from sparring.models.loading import quiet_transformers
from sparring.models.modes import evaluating
from sparring.models.retriever import Kind
from sparring.types import InputError

logger = logging.getLogger("sparring")

TOLERANCE = 1e-5
"""Largest difference of a score, relative for scores above 1."""

QUERIES = ("how do I undo the last commit", "비밀번호를 잊어버렸을 때 어떻게 하나요?", "?")
PASSAGES = (
    "The last commit is undone with a reset; the changes stay in the working tree.",
    "비밀번호 재설정 링크를 이메일로 받아 새 비밀번호를 만듭니다.",
    "A short one.",
    "A long passage that goes on and on, past the limit of many models. " * 40,
)

_FRESH = """
import json, sys
import numpy as np, torch
from sentence_transformers import CrossEncoder, SentenceTransformer
job = json.load(open(sys.argv[1], encoding="utf-8"))
how = {"device": job["device"], "local_files_only": True, **job["options"]}
retriever = SentenceTransformer(job["retriever"], **how)
ranker = CrossEncoder(job["ranker"], **how)
pairs = [(q, p) for q in job["queries"] for p in job["passages"]]
np.savez(job["out"],
    queries=retriever.encode_query(job["queries"], show_progress_bar=False),
    passages=retriever.encode_document(job["passages"], show_progress_bar=False),
    similarity=np.array(retriever.similarity_fn_name),
    logits=ranker.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False),
    predicted=ranker.predict(pairs, show_progress_bar=False))
"""


def export(
    retriever: Retriever,
    ranker: Ranker,
    out: Path,
    *,
    card: Mapping[str, Any],
    probes: tuple[Sequence[str], Sequence[str]] = (QUERIES, PASSAGES),
    trust_remote_code: bool = False,
) -> None:
    """Save ``out/retriever`` and ``out/ranker`` and prove that a fresh process gives the same scores.

    Args:
        retriever, ranker: the trained pair.
        out: folder of the run.
        card: what the model cards say. Known keys: ``retriever`` and ``ranker`` (what they started from), ``data``,
            ``recipe``, ``command`` (text), ``metrics`` (row name -> column name -> value), ``fusion`` (what the
            similarity is multiplied with before it is added to the ranker's logit; 0: the ranker alone orders);
            further keys are listed.
        probes: queries and passages that are scored in both processes.
        trust_remote_code: let the fresh process run code that the models bring along.

    Raises:
        InputError: a folder exists and is not empty, or the scores differ. Then nothing appears under ``out``.
    """
    places = {"retriever": out / "retriever", "ranker": out / "ranker"}
    for place in places.values():
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise InputError(
                "The output already exists.", where=str(place), expected="no such folder, or an empty one",
                got="other files", fix="choose another output folder",
            )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".export-*"):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=out))
    try:
        models = {"retriever": retriever.model, "ranker": ranker.model}
        for name, model in models.items():
            with quiet_transformers():
                model.save_pretrained(str(aside / name), create_model_card=False, safe_serialization=True)
            text = _retriever_card(retriever, card) if name == "retriever" else _ranker_card(card)
            (aside / name / "README.md").write_text(text, encoding="utf-8")
        queries, passages = probes
        verify_export(
            aside / "retriever", aside / "ranker", retriever, ranker, queries, passages,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        for name, place in places.items():
            note_export(aside / name)
            if place.exists():
                place.rmdir()
            os.replace(aside / name, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def verify_export(
    path_retriever: Path,
    path_ranker: Path,
    retriever: Retriever,
    ranker: Ranker,
    queries: Sequence[str],
    passages: Sequence[str],
    *,
    trust_remote_code: bool = False,
) -> float:
    """Compare the saved models, loaded plainly in a fresh process, with the ones in memory, in float32.

    Compared are the similarities of all queries with all passages, the ranker's logits and what ``predict`` returns.

    Returns:
        The largest difference found (relative for scores above 1).

    Raises:
        InputError: the fresh process failed, or a difference is above 1e-5.
    """
    options = {"trust_remote_code": True} if trust_remote_code else {}
    fresh = _fresh_scores(path_retriever, path_ranker, str(retriever.device), options, queries, passages)
    here = _scores(retriever, ranker, queries, passages)
    if fresh.pop("similarity") != here.pop("similarity"):
        raise InputError("The export lost its similarity.", where=str(path_retriever), expected=retriever.similarity)
    differences = {
        name: float(np.max(np.abs(fresh[name] - value) / np.maximum(1.0, np.abs(value)), initial=0.0))
        for name, value in here.items()
    }
    worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
    if not differences[worst] <= TOLERANCE:
        raise InputError(
            "The exported models give other scores than the trained ones.", where=f"{path_retriever}, {path_ranker}",
            expected=f"differences up to {TOLERANCE:g}", got=f"{differences[worst]:.3g} in the {worst}",
            fix="please report this with the versions that `sparring doctor` shows",
        )  # fmt: skip
    logger.info("export verified in a fresh process: largest difference %.2g", differences[worst])
    return differences[worst]


def _scores(
    retriever: Retriever, ranker: Ranker, queries: Sequence[str], passages: Sequence[str]
) -> dict[str, np.ndarray]:
    """The probes' scores by the models in memory, through stored tokens, without autocast, by the products that a fresh
    process uses too."""
    rows = np.divmod(np.arange(len(queries) * len(passages)), len(passages))
    with evaluating(retriever, fuse=False), evaluating(ranker, fuse=False):
        embedded = [_embed(retriever, queries, "query"), _embed(retriever, passages, "passage")]
        tokens = ranker.tokenize(queries, None, "query"), ranker.tokenize(passages, None, "passage")
        logits = ranker(ranker.batches(tokens[0], rows[0], tokens[1], rows[1], token_budget=8192))
        predicted = ranker.model.activation_fn(logits)
    return {
        "similarity": np.array(retriever.similarity),
        "embedding scores": embedded[0] @ embedded[1].T,
        "logits": logits.cpu().numpy(),
        "predictions": predicted.cpu().numpy(),
    }


def _embed(retriever: Retriever, texts: Sequence[str], kind: Kind) -> np.ndarray:
    store = retriever.tokenize(texts, kind, None)
    vectors = retriever(retriever.batches(store, range(len(texts)), kind, token_budget=8192), kind)
    embedded: np.ndarray = vectors.cpu().numpy()
    return embedded


def _fresh_scores(
    path_retriever: Path,
    path_ranker: Path,
    device: str,
    options: Mapping[str, bool],
    queries: Sequence[str],
    passages: Sequence[str],
) -> dict[str, np.ndarray]:
    """The probes' scores by plain sentence-transformers objects in a new Python process."""
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Any] = {
            "retriever": str(path_retriever.resolve()), "ranker": str(path_ranker.resolve()), "device": device,
            "options": dict(options), "queries": list(queries), "passages": list(passages),
            "out": f"{folder}/scores.npz",
        }  # fmt: skip
        (Path(folder) / "job.json").write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
        command = [sys.executable, "-c", _FRESH, f"{folder}/job.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise InputError(
                "The exported models do not load in a fresh process.", where=f"{path_retriever}, {path_ranker}",
                got=done.stderr.strip()[-2000:],
            )  # fmt: skip
        with np.load(job["out"], allow_pickle=False) as found:
            queries_, passages_ = found["queries"], found["passages"]
            if str(found["similarity"]) == "cosine":
                queries_, passages_ = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (queries_, passages_))
            return {
                "similarity": found["similarity"],
                "embedding scores": queries_ @ passages_.T,
                "logits": found["logits"].reshape(-1),
                "predictions": found["predicted"].reshape(-1),
            }


def _retriever_card(retriever: Retriever, card: Mapping[str, Any]) -> str:
    usage = (
        'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("path/to/retriever")\n'
        'queries = model.encode_query(["a question"])\npassages = model.encode_document(["a passage"])\n'
        "scores = model.similarity(queries, passages)"
    )
    prompts = {kind: read.prompt for kind, read in retriever.inputs.items() if read.prompt}
    facts = {
        "similarity": f"{retriever.similarity} (training scale {retriever.scale:g})",
        "dimensions": retriever.dim,
        "longest input": ", ".join(f"{kind} {read.max_length} tokens" for kind, read in retriever.inputs.items()),
        **({"prompts": json.dumps(prompts, ensure_ascii=False)} if prompts else {}),
    }
    return _card("Retriever", "sentence-similarity", card.get("retriever"), usage, facts, card)


def _ranker_card(card: Mapping[str, Any]) -> str:
    usage = (
        'from sentence_transformers import CrossEncoder\n\nmodel = CrossEncoder("path/to/ranker")\n'
        'scores = model.predict([("a question", "a passage")])'
    )
    if card.get("fusion"):
        usage += "\n\n" + _FUSED.format(weight=card["fusion"])
    return _card("Re-ranker", "text-ranking", card.get("ranker"), usage, {}, card)


_FUSED = """# The pair was evaluated as a cascade in the order of both models' scores:
import torch
from sentence_transformers import SentenceTransformer

retriever = SentenceTransformer("path/to/retriever")
question, found = "a question", ["a passage", "another passage"]  # found by the retriever
similarity = retriever.similarity(retriever.encode_query([question]), retriever.encode_document(found))[0].cpu().numpy()
logits = model.predict([(question, passage) for passage in found], activation_fn=torch.nn.Identity())
best_first = (logits + {weight:g} * similarity).argsort()[::-1]"""


def _card(
    title: str, pipeline: str, base: object, usage: str, facts: Mapping[str, Any], card: Mapping[str, Any]
) -> str:
    """A model card: front matter, what it is, how to use it, metrics, and the command that made it."""
    known = {"retriever", "ranker", "data", "recipe", "command", "metrics", "fusion"}
    lines = ["---", "library_name: sentence-transformers", f"pipeline_tag: {pipeline}", "tags:", "- sparring", "---"]
    lines += [f"# {title}", "", "Trained with Sparring together with its partner in the folder beside this one.", ""]
    listed = {"started from": base, "data": card.get("data"), "recipe": card.get("recipe"), **facts}
    listed |= {key: value for key, value in card.items() if key not in known}
    lines += [f"- {key}: {value}" for key, value in listed.items() if value not in (None, "")]
    lines += ["", "## Use", "", "```python", usage, "```"]
    if card.get("metrics"):
        lines += ["", "## Metrics", "", *_metrics(card["metrics"])]
    if card.get("command"):
        lines += ["", "## Command", "", "```", str(card["command"]), "```"]
    return "\n".join(lines) + "\n"


def _metrics(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    cells = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, values in rows.items():
        shown = [values.get(column, "") for column in columns]
        cells.append([name, *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in shown)])
    return ["| " + " | ".join(row) + " |" for row in cells]
