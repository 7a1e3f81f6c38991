"""One page that holds everything: what `page.html` is filled with."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from bench.output.figures import INK, STYLES
from bench.output.tables import cells_of, text_columns
from bench.quality.significance import FEW
from bench.records import Case, Record

from .answers import counted
from .sets import SHARED, RecordSet

MOST_ROWS = 60  # a longer table is in its CSV file


@dataclass(frozen=True)
class Section:
    """What the page shows of one question; without `table` there are no records of it.

    `lead` explains the question, `sentences` say what was found, `picture` is an SVG file, `file` the ablation, and
    `commands` measure the cell of each row of the table.
    """

    name: str
    title: str
    lead: str = ""
    file: str = ""
    sentences: Sequence[str] = ()
    table: pd.DataFrame | None = None
    picture: Path | None = None
    commands: Sequence[str] = ()


def page(chosen: RecordSet, sections: Sequence[Section], note: str) -> str:
    """The whole page as HTML that needs no other file."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=lambda name: name.endswith(".html"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {"marked_up": marked_up, "drawing": drawing, "rows": rows, "commands": measure_again,
                          "count": "{:,}".format, "counted": counted}  # fmt: skip
    commands = [record.command for record in chosen.records]
    return templates.get_template("page.html").render(
        case=chosen.newest.case,
        note=note,
        cells=len(chosen.records),
        few_windows=chosen.newest.case.evaluation_windows < FEW,
        left_out=chosen.left_out,
        sections=[section for section in sections if section.table is not None],
        silent=[section for section in sections if section.table is None],
        most_rows=MOST_ROWS,
        failed=failed_cells(chosen.failed),
        more_failed=len(chosen.failed) - MOST_ROWS,
        facts=facts(chosen),
        everything=command_for("ablations", commands) if any(commands) else "",
    )


def marked_up(words: str) -> Markup:
    """Words as HTML, with what stands in backticks as code."""
    return Markup(re.sub(r"`+([^`]+)`+", r"<code>\1</code>", str(escape(words))))


@dataclass(frozen=True)
class Table:
    """The heads and the rows of a table, each cell with its kind: "figure", "word" or "command"."""

    heads: list[tuple[str, str]]
    rows: list[list[tuple[str, str]]]


def table_of(frame: pd.DataFrame) -> Table:
    """The first rows of the frame."""
    frame = frame.head(MOST_ROWS)
    kinds = ["command" if name == "cell" else "word" if text else "figure"
             for name, text in zip(frame, text_columns(frame, list(frame)), strict=True)]  # fmt: skip
    return Table(
        heads=[(kind, name.replace("_", " ")) for kind, name in zip(kinds, frame, strict=True)],
        rows=[list(zip(kinds, row, strict=True)) for row in cells_of(frame, list(frame))],
    )


def rows(section: Section) -> Table:
    """A section's table, with the cell of each row where there are commands."""
    if not any(section.commands):
        return table_of(section.table)
    cells = [node_of(command).removeprefix("ablations/") for command in section.commands]
    return table_of(section.table.assign(cell=cells))


def node_of(command: str) -> str:
    """The pytest node that a record's command measures; empty where the record has none."""
    return shlex.split(command)[3] if command else ""


def command_for(file: str, commands: Sequence[str]) -> str:
    """The last of the commands, for a whole file or folder in place of its one cell."""
    words = shlex.split(next(command for command in reversed(commands) if command))
    return shlex.join([*words[:3], file, *words[4:]])


def measure_again(section: Section) -> dict[str, str] | None:
    """The commands that measure a question's cells again, the `whole` and `one` of them; None where there are none."""
    if not (section.file and any(section.commands)):
        return None
    own = [command for command in section.commands if node_of(command).startswith(section.file)] or section.commands
    return {"whole": command_for(section.file, own), "one": next(filter(None, reversed(own)))}


def drawing(section: Section) -> Markup:
    """The SVG file of a section's picture in the page's own colours, without its white ground."""
    svg = section.picture.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(STYLES[0][0].lower(), "var(--blue)")  # brighter on a dark page
    # pictures share a page: their names must not
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{section.name}-", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(section.title)}" ', 1))


def failed_cells(failed: Sequence[Record]) -> Table:
    """The cells whose last run failed, with the error."""
    found = [(record.method, (record.error or "unknown")[:300], cell_words(record.case)) for record in failed]
    return table_of(pd.DataFrame(found, columns=["method", "error", "cell"]))


def cell_words(case: Case) -> str:
    """The fields of a cell that all cells do not share, those that hold something."""
    hidden = (*SHARED, "criterion", "modules", "calibration_text", "calibration_sha256", "calibration_ids",
              "recovery_ids", "seed", "task_limit")  # fmt: skip
    return ", ".join(f"{name} {value}" for name, value in vars(case).items() if name not in hidden and value)


def facts(chosen: RecordSet) -> dict[str, str]:
    """Versions, devices, texts and hashes, each with all values that occur."""
    values: dict[str, dict[str, None]] = {}
    for record in chosen.records:
        for name in (*SHARED, "evaluation_text", "calibration_text", "calibration_sha256", "calibration_ids"):
            value = getattr(record.case, name)
            if value is not None:
                values.setdefault(name, {})[str(value)] = None
        for name, value in record.environment.items():
            values.setdefault("hardware" if name == "device" else name, {})[str(value)] = None
    return {name.replace("_", " "): ", ".join(found) for name, found in values.items()}
