"""What the page about one run shows, in the order in which it shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from sparring.report import blocks
from sparring.report.blocks import Grid
from sparring.report.figures import (
    GLYPHS,
    ROW_KEYS,
    Figure,
    Key,
    bars,
    before_after,
    histogram,
    mean,
    number,
    over_rounds,
    over_updates,
    reach,
    slices,
    span,
    words,
)
from sparring.report.read import DIAGNOSTICS, ROWS, WARM, AuditRefresh, Evidence, Run, State
from sparring.types import CASCADE, FIXED, RETRIEVER

BEFORE = Key(0, GLYPHS[0], "before (warm start)")
EXAMPLES = 12
"""Likely unlabelled positives that a refresh shows; the file has all of them."""


def run_view(run: Run) -> dict[str, Any]:
    """The names that run.html.j2 uses."""
    source = PurePath(str(run.environment["data"]["source"])).name
    evidence = run.evidence
    return {
        "run": run, "title": f"{run.recipe} on {source}", "source": source, "headline": headline(run),
        "unchanged": run.best == WARM, "cards": cards(run), "explain": blocks.explained,
        "test": _results(run, "test"), "dev": _results(run, "dev"), "curves": curves(run), "tests": _tests(evidence),
        "slices": slice_figures(evidence), "queries": evidence.shown if evidence else {}, "number": number,
        "span": span,
        "moved": blocks.moved, "losses": losses(run), "diagnostics": diagnostics(run), "overlap": overlap(run),
        "audit": audit(run), "examples": EXAMPLES,
        "time": time(run), "duration": blocks.duration,
        "peak": max((memory for _, _, memory in run.phases), default=0) / 1024,
        "config": [
            blocks.settings_grid(name, values) for name, values in run.config.items() if isinstance(values, dict)
        ],
        "hardware": blocks.hardware_grid(run.environment["hardware"]),
        "versions": blocks.versions_grid(run.environment["versions"]),
        "models": _models(run),
    }  # fmt: skip


def headline(run: Run) -> str:
    """One line for the top: what the paired test of the cascade says; empty where the folder has no tests."""
    if run.best == WARM:
        return "No round was better than the warm start, so the warm start is what was exported."
    tests = run.evidence.tests if run.evidence else ()
    found = next((t for t in tests if (t.row, t.measure) == (CASCADE, run.select_by)), None)
    if found is None:
        return ""
    if found.p_randomisation >= 0.05:
        return "Training made no difference that these test queries can prove."
    return f"Training made the pair {'better' if found.difference.mean > 0 else 'worse'}."


def _state(states: Sequence[State], name: str) -> State:
    return next(state for state in states if state.name == name)


def _fused(run: Run) -> bool:
    """Whether the exported pair's cascade orders by both scores."""
    recipe = run.config.get(run.config.get("recipe", ""), {})
    return bool(recipe.get("fusion")) and run.best != WARM


def cards(run: Run) -> list[dict[str, Any]]:
    """Each row's number on test before and after, with what the row means."""
    settings = run.config.get("run", {})
    fixed = "BM25's" if settings.get("fixed_candidates") == "bm25" else "the warm start's"
    depth = settings.get("rerank_depth", "")
    order = "the order of both models' scores" if _fused(run) else "the ranker's order"
    meaning = {
        RETRIEVER: "Finds passages in the whole collection. This row is search alone, without the ranker.",
        FIXED: f"Puts a list of candidates in order. The candidates are {fixed} and stay the same, so only the ranker "
        "can change this row.",
        CASCADE: f"What users of the pair get: the retriever's first {depth} passages in {order}.",
    }
    first, last = run.test.states[0], run.test.states[-1]
    limits = reach([state.rows[row][run.select_by] for state in (first, last) for row in ROWS])
    found = []
    for place, row in enumerate(ROWS):
        before, after = first.rows[row][run.select_by], last.rows[row][run.select_by]
        changed = first is not last
        panel = before_after(
            f"card-{place}", "", run.select_by, [""], place, [before], [after] if changed else [], limits, width=3.6
        )
        found.append({
            "row": row, "key": ROW_KEYS[place], "meaning": meaning[row], "before": before, "after": after,
            "changed": changed, "panel": panel, **_proof(run, row),
        })  # fmt: skip
    return found


