"""What one state of the retriever found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparring.phases.pools import Pools

Lists = tuple[np.ndarray, np.ndarray]
"""Ranked lists of a split's queries: scores [Q, K] and passage rows [Q, K], best first; row -1 is no result."""


@dataclass(frozen=True)
class Generation:
    """What one state of the retriever found: pools for training, ranked lists of the dev and test queries."""

    name: str
    pools: Pools
    lists: Mapping[str, Lists]
