"""Dataclass configurations from TOML and ``key=value``: every problem reported at once, each with a suggestion."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from sparring.types import InputError

T = TypeVar("T")

LARGEST = 2**63 - 1
"""Of a whole number in a configuration: seeds and counts become 64-bit integers."""

Sections = Mapping[str, type]
"""Section name -> the dataclass that describes it."""


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file, or InputError with the line that is wrong."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            "the configuration file does not exist", where=str(path), expected="a TOML file", fix="check --config"
        ) from None
    except OSError as error:
        raise InputError(
            "the configuration cannot be read",
            where=str(path),
            expected="a TOML file",
            got=error.strerror or str(error),
        ) from None
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and deep nesting
        raise InputError(
            "the configuration is not TOML", where=str(path), expected="key = value lines", got=str(error)
        ) from None


def parse_assignments(assignments: Iterable[str], sections: Sections, preferred: Sequence[str]) -> dict[str, Any]:
    """``section.key=value`` or bare ``key=value`` (looked up in ``preferred`` sections, in order) as nested tables."""
    result: dict[str, dict[str, Any]] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError("--set needs key=value", where=f"--set {text}", expected="key=value", got=text)
        section, dot, name = key.strip().rpartition(".")
        if not dot:
            section = next((s for s in preferred if name in _names(sections[s])), preferred[0])
        result.setdefault(section, {})[name] = _literal(value.strip())
    return result


def build(sections: Sections, *layers: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One object a section, later layers over earlier ones.

    Args:
        layers: (where it comes from, nested tables). Scalars at the top level are refused.

    Raises: InputError that lists every unknown section, unknown key and wrong type at once.
    """
    problems: list[str] = []
    merged: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for where, tables in layers:
        for section, values in tables.items():
            if section not in sections:
                problems.append(f"{where}: unknown section [{section}]{_suggest(section, sections)}")
                continue
            if not isinstance(values, Mapping):
                problems.append(f"{where}: [{section}] must be a table, not {section} = {values!r}")
                continue
            for key, value in values.items():
                problem = _problem(sections[section], key, value)
                if problem:
                    problems.append(f"{where}: [{section}] {problem}")
                else:
                    merged[section][key] = tuple(value) if isinstance(value, list) else value
    objects: dict[str, Any] = {}
    for section, cls in sections.items():
        try:
            objects[section] = cls(**merged[section])
        except InputError as error:
            problems.append(f"[{section}] {error}")
    if problems:
        raise InputError(
            f"{len(problems)} problem(s) in the configuration",
            where="; ".join(problems),
            expected="keys that `sparring config` lists",
            fix="correct these keys",
        )
    return objects


def describe(cls: type) -> list[tuple[str, str, str]]:
    """(key, default, type) of every field."""
    return [(f.name, _show(f.default), str(f.type)) for f in fields(cls)]


def to_toml(objects: Mapping[str, Any], head: Mapping[str, Any] | None = None) -> str:
    """Configuration objects as a TOML document that `build` reads back."""
    lines = [f"{key} = {_toml(value)}" for key, value in (head or {}).items()]
    for section, config in objects.items():
        lines += ["", f"[{section}]"]
        lines += [f"{f.name} = {_toml(getattr(config, f.name))}" for f in fields(config)]
    return "\n".join(lines).lstrip("\n") + "\n"


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value outside the allowed ones, with a suggestion."""
    if value not in allowed:
        raise InputError(
            f"{name}={value!r} is not one of the allowed values{_suggest(str(value), [str(a) for a in allowed])}",
            where=name,
            expected=", ".join(str(a) for a in allowed),
            got=str(value),
        )


def at_least(minimum: float, **values: float) -> None:
    """Refuse numbers below a minimum."""
    for name, value in values.items():
        if not value >= minimum:
            raise InputError(f"{name} is too small", where=name, expected=f">= {minimum:g}", got=f"{value:g}")


def within(minimum: float, maximum: float, **values: float) -> None:
    """Refuse numbers outside a closed range."""
    for name, value in values.items():
        if not minimum <= value <= maximum:
            expected = f"from {minimum:g} to {maximum:g}"
            raise InputError(f"{name} is out of range", where=name, expected=expected, got=f"{value:g}")


def above(limit: float, **values: float) -> None:
    """Refuse numbers at or below a limit."""
    for name, value in values.items():
        if not value > limit:
            raise InputError(f"{name} is too small", where=name, expected=f"above {limit:g}", got=f"{value:g}")


def _problem(cls: type, key: str, value: Any) -> str:
    hints = typing.get_type_hints(cls)
    if key not in hints:
        return f"unknown key {key!r}{_suggest(key, hints)}"
    if not _fits(value, hints[key]):
        return f"{key} = {value!r}: expected {_type_name(hints[key])}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} = {value!r}: expected a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"{key} = {value!r}: expected a number of 64 bits"
    return ""


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))


def _names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"


def _literal(text: str) -> Any:
    """The TOML value that ``text`` spells, or the text itself, so that strings need no quotes on a command line."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return values["value"] if len(values) == 1 else text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _show(default: object) -> str:
    return "(required)" if default is MISSING else _toml(default)
