"""Steps that more than one recipe takes: supervised, one model at a time. A method's own step is in its own file."""

from __future__ import annotations

from torch import Tensor

from sparring.losses import Terms, diagnostics, in_batch, list_softmax
from sparring.phases.fit import ListBatch, Scorer, Step


def in_batch_step() -> Step:
    """In-batch (cross-batch with several processes) negatives plus each query's own hard ones; known positives and
    repeated texts masked."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        scores, positive, masked = score.in_batch(batch)
        loss = in_batch(scores, positive, masked, batch.total)
        return Terms(loss, {"retriever_in_batch": loss.detach()}), {}

    return Step("retriever in-batch", ("retriever",), function, joins_queries=True)


def ranker_step() -> Step:
    r"""$\max_\phi \log p_\phi(d^+ \mid q; D_q)$ over 1 + n passages, the retriever at rest (AR2 Eq. 7)."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        scores = score.ranker(batch)
        loss = list_softmax(scores, queries=batch.total)
        return Terms(loss, {"ranker_supervised": loss.detach()}), _watch(scores, "reward", "ranker_prefers_negative")

    return Step("ranker listwise", ("ranker",), function)


def retriever_step() -> Step:
    r"""$-\log \mathrm{softmax}(z)_{d^+}$ over the same lists: hard labels, no teacher (ANCE, listwise)."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        scores = score.retriever(batch)
        loss = list_softmax(scores, queries=batch.total)
        watched = _watch(scores, "retriever_entropy", "retriever_prefers_negative")
        return Terms(loss, {"retriever_supervised": loss.detach()}), watched

    return Step("retriever listwise", ("retriever",), function)


def _watch(scores: Tensor, *names: str) -> dict[str, Tensor]:
    """The diagnostics that one model's scores tell."""
    found = diagnostics(scores, scores)
    return {name: found[name] for name in names}
