"""One page that holds everything: words first, then pictures, tables, the environment and the commands."""

import html
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.output.figures import INK, STYLES
from bench.output.tables import html_table
from bench.quality.significance import FEW
from bench.records import Case, Record

from .sets import SHARED, RecordSet

MOST_ROWS = 60  # a longer table is in its CSV file
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


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
    answered = [section for section in sections if section.table is not None]
    silent = [section for section in sections if section.table is None]
    model = html.escape(chosen.newest.case.model)
    parts = [
        f"<header><h1>What pruning costs {model}</h1><p>{html.escape(note)}</p></header>",
        summary(chosen, answered),
        *(section_html(section, chosen) for section in answered),
        without_records(silent),
        failed_cells(chosen.failed),
        environment(chosen),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>What pruning costs {model}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def marked_up(words: str) -> str:
    """Words as HTML, with what stands in backticks as code."""
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", html.escape(words))


def summary(chosen: RecordSet, answered: Sequence[Section]) -> str:
    """What was found, one entry a question, and how sure that is."""
    items = [
        f'<dt><a href="#{section.name}">{marked_up(section.title)}</a></dt><dd>{html.escape(section.sentences[0])}</dd>'
        for section in answered
        if section.sentences
    ]
    case = chosen.newest.case
    way = "Student's t" if case.evaluation_windows < FEW else "a paired bootstrap"
    sure = (
        f"{len(chosen.records):,} cells, each measured on the same {case.evaluation_windows:,} windows of "
        f"{case.evaluation_seq_len:,} tokens. Brackets hold 95 % intervals of the difference in loss, from {way} over "
        "these windows. “Beyond chance” means that the interval of that one comparison leaves out zero: of twenty "
        "comparisons of equals about one will. The intervals do not cover another choice of calibration text, seed or "
        "evaluation text."
    )
    if case.evaluation_windows < 2:
        sure = "Each cell is measured on one window. One window gives no interval: nothing tells what is chance."
    left_out = "; ".join(f"{count:,} of {reason}" for reason, count in chosen.left_out.items())
    note = f"<p>Left out, since they cannot be compared with these: {html.escape(left_out)}.</p>" if left_out else ""
    found = f"<dl>{''.join(items)}</dl>" if items else "<p>No question has enough records to compare anything.</p>"
    return f'<section id="summary"><h2>What was found</h2>{found}<p class="sure">{sure}</p>{note}</section>'


def section_html(section: Section, chosen: RecordSet) -> str:
    """Title, words, picture, table and command of one question."""
    lead = f'<p class="lead">{marked_up(section.lead)}</p>' if section.lead else ""
    words = lead + "".join(f"<p>{html.escape(sentence)}</p>" for sentence in section.sentences)
    table = section.table
    if any(section.commands):
        table = table.assign(cell=[node_of(command).removeprefix("ablations/") for command in section.commands])
    more = len(table) - MOST_ROWS
    rest = f"<p>{more:,} more rows are in the CSV file.</p>" if more > 0 else ""
    shown = html_table(table.head(MOST_ROWS), list(table))
    command = measure_again(section) if section.file and any(section.commands) else ""
    return (
        f'<section id="{section.name}"><h2>{marked_up(section.title)}</h2>{words}'
        f"{picture_html(section)}{shown}{rest}{command}</section>"
    )


def node_of(command: str) -> str:
    """The pytest node that a record's command measures; empty where the record has none."""
    return shlex.split(command)[3] if command else ""


def command_for(file: str, commands: Sequence[str]) -> str:
    """The last of the commands, for a whole file or folder in place of its one cell."""
    words = shlex.split(next(command for command in reversed(commands) if command))
    return shlex.join([*words[:3], file, *words[4:]])


def measure_again(section: Section) -> str:
    """How to measure a question's cells again, and one of them."""
    own = [command for command in section.commands if node_of(command).startswith(section.file)]
    whole = html.escape(command_for(section.file, own or section.commands))
    one = html.escape(next(command for command in reversed(own or section.commands) if command))
    return (
        f"<details><summary>Measure again</summary><pre><code>{whole}</code></pre>"
        f"<p>One row alone: what stands in its last column, behind <code>ablations/</code>, in place of the file; the "
        f"last of them</p><pre><code>{one}</code></pre><p>The column <code>command</code> of <code>cells.csv</code> "
        "holds each in full. A cell that has a record in the directory of <code>--results</code> is not measured "
        "again there.</p></details>"
    )


def picture_html(section: Section) -> str:
    """The SVG file in the page's own colours, without its white ground."""
    if section.picture is None:
        return ""
    svg = section.picture.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(STYLES[0][0].lower(), "var(--blue)")  # brighter on a dark page
    # pictures share a page: their names must not
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{section.name}-", svg)
    label = f'<svg role="img" aria-label="{html.escape(section.title)}" '
    return f'<figure class="scroll" tabindex="0">{svg.replace("<svg ", label, 1)}</figure>'


def without_records(silent: Sequence[Section]) -> str:
    """One line for each question that has no answer."""
    if not silent:
        return ""
    items = "".join(
        f"<li>{marked_up(section.title)}" + (f" <code>{section.file}</code>" if section.file else "") + "</li>"
        for section in silent
    )
    return f'<section id="silent"><h2>Questions without records</h2><ul class="plain">{items}</ul></section>'


def failed_cells(failed: Sequence[Record]) -> str:
    """The cells whose last run failed, with the error."""
    if not failed:
        return ""
    rows = [
        {"method": record.method, "error": (record.error or "unknown")[:300], "cell": cell_words(record.case)}
        for record in failed[:MOST_ROWS]
    ]
    more = len(failed) - MOST_ROWS
    rest = f"<p>{more:,} more failed.</p>" if more > 0 else ""
    table = html_table(pd.DataFrame(rows), ["method", "error", "cell"])
    return f'<section id="failed"><h2>Cells that failed</h2>{table}{rest}</section>'


def cell_words(case: Case) -> str:
    """The fields of a cell that all cells do not share, those that hold something."""
    hidden = (*SHARED, "criterion", "modules", "calibration_text", "calibration_sha256", "calibration_ids",
              "recovery_ids", "seed", "task_limit")  # fmt: skip
    return ", ".join(f"{name} {value}" for name, value in vars(case).items() if name not in hidden and value)


def environment(chosen: RecordSet) -> str:
    """Versions, devices, texts and hashes, each with all values that occur."""
    values: dict[str, dict[str, None]] = {}
    for record in chosen.records:
        for name in (*SHARED, "evaluation_text", "calibration_text", "calibration_sha256", "calibration_ids"):
            value = getattr(record.case, name)
            if value is not None:
                values.setdefault(name, {})[str(value)] = None
        for name, value in record.environment.items():
            values.setdefault("hardware" if name == "device" else name, {})[str(value)] = None
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(', '.join(one))}</td></tr>"
        for name, one in values.items()
    )
    commands = [record.command for record in chosen.records]
    again = ""
    if any(commands):
        everything = html.escape(command_for("ablations", commands))
        again = f"<h3>Measure everything again</h3><pre><code>{everything}</code></pre>"
    return (
        '<section id="environment"><h2>Where this was measured</h2>'
        f'<table class="facts"><tbody>{rows}</tbody></table>{again}</section>'
    )
