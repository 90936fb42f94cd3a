"""The documentation against the code: Python blocks, commands, options, settings, files, make targets."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from sparring.cli import main
from sparring.recipes.train import NAMES, resolve_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"COMMAND", "...", "DATA", "RUN"}


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [body for found, body in BLOCK.findall(page.read_text("utf-8")) if found == language]


def python_blocks() -> list[object]:
    """Every Python block of the documentation, named by page and place."""
    return [
        pytest.param(body, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, body in enumerate(blocks(page, "python"))
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words after ``sparring``) of every command line in the documentation."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        shell = [body for language, body in BLOCK.findall(text) if language in ("", "bash")]
        lines = [line for body in shell for line in body.splitlines()]
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        for line in lines:
            match = re.match(r"^\s*sparring +([a-z-].*)$", line)
            if match:
                found.append((page.name, shlex.split(match[1].replace("|", " "), comments=True)))
    return found


@pytest.mark.parametrize("body", python_blocks())
def test_python_blocks_use_names_that_exist(body: str) -> None:
    tree = ast.parse(body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sparring":
            assert hasattr(importlib.import_module("sparring"), node.attr), ast.unparse(node)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_example_fits_the_signature_of_train(page: str) -> None:
    import inspect

    from sparring import train

    calls = [
        node
        for body in blocks(ROOT / page, "python")
        for node in ast.walk(ast.parse(body))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sparring.train"
    ]
    assert calls
    for call in calls:
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
        inspect.signature(train).bind(*call.args, **named)
        resolve_config(ast.literal_eval(named["recipe"]), ast.literal_eval(named["config"]))


@pytest.mark.slow
def test_readme_example_runs(
    tiny_st: Path, tiny_ce: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example as it stands, but for the models, the data and the number of steps."""
    from sparring.data import beir

    words = ["create", "delete", "list", "bucket", "instance", "user", "key", "policy", "password"]
    texts = [f"{a} {b}" for a in words for b in words if a != b][:60]
    folder = tmp_path / "my-data"
    beir.write_passages(((f"p{i}", "", text) for i, text in enumerate(texts)), folder / "corpus.jsonl")
    beir.write_queries(((f"q{i}", f"how to {text}", ()) for i, text in enumerate(texts)), folder / "queries.jsonl")
    for split, rows in (("train", range(40)), ("dev", range(40, 50)), ("test", range(50, 60))):
        beir.write_qrels({f"q{i}": {f"p{i}": 1} for i in rows}, folder / "qrels" / f"{split}.tsv")
    (body,) = blocks(ROOT / "README.md", "python")
    small = {
        "run": {"mine_depth": 20, "rerank_depth": 10},
        "warmup": {"retriever_steps": 2, "retriever_batch": 4, "ranker_steps": 2, "ranker_batch": 4},
        "duet": {"rounds": 1, "batch": 4, "negatives": 3, "retriever_steps": 2, "ranker_steps": 2},
    }
    for written, here in (
        ("sentence-transformers/all-MiniLM-L6-v2", str(tiny_st)),
        ("cross-encoder/ms-marco-MiniLM-L6-v2", str(tiny_ce)),
        ('{"duet": {"rounds": 3}}', repr(small)),
    ):
        assert written in body
        body = body.replace(written, here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    exec(compile(body, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert getattr(names["vector"], "shape", None) == (32,)
    assert len(names["scores"]) == 1  # type: ignore[arg-type]
    tree = next(b for b in blocks(ROOT / "README.md", "") if b.startswith("RUN/"))
    listed = set(re.findall(r"^  ([\w.]+)", tree, re.MULTILINE))
    assert {path.name for path in (tmp_path / "runs/first").iterdir()} == listed


def test_readme_example_is_about_ten_lines() -> None:
    (body,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in body.splitlines() if line.strip()]) <= 12


def test_commands_are_found() -> None:
    assert len({words[0] for _, words in commands()} & set(main.commands)) == len(main.commands)


@pytest.mark.parametrize(("page", "words"), commands())
def test_command_and_options_exist(page: str, words: list[str]) -> None:
    known = {opt for p in main.params if isinstance(p, click.Option) for opt in (*p.opts, *p.secondary_opts)}
    while words[0].startswith("-"):
        assert words[0] in known | {"--help"}, f"{page}: sparring {words[0]}"
        words = words[1:]
        if not words:
            return
    if words[0] in PLACEHOLDERS:
        return
    assert words[0] in main.commands, f"{page}: sparring {words[0]}"
    options = {opt for p in main.commands[words[0]].params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
    for word in words[1:]:
        if re.match(r"^\[?--?[a-z]", word):
            assert word.strip("[]").split("=")[0] in options, f"{page}: sparring {words[0]} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_given_as_set_exist(page: Path) -> None:
    assignments = re.findall(r"--set ([a-z0-9_.-]+=[^\s`]+)", page.read_text("utf-8"))
    for assignment in assignments:
        if assignment != "key=value":
            resolve_config("ar2", None, [assignment])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_blocks_are_toml(page: Path) -> None:
    for body in blocks(page, "toml"):
        table = tomllib.loads(body)
        if "recipe" in table:
            resolve_config(table["recipe"], table)


def test_every_recipe_is_documented() -> None:
    assert all(f"`{name}`" in (ROOT / "README.md").read_text("utf-8") for name in NAMES)
    assert all(name in (ROOT / "docs/config.md").read_text("utf-8") for name in NAMES)


def test_generated_tables_are_in_sync() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_says_what_it_means() -> None:
    rows = [line for line in (ROOT / "docs/config.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if not row.rsplit("|", 2)[1].strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:losses|phases|recipes|models|data|tests|docs|src|benchmarks|configs)/[\w./-]+\.\w+)`",
                           page.read_text("utf-8")):  # fmt: skip
        assert any((root / name).exists() for root in (ROOT, ROOT / "src/sparring")), f"{page.name}: {name}"


def test_readme_tree_is_the_tree() -> None:
    tree = next(b for b in blocks(ROOT / "README.md", "") if b.startswith("src/sparring/"))
    listed = set(re.findall(r"\b(\w+)\.py\b", tree))
    top = {path.stem for path in (ROOT / "src/sparring").glob("*.py")} - {"__init__"}
    assert top <= listed
    assert all(list((ROOT / "src/sparring").rglob(f"{name}.py")) for name in listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = page.read_text("utf-8")
    named = re.findall(r"`make ([a-z-]+)", text)
    for language, body in BLOCK.findall(text):
        named += re.findall(r"^make ([a-z-]+)", body, re.MULTILINE) if language in ("", "bash") else []
    assert set(named) <= targets, page.name
