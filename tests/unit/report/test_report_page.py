"""The page: its numbers are the folder's, text is escaped, nothing is loaded, equal folders give equal bytes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from report_fixtures import HOSTILE, MEASURES, ROWS, write_comparison, write_run
from sparring.phases.stats import interval
from sparring.report import write_report
from sparring.report.figures import Interval, binned, number, over_rounds, span
from sparring.types import CASCADE

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """Tags, attributes, ids, cell texts of tables, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, tag
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    found = write_run(tmp_path_factory.mktemp("run"))
    found.html = write_report(found.folder).read_text("utf-8")
    found.page = Page(found.html)
    return found


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("comparison")
    written = write_comparison(folder)
    html = write_report(folder).read_text("utf-8")
    return SimpleNamespace(folder=folder, written=written, html=html, page=Page(html))


@pytest.fixture(params=["run", "comparison"])
def either(request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.getfixturevalue(request.param)


def test_test_results_are_the_folders(run: SimpleNamespace) -> None:
    for state, values in (("warm start", run.before), ("round 3", run.after)):
        for row in ROWS:
            cells = [span(Interval(*interval(values[row][m]))) for m in MEASURES]
            assert [f"{state}: {row}", *cells] in run.page.rows


def test_every_round_of_dev_is_in_the_table_below_the_curve(run: SimpleNamespace) -> None:
    for state, values in run.dev.items():
        cells = [span(Interval(*interval(values[row]["RR@10"]))) for row in ROWS]
        assert [state, *cells] in run.page.rows


def test_significance_slices_time_and_overlap_are_the_folders(run: SimpleNamespace) -> None:
    evidence = json.loads((run.folder / "evidence.json").read_text())
    for test in evidence["tests"]:
        row = next(r for r in run.page.rows if r[:2] == [test["row"], test["measure"]])
        assert row[2].startswith(f"{test['difference']:+.3f}")
        assert float(row[3].lstrip("< ")) == pytest.approx(test["p_randomisation"], abs=1e-4)
    for group in (*evidence["slices"]["length"], *evidence["slices"]["script"]):
        row = next(r for r in run.page.rows if r[:3] == [group["name"], str(group["queries"]), CASCADE])
        assert row[3:] == [span(Interval(*group[part][CASCADE])) for part in ("before", "after", "difference")]
    assert ["refresh 2", "0.800"] in run.page.rows
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    encoding = sum(r["took"] for r in records if r["kind"] == "phase" and r["name"].endswith("-encode"))
    assert ["encode", f"{encoding:.1f}", f"{encoding / records[-1]['seconds']:.0%}"] in run.page.rows
    assert ["warm", "17", "100", "1,000", "1,100"] in [row[:5] for row in run.page.rows]


def test_the_headline_follows_the_test_of_the_cascade(run: SimpleNamespace, tmp_path: Path) -> None:
    from sparring.report.read import read_run_folder
    from sparring.report.run_view import headline

    evidence = json.loads((run.folder / "evidence.json").read_text())
    place = next(n for n, t in enumerate(evidence["tests"]) if (t["row"], t["measure"]) == (CASCADE, "RR@10"))
    found = []
    for difference, p in ((0.1, 0.01), (-0.1, 0.01), (0.1, 0.06)):
        evidence["tests"][place].update(difference=difference, p_randomisation=p)
        write_run(tmp_path, evidence=False)
        (tmp_path / "evidence.json").write_text(json.dumps(evidence))
        found.append(headline(read_run_folder(tmp_path)))
    assert found == [
        "Training made the pair better.", "Training made the pair worse.",
        "Training made no difference that these test queries can prove.",
    ]  # fmt: skip


def test_an_exported_warm_start_is_said_to_be_one(tmp_path: Path) -> None:
    write_run(tmp_path, best="warm start", audit=False)
    html = write_report(tmp_path).read_text()
    assert "the warm start is what was exported" in html
    assert "Nothing to test" in html
    assert "Most improved" not in html
    assert "Worst" in html
    assert "unlabelled positives</h2>" not in html


def test_what_an_older_folder_lacks_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, evidence=False, audit=False)
    html = write_report(tmp_path).read_text()
    assert html.count("evidence.json</code>") == 3


def test_a_comparisons_numbers_are_the_folders(comparison: SimpleNamespace) -> None:
    for system in (*comparison.written["references"], *comparison.written["arms"]):
        for row, cells in system["rows"].items():
            label = row if row == system["name"] else f"{system['name']}: {row}"
            shown = next(r for r in comparison.page.rows if r[0] == label and len(r) == 1 + len(MEASURES))
            for measure, text in zip(MEASURES, shown[1:], strict=True):
                cell = cells[measure]
                assert text.startswith(span(Interval(cell["mean"], cell["low"], cell["high"])))
                assert cell["seed_sd"] is None or text.endswith(f"± {cell['seed_sd']:.3f}")
    for test in comparison.written["tests"]:
        row = next(r for r in comparison.page.rows if r[:2] == [f"{test['arm']} - {test['against']}", test["row"]])
        assert row[3].startswith(f"{test['difference']:+.3f}")
        assert float(row[6].lstrip("< ")) == pytest.approx(test["p_holm"], abs=1e-4)
    assert ["ar2", "0.706", "0.716", "0.696", "1"] in comparison.page.rows
    assert any("25,600" in cell for row in comparison.page.rows for cell in row)
    assert all(sentence in comparison.page.text for sentence in comparison.written["verdict"]["sentences"])


