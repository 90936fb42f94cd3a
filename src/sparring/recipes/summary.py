"""The end of a run for people: before, after each round, with intervals; and plainly whether it helped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparring.log import table
from sparring.phases.evaluate import CASCADE, RETRIEVER, Row, Table, verdict
from sparring.phases.stats import paired_test
from sparring.recipes.tables import result_table

if TYPE_CHECKING:
    from sparring.recipes.experiment import Experiment


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured. Dev tables are one for the warm start and one a round; test tables are the warm
    start's and, where it is another pair, the best one's. ``fusion``: the retriever's weight in the best pair's
    cascade, 0 where the ranker alone orders it; ``scale``: what its similarity is multiplied with."""

    best: str
    dev_rows: Sequence[Row]
    dev_tables: Sequence[tuple[str, Table]]
    test_rows: Sequence[Row]
    test_tables: Sequence[tuple[str, Table]]
    select_by: str
    measures: Sequence[str]
    fusion: float = 0.0
    scale: float = 1.0

    @property
    def best_test(self) -> Table:
        """The exported pair's rows on test."""
        return self.test_tables[-1][1]

    def sentences(self) -> list[str]:
        """What came out, in plain words."""
        measure = self.select_by
        lines = []
        if self.best == "warm start":
            lines.append("No round beat the warm start's cascade on dev: the exported pair is the warm start.")
        else:
            lines += [self._gain(row) for row in (RETRIEVER, CASCADE)]
        pair = self.best_test
        lines.append(verdict(pair.row(RETRIEVER), pair.row(CASCADE), measure=measure))
        if self.fusion:
            lines.append(f"The cascade orders by {fused_order(self.fusion, self.scale)}, not by the ranker alone.")
        return lines

    def _gain(self, name: str) -> str:
        before, after = self.test_tables[0][1].row(name), self.best_test.row(name)
        measure = self.select_by
        test = paired_test(after.values[measure], before.values[measure])
        word = "better than" if test.difference > 0 else "worse than"
        if test.p_randomisation >= 0.05:
            word = "not significantly different from"
        return (
            f"After training ({self.best}) the {name} is {word} the warm start's on test ({measure} "
            f"{before.estimates[measure].mean:.4f} -> {after.estimates[measure].mean:.4f}, "
            f"p = {test.p_randomisation:.4f}, {test.queries} queries)."
        )

    def to_dict(self, forwards: Mapping[str, int]) -> dict[str, Any]:
        """For results.json."""
        return {
            "best": self.best,
            "select_by": self.select_by,
            "fusion": self.fusion,
            "forwards": dict(forwards),
            "dev": [row.as_dict() for row in self.dev_rows] + _named(self.dev_tables),
            "test": [row.as_dict() for row in self.test_rows] + _named(self.test_tables),
            "sentences": self.sentences(),
        }


def _named(tables: Sequence[tuple[str, Table]]) -> list[dict[str, Any]]:
    return [{**row.as_dict(), "name": f"{name}: {row.name}"} for name, found in tables for row in found.rows]


def fused_order(fusion: float, scale: float) -> str:
    """What a cascade with fusion orders by."""
    return f"ranker logit + {fusion * scale:g} x similarity"


def refresh_sentences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What focused refreshes encoded and may have missed; none where all of them encoded everything."""
    lines = []
    for record in records:
        if record["kind"] == "refresh" and "encoded" in record:
            share = f"{record['encoded_share']:.0%}"
            text = f"Refresh {record['generation']} encoded {record['encoded']:,} passages ({share})"
            if "train_missed" in record:
                text += (
                    f"; share of list entries missed {record['train_missed']:.4f}, "
                    f"at most {record['train_missed_upper']:.4f}"
                )
            lines.append(text + (": whole." if record["whole"] else ": dev's rows are from a mix of generations."))
    return lines


def training_table(records: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Means of every training phase: loss terms, retriever entropy, reward, share of lists where a negative is
    preferred; and how much of the pool each refresh kept."""
    fits = [record for record in records if record["kind"] == "fit"]
    overlaps = {r["generation"]: r["pool_overlap"] for r in records if r["kind"] == "refresh"}
    terms = list(dict.fromkeys(name for record in fits for name in record if name not in _NO_TERMS))
    rows: list[list[str]] = []
    for record in fits:
        values = [f"{record[name]:.4f}" if name in record else "" for name in terms]
        rows.append([record["phase"], str(record["steps"]), str(record["lists"]), *values])
    kept = "; ".join(f"{name} {share:.2f}" for name, share in overlaps.items() if share is not None)
    text = table(rows, ["phase", "updates", "lists", *terms], markdown=markdown) if fits else "No training phase."
    return text + (f"\n\nShare of each refreshed pool that was in the pool before: {kept}." if kept else "")


_NO_TERMS = {
    "kind", "seconds", "phase", "steps", "queries_per_step", "passages_per_list", "lists", "lists_too_short",
    "forwards",
}  # fmt: skip


def summarise(x: Experiment, outcome: Outcome, *, markdown: bool = False) -> str:
    """Dev and test tables, the plain sentences, the forwards and where the time went."""
    head = "## " if markdown else ""
    counts = x.forwards.to_dict()
    total = sum(seconds for _, seconds, _ in x.run.phases)
    slowest = sorted(x.run.phases, key=lambda phase: -phase[1])[:5]
    lines = [
        f"{head}Dev ({len(x.dev.rows)} queries), means with 95 % intervals", "",
        result_table(outcome.dev_rows, outcome.dev_tables, outcome.measures, markdown=markdown), "",
        f"{head}Test ({len(x.test.rows)} queries), read once, means with 95 % intervals", "",
        result_table(outcome.test_rows, outcome.test_tables, outcome.measures, markdown=markdown), "",
        *(f"- {sentence}" for sentence in (*outcome.sentences(), *x.audits.sentences())),
        *(f"- WARNING, {warning}" for warning in x.watch.warnings()),
        *(f"- {sentence}" for sentence in refresh_sentences(x.run.metrics.records)),
        *([f"- {x.corrections}"] if x.corrections.verdicts else []), "",
        f"{head}Training, means over the updates of each phase", "",
        training_table(x.run.metrics.records, markdown=markdown), "",
        "Query-passage forwards after the warm start: retriever {retriever_trained} trained; ranker {ranker_trained} "
        "trained, {ranker_teacher} as teacher (no gradient). Evaluation is not counted.".format(**counts),
        f"Time {total:.0f} s; longest: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds, _ in slowest)
        + f"; peak memory {max(memory for _, _, memory in x.run.phases) / 2**30:.1f} GiB",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
