"""What a check gives back: findings with a level, and the report that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["error", "warning", "info"]
EXAMPLES = 5
"""Examples kept per finding."""


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        level: "error", "warning" or "info".
        code: a stable short name: ``duplicate-passage-id``.
        count: how many rows, ids or pairs are concerned.
        message: one sentence.
        examples: up to :data:`EXAMPLES`, with file:line where there is one.
        fix: what to do.
        details: numbers that belong to it (percentiles, shares).
    """

    level: Level
    code: str
    count: int
    message: str
    examples: tuple[str, ...] = ()
    fix: str = ""
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings of one dataset, errors first. ``counts`` has its sizes."""

    source: str
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What has to be corrected."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What deserves a look."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def rows(self) -> list[tuple[str, str, int, str, str, str]]:
        """(level, code, count, message, examples, what to do) for a table."""
        return [(f.level, f.code, f.count, f.message, "; ".join(f.examples), f.fix) for f in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "source": self.source,
            "counts": dict(self.counts),
            "errors": len(self.errors),
            "findings": [asdict(finding) | {"examples": list(finding.examples)} for finding in self.findings],
        }


def finding(
    level: Level,
    code: str,
    examples: Sequence[str],
    message: str,
    fix: str = "",
    count: int | None = None,
    **details: float,
) -> list[Finding]:
    """One finding, or none when nothing was found."""
    count = len(examples) if count is None else count
    return [Finding(level, code, count, message, tuple(examples[:EXAMPLES]), fix, details)] if count else []
