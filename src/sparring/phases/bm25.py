"""Lexical search with BM25, the baseline row and the warm start's negatives. The only home of bm25s.

Tokens are made for any script: NFC, lower case, runs of letters, digits and marks. Korean particles stick to their
noun and Chinese or Japanese has no spaces, so a run in those scripts gives itself and its character bigrams.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from sparring.log import progress
from sparring.types import InputError

_HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"
_CJK = _HANGUL + "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BATCH = 4096


class Texts(Protocol):
    """What BM25 needs of a table of texts."""

    def __len__(self) -> int: ...

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]: ...


def bm25(
    corpus: Texts, queries: Texts, query_rows: np.ndarray, k: int, *, k1: float = 1.5, b: float = 0.75
) -> tuple[np.ndarray, np.ndarray]:
    """The k passages of highest BM25 score (Lucene's form) for each query.

    Returns:
        (scores float32 [Q, k], rows int64 [Q, k]), best first, equal scores by row; k is clipped to the corpus.
        Only passages that share a token with the query are results: the rest of a list is row -1, score -inf.

    Raises:
        InputError: an empty corpus or k < 1.
    """
    index = Bm25(_stream(corpus, np.arange(len(corpus))), len(corpus), k1=k1, b=b)
    return index.search(_stream(queries, np.asarray(query_rows)), len(query_rows), k)


class Bm25:
    """A BM25 index over ``count`` texts; only token numbers are kept, not the texts."""

    def __init__(self, texts: Iterable[str], count: int, *, k1: float = 1.5, b: float = 0.75) -> None:
        import bm25s

        if not count:
            raise InputError("no passages to index", where="corpus", expected="at least one passage", got="none")
        vocabulary: dict[str, int] = {}
        ids: list[array[int]] = []
        with progress("BM25 index", total=count, unit="passages") as bar:
            for text in texts:
                ids.append(array("i", (vocabulary.setdefault(t, len(vocabulary)) for t in tokens(text))))
                bar.update()
        assert len(ids) == count, (len(ids), count)
        self.count, self.vocabulary = count, vocabulary
        self._model = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        if vocabulary:
            tokenized = bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary)
            self._model.index(tokenized, create_empty_token=False, show_progress=False)

    def search(self, texts: Iterable[str], count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Like :func:`bm25`, for ``count`` query texts."""
        if k < 1:
            raise InputError("a search needs at least one result", where="k", expected="1 or more", got=str(k))
        k = min(k, self.count)
        scores = np.full((count, k), -np.inf, dtype=np.float32)
        rows = np.full((count, k), -1, dtype=np.int64)
        with progress("BM25 search", total=count, unit="queries") as bar:
            for i, text in enumerate(texts):
                found = [self.vocabulary[t] for t in tokens(text) if t in self.vocabulary]
                if found:
                    best = _top(self._model.get_scores_from_ids(found), k)
                    scores[i, : len(best[0])], rows[i, : len(best[1])] = best
                bar.update()
        return scores, rows


def _top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to k positive scores, best first, equal scores by row, with their rows."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        found = scores[rows]
        rows = rows[found >= np.partition(found, len(found) - k)[len(found) - k]]
    rows = rows[np.lexsort((rows, -scores[rows]))][:k]
    return scores[rows], rows


def tokens(text: str) -> list[str]:
    """Tokens of a text: ``"S3에서 Copying"`` -> ``["s3", "에서", "copying"]``; 데이터를 -> itself, 데이, 이터, 터를."""
    result: list[str] = []
    for match in _pattern().finditer(unicodedata.normalize("NFC", text).lower()):
        run = match.group()
        result.append(run)
        if match.lastgroup == "cjk" and len(run) > 2:
            result.extend(run[i : i + 2] for i in range(len(run) - 1))
    return result


@functools.cache
def _pattern() -> re.Pattern[str]:
    r"""Runs of ``\w`` and combining marks (which ``\w`` leaves out, cutting Hindi or Thai words), split at CJK runs."""
    marks = "".join(re.escape(chr(i)) for i in range(0x300, 0x10000) if unicodedata.category(chr(i)) in ("Mn", "Mc"))
    return re.compile(rf"(?P<cjk>(?:(?=\w)[{_CJK}])+)|(?P<word>(?:(?![{_CJK}])[\w{marks}])+)")


def _stream(table: Texts, rows: np.ndarray) -> Iterator[str]:
    for start in range(0, len(rows), _BATCH):
        yield from table.texts(rows[start : start + _BATCH])
