"""What a comparison found: one table, paired tests, and a sentence that says which pair to ship."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparring import __version__
from sparring.log import table
from sparring.phases.evaluate import CASCADE, FIXED, RETRIEVER, Row
from sparring.phases.stats import Estimate, holm, interval, paired_test
from sparring.recipes.arms import JOINT, Arm

ROWS = (RETRIEVER, FIXED, CASCADE)
LEAST_SEEDS, LEAST_QUERIES = 2, 30
ALPHA = 0.05

COUNTS = (
    "The budget counts query-passage forwards that train a model after the warm start: queries x passages of their "
    "lists, for each model alone. Teacher forwards (no gradient) differ by recipe and stand beside it; evaluation is "
    "not counted."
)


@dataclass(frozen=True)
class Evidence:
    """What the arms left behind. ``results``: by arm name, for each seed the rows and facts of its ``arm.npz``."""

    arms: Sequence[Arm]
    seeds: Sequence[int]
    baseline: str
    budget: int
    measure: str
    measures: Sequence[str]
    results: Mapping[str, Sequence[tuple[list[Row], dict[str, Any]]]]
    tuning: Mapping[str, Sequence[Mapping[str, float]]]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One measure of one row over seeds.

    The interval is over queries, of each query's mean over the seeds; ``seed_sd`` is the standard deviation of the
    seeds' means (NaN for one seed).
    """

    estimate: Estimate
    per_seed: tuple[float, ...]

    @property
    def seed_sd(self) -> float:
        """Standard deviation (n - 1) of the seeds' means; NaN for one seed."""
        return float(np.std(self.per_seed, ddof=1)) if len(self.per_seed) > 1 else math.nan

    def __str__(self) -> str:
        spread = "" if math.isnan(self.seed_sd) else f" ±{self.seed_sd:.3f}"
        mean, low, high = self.estimate
        return f"{mean:.3f}{spread}" if math.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]{spread}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN is None."""
        values = {**self.estimate._asdict(), "seed_sd": self.seed_sd}
        return {k: None if math.isnan(v) else v for k, v in values.items()} | {"per_seed": list(self.per_seed)}


Cells = Mapping[str, Mapping[str, Cell]]
"""Row name -> measure -> cell."""


@dataclass(frozen=True)
class Test:
    """An arm against another on the same queries, each query's value being its mean over the seeds."""

    arm: str
    against: str
    row: str
    measure: str
    difference: float
    low: float
    high: float
    p_randomisation: float
    p_t: float
    p_holm: float
    queries: int

    @property
    def significant(self) -> bool:
        """Whether the Holm-adjusted randomisation test is below .05."""
        return self.p_holm < ALPHA

    def __str__(self) -> str:
        return (
            f"{self.difference:+.4f} {self.measure} [{self.low:+.4f}, {self.high:+.4f}], "
            f"Holm-adjusted p = {self.p_holm:.4f}"
        )


@dataclass(frozen=True)
class ArmResult:
    """One arm over the seeds; ``seconds`` is the median of a seed's training, the shared warm start left out."""

    arm: Arm
    cells: Cells
    dev: tuple[float, ...]
    kept: tuple[str, ...]
    seconds: float
    peak_memory_mb: int
    forwards: Mapping[str, int]
    factor: float
    settings: Mapping[str, Any]


def is_joint(result: ArmResult) -> bool:
    """Whether a model learns from the other while both change; `static` freezes the ranker."""
    return result.arm.recipe in JOINT and not result.settings.get("static", False)


def fusion_of(settings: Mapping[str, Any]) -> float:
    """The retriever's weight in an arm's cascade."""
    return float(settings.get("fusion", 0.0))


def control_of(arm: ArmResult, results: Sequence[ArmResult], baseline: str) -> str:
    """Which arm tells what joint training brought: the baseline; where that orders its cascade by other scores, an arm
    of the baseline's recipe that orders as this one does. "" where there is none."""
    own = next(result for result in results if result.arm.name == baseline)
    alike = [own, *(r for r in results if r.arm.recipe == own.arm.recipe and not is_joint(r))]
    wanted = fusion_of(arm.settings)
    return next((result.arm.name for result in alike if fusion_of(result.settings) == wanted), "")


_UNTOLD = (
    "How much of that is training was not asked: its cascade orders by both scores, which any pair can do. The arm "
    "{recipe}:fusion={fusion} tells."
)


