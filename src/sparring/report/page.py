"""Frozen objects to one HTML file. The only home of jinja2: every text from the data is escaped by it."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparring.files import write_text
from sparring.report.compared import read_comparison_folder
from sparring.report.comparison_view import comparison_view
from sparring.report.read import read_run_folder
from sparring.report.run_view import run_view
from sparring.types import InputError

logger = logging.getLogger("sparring")

NAME = "report.html"


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page about a run folder or a comparison folder; an older page is replaced.

    Args:
        folder: holds results.json (a run) or comparison.json (a comparison).
        out: the file; default FOLDER/report.html.

    Raises:
        InputError: neither kind of folder, or a file in it is missing or not as Sparring writes it.
    """
    folder = Path(folder)
    text = render(folder)
    target = Path(out) if out is not None else folder / NAME
    try:
        write_text(target, text)
    except OSError as error:
        raise InputError("the report cannot be written", where=str(target), got=str(error)) from None
    logger.info("report: %s", target)
    return target


def render(folder: Path) -> str:
    """The page as text. The same folder gives the same bytes."""
    if (folder / "comparison.json").is_file():
        return _page("comparison.html.j2", comparison_view(read_comparison_folder(folder)))
    if (folder / "results.json").is_file():
        return _page("run.html.j2", run_view(read_run_folder(folder)))
    raise InputError(
        "this folder has nothing to report", where=str(folder),
        expected="results.json of a run that has ended, or comparison.json",
        got="no such folder" if not folder.is_dir() else "neither of them",
        fix="name the folder that was given as --out",
    )  # fmt: skip


def _page(template: str, view: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("sparring.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    style = files("sparring.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    environment.filters["svg"] = Markup  # figures are markup made here; nothing else is ever passed through it
    return environment.get_template(template).render(style=Markup(style), **view)
