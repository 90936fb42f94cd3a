"""The supervised losses and the diagnostics on numbers that a reader can check in the head."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.losses import diagnostics, in_batch, known_positive_mask, list_softmax

LN2, LN3 = math.log(2), math.log(3)


def test_list_softmax() -> None:
    """Three equal scores: ln 3. With one passage missing: ln 2. The mean of ln 3 and ln 2 over two queries."""
    scores = torch.zeros(2, 3, dtype=torch.float64)
    assert list_softmax(scores).item() == pytest.approx(LN3)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    assert list_softmax(scores, valid).item() == pytest.approx((LN3 + LN2) / 2)
    assert list_softmax(scores, queries=8).item() == pytest.approx(2 * LN3 / 8)


def test_in_batch_without_false_negatives() -> None:
    """Two queries, columns [a, b, a again, c]; query 0 is labelled a, query 1 is labelled b and also knows c.

    Query 0 drops the second a: of scores (ln 2, 0, ., 0) p = 2/4, loss ln 2.
    Query 1 drops the second a and c: of scores (0, 0, ., .) p = 1/2, loss ln 2. Mean ln 2.
    Unmasked, query 0's loss would be -ln(2/6) = ln 3 (its copy in the denominator, against itself).
    """
    scores = torch.tensor([[LN2, 0, LN2, 0], [0, 0, 0, 9]], dtype=torch.float64)
    positive = torch.tensor([0, 1])
    masked = known_positive_mask(torch.tensor([5, 6, 5, 7]), torch.tensor([[5, -1], [6, 7]]), positive)
    assert masked.tolist() == [[False, False, True, False], [False, False, True, True]]
    assert in_batch(scores, positive, masked).item() == pytest.approx(LN2)
    nothing = torch.zeros_like(masked)
    assert in_batch(scores[:1], positive[:1], nothing[:1]).item() == pytest.approx(LN3)


def test_diagnostics() -> None:
    """Retriever [0, 0] has entropy ln 2; a ranker gap of ln 3 the reward ln sigma(ln 3) = ln 3/4 or ln 1/4.

    The ranker prefers the negative in the second list only; the retriever's ties are no preference.
    """
    retriever = torch.zeros(2, 2, dtype=torch.float64)
    ranker = torch.tensor([[LN3, 0], [0, LN3]], dtype=torch.float64)
    got = {name: value.item() for name, value in diagnostics(retriever, ranker).items()}
    assert got == {
        "retriever_entropy": pytest.approx(LN2),
        "reward": pytest.approx((math.log(3 / 4) + math.log(1 / 4)) / 2),
        "ranker_prefers_negative": 0.5,
        "retriever_prefers_negative": 0.0,
    }