@dataclass(frozen=True)
class Shipped:
    """The pair to ship: chosen on dev alone, first the arm (mean over seeds), then its best seed."""

    arm: Arm
    seed: int
    dev: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. ``references``: BM25, the models as they came, and the warm start."""

    evidence: Evidence
    references: Mapping[str, Cells]
    results: Sequence[ArmResult]
    tests: Sequence[Test]
    warnings: Sequence[str]

    def result(self, name: str) -> ArmResult:
        """One arm's."""
        return next(result for result in self.results if result.arm.name == name)

    def test(self, arm: str, against: str, row: str = CASCADE) -> Test:
        """One arm's test."""
        return next(t for t in self.tests if (t.arm, t.against, t.row) == (arm, against, row))

    @cached_property
    def shipped(self) -> Shipped:
        """By the cascade on dev; the first of equal arms."""
        best = max(self.results, key=lambda result: float(np.mean(result.dev)))
        place = int(np.argmax(best.dev))
        return Shipped(best.arm, self.evidence.seeds[place], best.dev[place])

    def shipped_rows(self) -> dict[str, dict[str, Estimate]]:
        """The shipped pair's own rows on test: that one seed's."""
        place = list(self.evidence.seeds).index(self.shipped.seed)
        rows, _ = self.evidence.results[self.shipped.arm.name][place]
        return {row.name: dict(row.estimates) for row in rows[-len(ROWS) :]}

    @cached_property
    def sentences(self) -> list[str]:
        """For a reader who knows neither method: what to ship, and whether joint training earned its cost here."""
        return [self._what_to_ship(), *self._joint(), *self._pair()]

    def _what_to_ship(self) -> str:
        shipped, measure = self.shipped, self.evidence.measure
        after = self.result(shipped.arm.name).cells[CASCADE][measure].estimate
        before = self.references["warm start"][CASCADE][measure].estimate
        return (
            f"Ship the pair of {shipped.arm.name}, seed {shipped.seed}: the best on dev. On test the cascade of "
            f"{shipped.arm.name} has {measure} {after.mean:.3f} [{after.low:.3f}, {after.high:.3f}], the mean of "
            f"{len(self.evidence.seeds)} seed(s), from {before.mean:.3f} at the shared warm start."
        )

    def _joint(self) -> list[str]:
        baseline = self.evidence.baseline
        joint = [r for r in self.results if is_joint(r) and r.arm.name != baseline]
        if not joint or is_joint(self.result(baseline)):
            return ["Whether joint training earns its cost was not asked: that takes a joint arm and a separate one."]
        best = max(joint, key=lambda result: float(np.mean(result.dev)))
        fusion = {"fusion": f"{fusion_of(best.settings):g}"}
        control = control_of(best, self.results, baseline)
        against = control or baseline
        test, cost = self.test(best.arm.name, against), best.seconds / self.result(against).seconds
        if test.significant and test.difference > 0:
            word = "Joint training earned its cost here"
        elif test.significant:
            word = "Joint training did NOT earn its cost here: it lost quality"
        else:
            word = "Joint training did NOT earn its cost here: no significant difference"
        return [
            f"{word}. Its best arm on dev, {best.arm.name}, against {against}, cascade on test: {test}, "
            f"at {cost:.1f} times the training time."
        ] + ([] if control else [_UNTOLD.format(recipe=self.result(baseline).arm.recipe, **fusion)])

    def _pair(self) -> list[str]:
        cells = self.result(self.shipped.arm.name).cells
        own, measure = self.test(self.shipped.arm.name, self.shipped.arm.name), self.evidence.measure
        alone, both = (cells[row][measure].estimate.mean for row in (RETRIEVER, CASCADE))
        if own.p_randomisation >= ALPHA:
            numbers = f"{measure} {alone:.3f} -> {both:.3f}, mean of the seeds"
            return [f"Its ranker does NOT improve on its own retriever ({numbers})."]
        word = "improves on its own retriever" if own.difference > 0 else "HURTS its own retriever: use that alone"
        numbers = f"{measure} {alone:.3f} -> {both:.3f}, mean of the seeds, p = {own.p_randomisation:.4f}"
        return [f"Its ranker {word} ({numbers})."]

    def text(self, *, markdown: bool = False) -> str:
        """The table, the tests and the sentences."""
        measure = self.evidence.measure
        rows: list[list[str]] = []
        for name, cells in self.references.items():
            placed = cells if CASCADE in cells else {_place(name): cell for cell in cells.values()}
            rows.append([name, *(str(placed[row][measure]) if row in placed else "" for row in ROWS), *[""] * 5])
        for result in self.results:
            counts = result.forwards
            rows.append([
                result.arm.name, *(str(result.cells[row][measure]) for row in ROWS), f"{result.seconds:.0f}",
                f"{result.peak_memory_mb:,}" if result.peak_memory_mb else "",
                f"{counts['retriever_trained']:,}", f"{counts['ranker_trained']:,}", f"{counts['ranker_teacher']:,}",
            ])  # fmt: skip
        headers = ["arm", *ROWS, "s", "peak MiB", "retriever trained", "ranker trained", "teacher"]
        tests = [
            [t.arm, t.against, t.row, f"{t.difference:+.4f} [{t.low:+.4f}, {t.high:+.4f}]", f"{t.p_randomisation:.4f}",
             f"{t.p_t:.4f}", f"{t.p_holm:.4f}"] for t in self.tests if t.against != t.arm
        ]  # fmt: skip
        head = "## " if markdown else ""
        queries, seeds = self.tests[0].queries, ", ".join(map(str, self.evidence.seeds))
        lines = [
            *(f"- {sentence}" for sentence in self.sentences), *(f"- WARNING: {w}" for w in self.warnings), "",
            f"{head}{measure} on test: {queries} queries; seeds {seeds}; "
            "mean [95 % interval over queries] ±standard deviation of the seeds", "",
            table(rows, headers, markdown=markdown), "", COUNTS, "",
        ]  # fmt: skip
        if tests:
            test_headers = ["arm", "against", "row", f"{measure} difference", "p (randomisation)", "p (t)", "p (Holm)"]
            lines += [
                f"{head}Paired tests over queries, Holm-adjusted over the {len(tests)} tests against the baseline", "",
                table(tests, test_headers, markdown=markdown), "",
            ]  # fmt: skip
        if self.evidence.tuning:
            lines += [f"{head}Learning rates tried on dev by every arm (first seed)", "", self._tuning(markdown), ""]
        return "\n".join(lines).rstrip("\n") + "\n"

    def _tuning(self, markdown: bool) -> str:
        tried = self.evidence.tuning
        factors = [trial["factor"] for trial in next(iter(tried.values()))]
        rows = [
            [name, *("diverged" if t["dev"] is None else f"{t['dev']:.4f}" for t in trials),
             f"x {self.result(name).factor:g}"] for name, trials in tried.items()
        ]  # fmt: skip
        return table(rows, ["arm", *(f"x {factor:g}" for factor in factors), "taken"], markdown=markdown)

    def to_dict(self) -> dict[str, Any]:
        """``comparison.json``."""
        evidence, shipped = self.evidence, self.shipped
        folder = f"seed-{shipped.seed}/{shipped.arm.folder}"
        environment = evidence.environment
        first = next(iter(evidence.results.values()))[0][1]
        data = {k: environment["data"][k] for k in ("source", "passages", "queries")}
        arms = [
            {
                "name": r.arm.name, "recipe": r.arm.recipe, "settings": dict(r.settings),
                "tuning": [dict(trial) for trial in evidence.tuning.get(r.arm.name, ())], "factor": r.factor,
                "rows": _plain(r.cells), "forwards": dict(r.forwards), "seconds": r.seconds,
                "peak_memory_mb": r.peak_memory_mb, "dev": list(r.dev), "kept": list(r.kept),
                "folders": [f"seed-{seed}/{r.arm.folder}" for seed in evidence.seeds],
            }
            for r in self.results
        ]  # fmt: skip
        return {
            "kind": "comparison", "version": __version__, "command": environment.get("command", ""),
            "data": {**data, "dev_queries": first["dev_queries"], "test_queries": first["test_queries"]},
            "hardware": environment["hardware"], "versions": environment["versions"],
            "budget": evidence.budget, "counts": COUNTS, "seeds": list(evidence.seeds), "baseline": evidence.baseline,
            "measure": evidence.measure, "measures": list(evidence.measures),
            "references": [{"name": name, "rows": _plain(cells)} for name, cells in self.references.items()],
            "arms": arms, "tests": [asdict(test) for test in self.tests], "warnings": list(self.warnings),
            "verdict": {
                "ship": {"arm": shipped.arm.name, "seed": shipped.seed, "folder": folder},
                "sentences": self.sentences,
            },
        }  # fmt: skip


