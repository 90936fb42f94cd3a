"""What the package's source must not hold: pickle, evaluated text, shells, loaders that run code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparring

SOURCE = Path(sparring.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy", "imp", "pty"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "yaml.load",
         "np.fromfile", "pd.read_pickle", "zipfile.extractall", "tarfile.open"}  # fmt: skip
METHODS = {"extractall", "extract", "unpack_archive"}


def forbidden(tree: ast.AST) -> list[str]:
    """What a syntax tree has of these, with its line."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module and node.module.split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
            names = [called] if called in CALLS or called.rpartition(".")[2] in METHODS else []
            if called in ("np.load", "numpy.load") and settings.get("allow_pickle") != "False":
                names.append("np.load without allow_pickle=False")
            if settings.get("allow_pickle") == "True" or settings.get("shell") == "True":
                names.append(f"{called} with a pickle or a shell")
            if called in ("np.save", "np.savez") and settings.get("allow_pickle") == "True":
                names.append(called)
            if settings.get("trust_remote_code") == "True":
                names.append(f"{called} trusts code")
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_nothing_in_the_source_runs_or_unpickles_what_it_reads(path: Path) -> None:
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "eval('1')", "torch.load(f)", "np.load(f)", "os.system('x')",
     "np.load(f, allow_pickle=True)", "subprocess.run('x', shell=True)", "archive.extractall(p)", "yaml.load(f)",
     "AutoModel.from_pretrained(p, trust_remote_code=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert forbidden(ast.parse(line))