def test_text_of_the_data_stays_text(either: SimpleNamespace) -> None:
    assert HOSTILE in either.page.text
    assert "script" not in either.page.tags
    assert HOSTILE not in either.html
    assert "<careful>" not in either.html
    assert "<really>" not in either.html
    assert {"b", "i"} & set(either.page.tags) <= {"b"}
    assert not [value for name, value in either.page.attributes if name.startswith("on")]


def test_hostile_names_stay_text_in_figures() -> None:
    name = 'a <script>alert(1)</script> & "$x_1$" 삭제'
    panel = over_rounds("n", name, "RR@10", [name], {CASCADE: [Interval(0.5, 0.4, 0.6)]})
    page = Page(panel.svg)
    assert "script" not in page.tags
    assert page.text.count(name) == 5, "name, description (from and to), heading, axis label"


def test_nothing_is_loaded_from_elsewhere(either: SimpleNamespace) -> None:
    links = either.page.values("href") + either.page.values("src") + either.page.values("xlink:href")
    assert links
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert "@import" not in either.html
    assert set(re.findall(r"url\((.)", either.html)) <= {"#"}
    assert set(re.findall(r"https?://[^\s\"']+", either.html)) <= {"http://www.w3.org/1999/xlink"}
    assert {"iframe", "object", "embed", "img"} & set(either.page.tags) == set()


def test_ids_are_unique_and_references_lead_somewhere(either: SimpleNamespace) -> None:
    ids = either.page.values("id")
    assert len(ids) == len(set(ids))
    wanted = {link[1:] for link in (*either.page.values("href"), *either.page.values("xlink:href")) if link[0] == "#"}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", either.html))
    wanted |= {word for value in either.page.values("aria-labelledby") for word in value.split()}
    assert wanted <= set(ids)
    assert either.page.open == []


def test_every_figure_is_named_and_has_its_numbers(either: SimpleNamespace) -> None:
    figures = either.html.split("<figure")[1:]
    assert len(figures) >= 2
    for text in figures:
        body = text.split("</figure>")[0]
        svgs = body.count("<svg")
        assert svgs >= 1
        named = r'<svg [^>]*role="img" aria-labelledby=[^>]*><title [^>]*>[^<]+</title><desc [^>]*>[^<]+'
        assert len(re.findall(named, body)) == svgs
        assert "<details><summary>The numbers of" in body
        assert "<table>" in body


def test_colours_come_from_the_page_alone(either: SimpleNamespace) -> None:
    for svg in re.findall(r"<svg.*?</svg>", either.html, re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert "<text" in svg
        assert "<metadata" not in svg


def test_the_same_folder_gives_the_same_bytes(run: SimpleNamespace, tmp_path: Path) -> None:
    assert write_report(run.folder, tmp_path / "deep" / "again.html").read_text("utf-8") == run.html


def test_the_command_writes_the_page(run: SimpleNamespace, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from sparring.cli import main

    out = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["-q", "report", str(run.folder), "--out", str(out)])
    assert (result.exit_code, result.stdout.strip()) == (0, str(out))
    assert out.read_text("utf-8") == run.html
    refused = CliRunner().invoke(main, ["-q", "report", str(tmp_path)])
    assert refused.exit_code == 2
    assert "nothing to report" in refused.stderr


def test_long_series_are_drawn_as_means_of_neighbours() -> None:
    values = np.arange(1000, dtype=float)
    places, means = binned(values, 100)
    assert len(places) == 100
    assert means[0] == values[:10].mean()
    assert means.mean() == pytest.approx(values.mean())
    assert (np.diff(places) == 10).all()
    short = binned(np.array([3.0, np.nan, 5.0]), 100)[1]
    assert short[0] == 3.0
    assert np.isnan(short[1])


def test_numbers_for_people() -> None:
    assert number(0.12349) == "0.123"
    assert number(float("nan")) == ""
    assert span(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert span(Interval(0.5, float("nan"), float("nan"))) == "0.500"


def test_warnings_of_the_run_stand_on_top(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run").folder
    record = {"kind": "warning", "seconds": 9.0, "at": "round 2", "name": "constant ranker", "text": "all the same <b>"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    page = write_report(folder).read_text()
    assert "Warning, round 2: all the same &lt;b&gt;" in page[: page.index('id="results"')]
    assert "Warning," not in write_report(write_run(tmp_path / "quiet").folder).read_text()