def _place(name: str) -> str:
    """The column of a reference that has one row: a cascade's, or the ranking that a retriever or BM25 gives."""
    return CASCADE if name.endswith(CASCADE) else RETRIEVER


def _plain(cells: Cells) -> dict[str, dict[str, Any]]:
    return {row: {measure: cell.to_dict() for measure, cell in found.items()} for row, found in cells.items()}


def conclude(evidence: Evidence) -> Comparison:
    """Means, intervals, seed spread and tests of everything that the arms left behind."""
    first = evidence.results[evidence.arms[0].name]
    results = [_arm(arm, evidence) for arm in evidence.arms]
    tests, warnings = _tests(evidence, results), _warnings(evidence, first[0][1])
    return Comparison(evidence, _references(first), results, tests, warnings)


def _references(results: Sequence[tuple[list[Row], dict[str, Any]]]) -> dict[str, Cells]:
    """Rows that have no arm: those before the warm start's three stand alone."""
    count = results[0][1]["references"]
    names = [row.name for row in results[0][0][:count]]
    alone = {name: {name: _cells([rows[i] for rows, _ in results])} for i, name in enumerate(names)}
    warm = {name: _cells([rows[count + i] for rows, _ in results]) for i, name in enumerate(ROWS)}
    return {**alone, "warm start": warm}