def _proof(run: Run, row: str) -> dict[str, str]:
    """The difference of a row with its p value, and its class: better or worse only where the test says so."""
    tests = run.evidence.tests if run.evidence else ()
    test = next((t for t in tests if (t.row, t.measure) == (row, run.select_by)), None)
    if test is None:
        return {"change": "same", "difference": ""}
    difference, p, *_ = blocks.test_cells(test)
    change = "same" if test.p_randomisation >= 0.05 else "better" if test.difference.mean > 0 else "worse"
    return {"change": change, "difference": f"{difference}, p {p if p.startswith('<') else '= ' + p}"}


def _results(run: Run, name: str) -> Grid:
    split = run.test if name == "test" else run.dev
    rows: list[list[str]] = []
    for baseline in split.baselines:
        rows += blocks.result_rows(baseline.name, baseline.rows, run.measures)
    strong = set()
    for state in split.states:
        if state.name == run.best:
            strong |= {len(rows), len(rows) + 1, len(rows) + 2}
        rows += blocks.result_rows(state.name, state.rows, run.measures)
    caption = f"{name.capitalize()}, {split.queries} queries, means with 95 % intervals"
    return Grid(caption, ("", *run.measures), rows, frozenset(strong))


def curves(run: Run) -> Figure:
    """Dev's three rows after each round."""
    states = run.dev.states
    values = {row: [state.rows[row][run.select_by] for state in states] for row in ROWS}
    panel = over_rounds("rounds", "", run.select_by, [state.name for state in states], values)
    rows = [[state.name, *(span(state.rows[row][run.select_by]) for row in ROWS)] for state in states]
    note = (
        f"{run.dev.queries} dev queries, 95 % intervals. The round with the highest cascade is exported: {run.best}."
        " Horizontal axis: rounds."
    )
    return Figure("rounds", f"Dev {run.select_by} after each round", note, ROW_KEYS, [panel], ("", *ROWS), rows)


def _tests(evidence: Evidence | None) -> Grid | None:
    if evidence is None or not evidence.tests:
        return None
    rows = [[test.row, test.measure, *blocks.test_cells(test)] for test in evidence.tests]
    strong = frozenset(n for n, test in enumerate(evidence.tests) if test.p_randomisation < 0.05)
    columns = ("row", "measure", "after - before", "p, randomisation", "p, Student's t", "queries")
    return Grid(f"{evidence.states[-1]} against {evidence.states[0]}, test queries", columns, rows, strong)


def slice_figures(evidence: Evidence | None) -> list[Figure]:
    """Test results by query length and by script."""
    if evidence is None:
        return []
    titles = {
        "length": ("Query length", f"in {evidence.length_unit}; the bins are quartiles of these queries' lengths"),
        "script": (
            "Script", "of the query's letters, from their Unicode names: one script if at least 80 % are of it, else "
            "mixed; Han beside Kana counts as Kana. A script is not a language."
        ),
    }  # fmt: skip
    found = []
    for by, (title, note) in titles.items():
        groups = evidence.slices[by]
        limits = reach([v for group in groups for part in (group.before, group.after) for v in part.values()])
        panels = [slices(f"{by}-{n}", evidence.select_by, groups, n, limits) for n in range(len(ROWS))]
        rows = [
            [group.name, str(group.queries), row, span(group.before[row]), *_after(group.after.get(row)),
             *_after(group.difference.get(row))]
            for group in groups for row in ROWS
        ]  # fmt: skip
        columns = ("group", "queries", "row", "before", "after", "after - before")
        after = [Key(key.series, key.glyph, f"after, {key.name}") for key in ROW_KEYS]
        legend = [BEFORE, *after] if len(evidence.states) > 1 else ROW_KEYS
        found.append(Figure(by, title, note, legend, panels, columns, rows))
    return found


def _after(value: Any) -> list[str]:
    return [span(value) if value is not None else ""]


def losses(run: Run) -> Figure | None:
    """Every loss term over the updates."""
    terms = [name for phase in run.training for name in phase.values if name not in DIAGNOSTICS]
    note = (
        "Each curve runs over all updates of the phases that have this term; dotted lines stand between phases. Where "
        "there are many updates, a point is the mean of consecutive ones."
    )
    return _updates(run, "losses", "Losses", note, list(dict.fromkeys(terms)))


def diagnostics(run: Run) -> Figure | None:
    """How the game stands: entropy, who prefers a negative, the reward."""
    logged = {name for phase in run.training for name in phase.values}
    note = (
        "Retriever entropy (nats) near 0: its distribution has collapsed on one passage of each list; the dashed line "
        "is the largest value possible. Ranker prefers negative: the share of lists where the ranker puts a negative "
        "first; near 0 it learns nothing more from them. Reward: near 0 the ranker is never fooled."
    )
    terms = [name for name in DIAGNOSTICS if name in logged]
    return _updates(run, "diagnostics", "Entropy and preferred negatives", note, terms)


