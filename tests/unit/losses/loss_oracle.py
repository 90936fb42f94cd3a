"""The losses once more: float64 NumPy, one query at a time, gradients derived on paper.

Independent of the package and of autograd on purpose. With p = softmax(z), for any weights w:
d(sum_i w_i log p_i)/dz_j = w_j - p_j sum(w), and dp_i/dz_j = p_i (1[i=j] - p_j).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Expected:
    """A loss, its gradient to the retriever's scores and to the ranker's; None: no gradient at all."""

    value: float
    retriever: Array | None
    ranker: Array | None

    def __add__(self, other: Expected) -> Expected:
        return Expected(
            self.value + other.value, _sum(self.retriever, other.retriever), _sum(self.ranker, other.ranker)
        )

    def __rmul__(self, factor: float) -> Expected:
        return Expected(factor * self.value, _scale(factor, self.retriever), _scale(factor, self.ranker))


def _sum(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


def _scale(factor: float, a: Array | None) -> Array | None:
    return None if a is None else factor * a


def log_softmax(x: Array) -> Array:
    shifted: Array = x - x.max()
    return shifted - float(np.log(np.exp(shifted).sum()))


def log_sigmoid(x: Array) -> Array:
    negated: Array = np.logaddexp(0.0, -x)
    return -negated


def list_softmax(s: Array, valid: Array | None = None, queries: int | None = None) -> Expected:
    """-log p_0; gradient p_j - 1[j=0] over the valid columns, 0 elsewhere."""
    gradient, value, count = np.zeros_like(s), 0.0, queries or len(s)
    for q, row in enumerate(s):
        keep = np.ones(len(row), bool) if valid is None else valid[q]
        log_p = log_softmax(row[keep])
        value -= log_p[0] / count
        gradient[q, keep] = np.exp(log_p) / count
        gradient[q, 0] -= 1 / count
    return Expected(value, None, gradient)


def in_batch(s: Array, positive: Array, masked: Array, queries: int | None = None) -> Expected:
    """The same with the positive in any column and the masked columns deleted from the row."""
    gradient, value, count = np.zeros_like(s), 0.0, queries or len(s)
    for q, row in enumerate(s):
        keep = ~masked[q]
        keep[positive[q]] = True
        columns = np.flatnonzero(keep)
        log_p = log_softmax(row[columns])
        value -= log_p[columns == positive[q]].item() / count
        gradient[q, columns] = np.exp(log_p) / count
        gradient[q, positive[q]] -= 1 / count
    return Expected(value, gradient, None)


def adversarial(z: Array, s: Array, variant: str, queries: int | None = None, temperature: float = 1.0) -> Expected:
    """`paper`: p_j (r_j - J) on the negatives; `mean` and `official`: r_j - p_j sum(r), with p/(p+eps) inside."""
    gradient, value, count = np.zeros_like(z), 0.0, queries or len(z)
    for q in range(len(z)):
        if variant == "paper":
            p = np.exp(log_softmax(z[q, 1:] / temperature))
            r = log_sigmoid((s[q, 0] - s[q, 1:]) / temperature)
            value += (p @ r) / count
            gradient[q, 1:] = p * (r - p @ r) / temperature / count
        else:
            r, log_p = log_sigmoid(s[q, 0] - s[q]), log_softmax(z[q])
            v, g = weighted_log(r, log_p, 1e-7 if variant == "official" else 0.0)
            value += v if variant == "official" else v / count
            gradient[q] = g if variant == "official" else g / count
    return Expected(value, gradient, None)


def weighted_log(w: Array, log_p: Array, eps: float) -> tuple[float, Array]:
    """sum_i w_i log(p_i + eps) and its gradient to the logits, c_j - p_j sum(c) with c_i = w_i p_i / (p_i + eps)."""
    p = np.exp(log_p)
    if eps == 0:
        return float(w @ log_p), w - p * w.sum()
    c = w * p / (p + eps)
    return float(w @ np.log(p + eps)), c - p * c.sum()


def distillation(z: Array, s: Array, variant: str, temperature: float, queries: int | None = None) -> Expected:
    """-sum_i t_i log p_i; `paper` has the temperature on both models' logits."""
    gradient, value, count = np.zeros_like(z), 0.0, queries or len(z)
    for q in range(len(z)):
        own = temperature if variant == "paper" else 1.0
        t = np.exp(log_softmax(s[q] / temperature))
        v, g = weighted_log(t, log_softmax(z[q] / own), 1e-7 if variant == "official" else 0.0)
        value -= v / count
        gradient[q] = -g / own / count
    return Expected(value, gradient, None)


def ar2(
    z: Array, s: Array, adv_lambda: float, variant: str, temperature: float = 1.0, queries: int | None = None
) -> Expected:
    return adv_lambda * adversarial(z, s, variant, queries, temperature) + (1 - adv_lambda) * distillation(
        z, s, variant, temperature, queries
    )


def kl(z: Array, s: Array, direction: str, detach: bool, reduction: str, queries: int | None = None) -> Expected:
    """KL(a||b): to a's logits a_j (log a_j/b_j - KL), to b's logits b_j - a_j."""
    gz, gs, value = np.zeros_like(z), np.zeros_like(s), 0.0
    count = queries or len(z)
    factor = {"sum": 1.0, "query_mean": 1 / count, "element_mean": 1 / (count * z.shape[1])}[reduction]
    for q in range(len(z)):
        de, ce = log_softmax(z[q]), log_softmax(s[q])
        a, b = (de, ce) if direction == "de_ce" else (ce, de)
        divergence = np.exp(a) @ (a - b)
        to_a, to_b = np.exp(a) * (a - b - divergence), np.exp(b) - np.exp(a)
        value += factor * divergence
        gz[q], gs[q] = (factor * g for g in ((to_a, to_b) if direction == "de_ce" else (to_b, to_a)))
    return Expected(value, gz, None if detach else gs)


def pointwise(s: Array, queries: int | None = None) -> Expected:
    """(sigmoid(s) - label) / (B n)."""
    pairs = (queries or len(s)) * s.shape[1]
    label = np.zeros_like(s)
    label[:, 0] = 1
    value = -(label * log_sigmoid(s) + (1 - label) * log_sigmoid(-s)).sum() / pairs
    return Expected(float(value), None, (np.exp(log_sigmoid(s)) - label) / pairs)


def diagnostics(z: Array, s: Array, queries: int | None = None) -> dict[str, float]:
    count = queries or len(z)
    entropy = reward = ranker = retriever = 0.0
    for a, b in zip(z, s, strict=True):
        log_p = log_softmax(a)
        entropy -= np.exp(log_p) @ log_p
        reward += np.mean([log_sigmoid(b[0] - x) for x in b[1:]])
        ranker += any(x > b[0] for x in b[1:])
        retriever += any(x > a[0] for x in a[1:])
    names = ("retriever_entropy", "reward", "ranker_prefers_negative", "retriever_prefers_negative")
    return {name: float(x) / count for name, x in zip(names, (entropy, reward, ranker, retriever), strict=True)}


def known_positive_mask(groups: Array, positive_groups: Array, positive: Array) -> Array:
    mask = np.zeros((len(positive), len(groups)), bool)
    for q, label in enumerate(positive):
        known = {int(g) for g in positive_groups[q] if g >= 0} | {int(groups[label])}
        for j, group in enumerate(groups):
            mask[q, j] = j != label and (group < 0 or int(group) in known or group in groups[:j])
    return mask