def _cells(rows: Sequence[Row]) -> dict[str, Cell]:
    """Each measure of one row, over seeds."""
    return {
        measure: Cell(interval(_over_seeds(rows, measure)), tuple(row.mean(measure) for row in rows))
        for measure in rows[0].values
    }


def _over_seeds(rows: Sequence[Row], measure: str) -> np.ndarray:
    mean: np.ndarray = np.mean([row.values[measure] for row in rows], axis=0)
    return mean


def _rows(evidence: Evidence, name: str, row: str) -> list[Row]:
    """One row of an arm's kept pair, for each seed."""
    return [rows[len(rows) - len(ROWS) + ROWS.index(row)] for rows, _ in evidence.results[name]]


def _arm(arm: Arm, evidence: Evidence) -> ArmResult:
    facts = [facts for _, facts in evidence.results[arm.name]]
    return ArmResult(
        arm=arm,
        cells={row: _cells(_rows(evidence, arm.name, row)) for row in ROWS},
        dev=tuple(f["dev"] for f in facts),
        kept=tuple(f["kept"] for f in facts),
        seconds=float(np.median([f["seconds"] for f in facts])),
        peak_memory_mb=max(f["peak_memory_mb"] for f in facts),
        forwards=facts[0]["forwards"],
        factor=facts[0]["factor"],
        settings=facts[0]["settings"],
    )


def _tests(evidence: Evidence, results: Sequence[ArmResult]) -> list[Test]:
    """Every arm's three rows against the baseline's, and those of a joint arm against the arm that orders its cascade
    alike (`control_of`), Holm-adjusted as one family; and, beside these and not adjusted, every arm's cascade against
    its own retriever."""
    measure = evidence.measure

    def paired(arm: str, against: str, row: str, other: str) -> Test:
        a = _over_seeds(_rows(evidence, arm, row), measure)
        b = _over_seeds(_rows(evidence, against, other), measure)
        test, bounds = paired_test(a, b), interval(a - b)
        return Test(
            arm, against, row, measure, bounds.mean, bounds.low, bounds.high,
            test.p_randomisation, test.p_t, test.p_randomisation, test.queries,
        )  # fmt: skip

    family = [
        paired(arm.name, evidence.baseline, row, row)
        for arm in evidence.arms if arm.name != evidence.baseline for row in ROWS
    ]  # fmt: skip
    for joint in filter(is_joint, results):
        control = control_of(joint, results, evidence.baseline)
        if control not in ("", evidence.baseline, joint.arm.name):
            family += [paired(joint.arm.name, control, row, row) for row in ROWS]
    adjusted = holm([test.p_randomisation for test in family])
    family = [Test(**{**asdict(t), "p_holm": p}) for t, p in zip(family, adjusted, strict=True)]
    return family + [paired(arm.name, arm.name, CASCADE, RETRIEVER) for arm in evidence.arms]


def _warnings(evidence: Evidence, facts: Mapping[str, Any]) -> list[str]:
    found = []
    if len(evidence.seeds) < LEAST_SEEDS:
        found.append(f"{len(evidence.seeds)} seed: no test is meaningful; take at least {LEAST_SEEDS}, better 5.")
    if facts["test_queries"] < LEAST_QUERIES:
        found.append(f"{facts['test_queries']} test queries: no test is meaningful; take at least {LEAST_QUERIES}.")
    missing = [
        f"{arm.name}, seed {f['seed']}" for arm in evidence.arms for _, f in evidence.results[arm.name]
        if f["kept"] == "warm start"
    ]  # fmt: skip
    if missing:
        found.append("No round beat the warm start's cascade on dev, so the warm start was kept: " + "; ".join(missing))
    return found