def _updates(run: Run, name: str, title: str, note: str, terms: Sequence[str]) -> Figure | None:
    if not terms:
        return None
    panels = [
        over_updates(f"{name}-{n}", term, run.training, share=term.endswith("prefers_negative"))
        for n, term in enumerate(terms)
    ]
    rows = []
    for phase in run.training:
        for term in terms:
            if term in phase.values:
                values = phase.values[term]
                shown = (number(value, 4) for value in (values[0], mean(values), values[-1]))
                rows.append([phase.phase, words(term), str(len(values)), *shown])
    return Figure(name, title, note, (), panels, ("phase", "value", "updates", "first", "mean", "last"), rows)


def overlap(run: Run) -> Figure | None:
    """Which share of each refreshed pool was in the pool before."""
    if not run.overlaps:
        return None
    values = {f"refresh {name}": share for name, share in run.overlaps}
    panel = bars("overlap", "", "share kept", values, most=1.12)
    note = (
        "The share of each refreshed pool of negatives that was in the pool before. Near 1, the refresh found the same "
        "negatives again."
    )
    rows = [[name, number(share)] for name, share in values.items()]
    return Figure("overlap", "Pool overlap between refreshes", note, (), [panel], ("", "share"), rows)


def time(run: Run) -> Figure:
    """Seconds by what was done."""
    sums: dict[str, float] = {}
    for name, seconds, _ in run.phases:
        sums[run.kinds[name]] = sums.get(run.kinds[name], 0.0) + seconds
    rest = run.seconds - sum(sums.values())
    ranked = dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))
    shown = {**ranked, "between phases": max(0.0, rest)}
    rows = [[kind, f"{seconds:.1f}", f"{seconds / max(run.seconds, 1e-9):.0%}"] for kind, seconds in shown.items()]
    note = (
        f"{blocks.duration(run.seconds)} in all, seconds by kind of work. Between phases: encoding queries, the one "
        "reading of test, saving weights."
    )
    panel = bars("time", "", "seconds", shown)
    return Figure("time", "Where the time went", note, (), [panel], ("", "seconds", "share"), rows)


def audit(run: Run) -> dict[str, Any] | None:
    """The mined negatives of each refresh as the ranker sees them; None where nothing was audited."""
    if not run.audit:
        return None
    panels, rows = [], []
    for place, found in enumerate(run.audit):
        panels.append(histogram(
            f"audit-{place}", f"refresh {found.generation}", found.edges, found.positives, found.negatives,
            found.median_positive,
        ))  # fmt: skip
        bins = zip(found.edges[:-1], found.edges[1:], found.negatives, found.positives, strict=True)
        rows += [[found.generation, f"{low:.2f} to {high:.2f}", str(n), str(p)] for low, high, n, p in bins]
    note = (
        "Shares of the known positives and of the mined negatives that have this score from the ranker. Dashed line: "
        "the median of the positives. What lies right of it under the blue line may be right answers without a label."
    )
    keys = (Key(1, "━", "mined negatives"), Key(2, "╍", "known positives"))
    columns = ("refresh", "ranker score", "mined negatives", "known positives")
    figure = Figure("audit", "Ranker scores of the lists", note, keys, panels, columns, rows)
    return {"refreshes": run.audit, "figure": figure, "counts": _dropped(run.audit)}


def _dropped(refreshes: Sequence[AuditRefresh]) -> Grid:
    rules = list(dict.fromkeys(rule for refresh in refreshes for rule in refresh.counts))
    rows = [
        [r.generation, f"{r.likely:,}", f"{r.lists:,}", f"{r.candidates:,}", f"{r.pairs_scored:,}",
         number(r.median_positive), *(f"{r.counts[rule]:,}" if rule in r.counts else "" for rule in rules)]
        for r in refreshes
    ]  # fmt: skip
    columns = ("refresh", "likely unlabelled", "lists", "candidates", "pairs scored", "positives' median score", *rules)
    return Grid("What each refresh found, and candidates dropped by each rule", columns, rows)


def _models(run: Run) -> Grid:
    found = run.environment["models"]
    rows = [[name, str(value)] for name, value in found.items()]
    rows += [[name, blocks.plain(value)] for name, value in run.environment.get("scoring", {}).items()]
    rows += [[f"data {name}", blocks.plain(value)] for name, value in run.environment["data"].items()]
    return Grid("Data and models at the start", ("", "value"), rows)
