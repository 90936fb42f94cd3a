"""Rewrite the generated tables of docs/config.md and docs/cli.md from the code.

    python docs/reference.py            # rewrite
    python docs/reference.py --check    # exit 1 when a page is stale

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. Settings come from the configuration classes'
attribute docstrings, read as source: nothing of the package is imported for them. Commands come from click.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "src/sparring/recipes"
CONFIGS = {
    "run": ("settings.py", "RunConfig"),
    "warmup": ("warmup.py", "WarmupConfig"),
    "rounds": ("settings.py", "RoundsConfig"),
    "turns": ("settings.py", "TurnsConfig"),
    "ar2": ("ar2.py", "AR2Config"),
    "rocketqav2": ("rocketqav2.py", "RocketQAv2Config"),
    "duet": ("duet.py", "DuetConfig"),
    "frozen-teacher": ("controls.py", "FrozenTeacherConfig"),
}
"""Table name -> file and class. Classes that inherit list only what they add."""
PAGES = ("config.md", "cli.md")


@dataclass(frozen=True)
class Setting:
    """One field of a configuration class."""

    name: str
    type: str
    default: str
    meaning: str


def settings(file: Path, name: str) -> list[Setting]:
    """The fields of a dataclass in source order, each with the string below it."""
    classes = {node.name: node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}
    body = classes[name].body
    found = []
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            meaning = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            found.append(Setting(field.target.id, _type(field.annotation), _default(field.value), _line(meaning)))
    return found


def _type(annotation: ast.expr) -> str:
    """``Literal["a", "b"]`` as its values, a tuple as a list, anything else as written."""
    text = ast.unparse(annotation)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        inner = annotation.slice
        values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        return ", ".join(f"`{_toml(ast.literal_eval(value))}`" for value in values)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`"}.get(
        text, "list of texts" if text.startswith("tuple[str") else text
    )


def _default(value: ast.expr | None) -> str:
    return "required" if value is None else f"`{_toml(ast.literal_eval(value))}`"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def settings_table(name: str) -> str:
    """A configuration class as a Markdown table."""
    file, cls = CONFIGS[name]
    rows = [f"| `{s.name}` | {s.default} | {s.type} | {s.meaning} |" for s in settings(RECIPES / file, cls)]
    return "\n".join(["| Key | Default | Values | Meaning |", "|---|---|---|---|", *rows])


def commands() -> Iterator[tuple[str, click.Command]]:
    """Name and command of everything that ``sparring --help`` lists."""
    from sparring.cli import main

    yield from sorted(main.commands.items())


def commands_table() -> str:
    """What each command is for, in one line."""
    rows = [f"| [`sparring {name}`](#sparring-{name}) | {_line(command.help or '')} |" for name, command in commands()]
    return "\n".join(["| Command | What it does |", "|---|---|", *rows])


def options() -> str:
    """Usage and options of every command."""
    parts = []
    for name, command in commands():
        context = click.Context(command, info_name=f"sparring {name}")
        parts.append(f"### sparring {name}\n\n{_line(command.help or '')}\n\n```\n{command.get_usage(context)}\n```")
        rows = [_option(p) for p in command.params if isinstance(p, click.Option)]
        if rows:
            parts.append("\n".join(["| Option | Default | Meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _option(option: click.Option) -> str:
    flag = "" if option.is_flag else f" {_values(option)}"
    names = ", ".join(f"`{name}{flag}`" for name in option.opts)
    plain = option.default if isinstance(option.default, str | int | float) and not option.is_flag else None
    default = "required" if option.required else "" if plain is None else f"`{plain}`"
    return f"| {names} | {default} | {_line(option.help or '')} |"


def _values(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "\\|".join(map(str, option.type.choices))
    words = {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}
    return option.metavar or words.get(option.type.name, option.type.name.upper())


def render(page: str) -> str:
    """A page's text with every generated table renewed."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        table = {"commands": commands_table, "options": options}.get(name)
        return f"<!-- generated: {name} -->\n\n{table() if table else settings_table(name)}\n\n<!-- end -->"

    text = (DOCS / page).read_text("utf-8")
    return re.sub(r"<!-- generated: ([\w-]+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite, or only compare."""
    stale = [page for page in PAGES if render(page) != (DOCS / page).read_text("utf-8")]
    if "--check" in sys.argv[1:]:
        print(f"stale: {', '.join(stale)}; run `make reference`" if stale else f"in sync: {', '.join(PAGES)}")
        return 1 if stale else 0
    for page in stale:
        (DOCS / page).write_text(render(page), "utf-8")
        print(f"docs/{page} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
