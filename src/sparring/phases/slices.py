"""Queries in groups: by length, with bins chosen from the data, and by script, from Unicode's character names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparring.phases.stats import Estimate, interval

DOMINANT = 0.8
"""A text is in one script when at least this share of its letters is; else it is mixed."""
NO_LETTERS = "no letters"
_NAMES = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana"}


@dataclass(frozen=True)
class Slice:
    """Some of the queries, and how the systems do on them.

    Attributes:
        name: what these queries share.
        rows: places of these queries, int64 [k].
        before: mean and interval of each system before, by the system's name.
        after: the same after; empty where nothing was compared.
        difference: mean of after - before with its interval; empty likewise.
    """

    name: str
    rows: np.ndarray
    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]


def script(text: str) -> str:
    """The script of a text's letters: "Latin", "Hangul", "Han", "Kana", ..., "mixed (Hangul, Latin)" or "no letters".

    A letter's script is the first word of its Unicode name after compatibility normalisation (NFKC). Kana decides over
    the Han characters that stand beside it, as in Japanese. This is the script, not the language.
    """
    letters = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c).startswith("L"))
    counts = Counter(_script_of(letter) for letter in letters)
    if counts["Kana"]:
        counts["Kana"] += counts.pop("Han", 0)
    if not (total := sum(counts.values())):
        return NO_LETTERS
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if ranked[0][1] >= DOMINANT * total:
        return ranked[0][0]
    return f"mixed ({', '.join(sorted(name for name, _ in ranked[:2]))})"


def _script_of(letter: str) -> str:
    word = unicodedata.name(letter, "OTHER").split()[0]
    return _NAMES.get(word, word.capitalize())


def by_script(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of the texts of each script, the most frequent first."""
    scripts = np.array([script(text) for text in texts], dtype=object)
    ranked = sorted(Counter(scripts.tolist()).items(), key=lambda item: (-item[1], item[0]))
    return {name: np.flatnonzero(scripts == name) for name, _ in ranked}


def by_length(lengths: Sequence[int] | np.ndarray, bins: int = 4) -> dict[str, np.ndarray]:
    """Rows of each bin of lengths, the shortest first: at most ``bins`` of about equal size, cut at quantiles of the
    data. Equal lengths stay together, so there are fewer bins where few lengths differ. Names are "5" or "6 to 9"."""
    values = np.asarray(lengths, dtype=np.int64)
    if not len(values):
        return {}
    shares = np.arange(1, bins) / bins
    cuts = np.unique([*np.quantile(values, shares, method="inverted_cdf"), values.max()]).astype(np.int64)
    found, low = {}, int(values.min())
    for cut in cuts.tolist():
        rows = np.flatnonzero((values >= low) & (values <= cut))
        found[str(cut) if low == cut else f"{low} to {cut}"] = rows
        low = cut + 1
    return found


def measured(
    groups: Mapping[str, np.ndarray],
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> list[Slice]:
    """Means with 95 % intervals of each group's queries.

    Args:
        groups: name -> rows of the queries.
        before, after: system -> one measure's value of every query, float64 [Q]; the same systems in both.
        seed: of the bootstrap.
    """
    found = []
    for name, rows in groups.items():
        parts = before, after or {}, {system: values - before[system] for system, values in (after or {}).items()}
        means = ({system: interval(values[rows], seed) for system, values in part.items()} for part in parts)
        found.append(Slice(name, rows, *means))
    return found
