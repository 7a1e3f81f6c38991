"""Records in; tables, plots and one page of what was found, and of what differs by more than chance, out."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from bench.output.figures import write_figure
from bench.output.files import write_whole
from bench.output.tables import csv_of, markdown_table, write_table
from bench.records import Record

from . import findings, peers
from .answers import Answer, Question, answer, counted, file_of, lead_of, table_of, title_of
from .frames import COLUMNS, pairs_frame, records_frame, tasks_frame
from .front import front_table
from .headline import write_benchmark, write_summary
from .overviews import plot_fidelity, plot_perplexity, plot_tasks, plot_texts
from .page import Section, page
from .plots import draw
from .questions import FRONT, QUESTIONS
from .rises import ON, interval_column
from .sets import RecordSet, is_reference, newest_by_case, newest_set
from .texts import fidelity_frame, fullest, is_near, texts_frame, texts_of

NOISE = "Differences with paired intervals at 95 % (bootstrap; of fewer than ten pairs Student's t); ≈: within noise."
METHODS = ("preset", "criterion")  # the questions whose records are told apart by their method


def methods_of(chosen: RecordSet) -> list[Record]:
    """The dense model and the records that differ in method, ratio and KV ratio only: what an overview shows."""
    questions = [question for question in QUESTIONS if question.name in METHODS]
    alike = (record for record in chosen.records if chosen.is_calibrated_alike(record))
    return [record for record in alike if is_reference(record) or any(one.matches(record) for one in questions)]


def write_report(
    records: Sequence[Record], directory: str | os.PathLike, beside: Sequence[dict] = ()
) -> tuple[str, list[Path]]:
    """Write tables, pictures and the page of the newest comparable set; returns what to print, and the files.

    `beside` are the lines of other packages (see `peers.read_peers`), which have a section of their own.

    Records that cannot be compared with the newest one (other model, text, windows, dtype, device or code) are left
    out and counted on the page. Raises OSError where a file cannot be written; none is left half-written.
    """
    directory = Path(directory)
    chosen = newest_set(records)
    if chosen is None:
        return "no successful record yet", []
    directory.mkdir(parents=True, exist_ok=True)
    note = provenance(chosen)
    overview = _methods(chosen, directory, note)
    with_peers = replace(chosen, records=(*peers.peer_records(beside, chosen), *chosen.records))
    found = {question.name: answer(question, with_peers if question is FRONT else chosen) for question in QUESTIONS}
    answers = {question.name: _question(question, found[question.name], directory, note) for question in QUESTIONS}
    parts = [*answers.values()]
    parts.insert(2, _capability(chosen, directory, note))
    parts[1:1] = filter(None, (_texts(chosen, directory, note), _fidelity(chosen, directory, note)))
    parts += filter(None, [_peers(beside, directory)])
    sections = [section for section, _, _ in parts]
    if all(answers[name][0].table is None for name in METHODS):  # else these two show the same
        sections.insert(0, overview[0])
    parts.insert(0, overview)
    files = [file for _, files, _ in parts for file in files]
    files.append(write_all_cells(chosen, directory / "cells.csv"))
    if methods := methods_of(chosen):
        front = found[FRONT.name]
        won = front_table(front) if front else pd.DataFrame()
        files.append(write_summary(methods, sections, directory, note, won))
        files.append(write_benchmark(methods, directory))
    files.append(write_whole(directory / "report.html", page(chosen, sections, note)))
    return "\n\n".join(text for _, _, text in parts if text), files


def written(files: Sequence[Path]) -> str:
    """One line: how many files, where, and which to open first."""
    pictures = sum(file.suffix == ".png" for file in files)
    return f"wrote {counted(len(files), 'file')}, {counted(pictures, 'picture')} among them; open {files[-1]}"


def _methods(chosen: RecordSet, directory: Path, note: str) -> tuple[Section, list[Path], str]:
    """The overview: every method at every fraction, and which is better than which."""
    records = methods_of(chosen)
    title = "Perplexity against the fraction removed"
    if not records:
        return Section("overview", title), [], ""
    frame = records_frame(records)
    files = write_table(directory / "perplexity", title, note, frame, COLUMNS)
    files += write_figure(
        directory / "perplexity", draw(plot_perplexity, frame[frame["kv_ratio"].isna()], figure_title(chosen))
    )
    pairs = pairs_frame(records)
    if len(pairs):
        files += write_table(
            directory / "differences",
            "Which method is better, and is it chance?",
            f"{note} {NOISE}",
            pairs,
            list(pairs),
        )
    shown = [name for name in COLUMNS[1:19] if frame[name].notna().any()]
    section = Section("overview", title, table=frame[shown], picture=directory / "perplexity.svg")
    return section, files, markdown_table(frame, shown)


def _texts(chosen: RecordSet, directory: Path, note: str) -> tuple[Section, list[Path], str] | None:
    """Every method on every evaluation text; None where there is one text only."""
    records = fullest(methods_of(chosen))
    dense = max(filter(is_reference, chosen.records), key=lambda record: len(record.texts), default=None)
    frame = texts_frame(records, dense)
    if not len(frame):
        return None
    calibration = chosen.calibration[0] if chosen.calibration else None
    table = frame[["method", "ratio", "kv_ratio"]].dropna(axis="columns", how="all")
    for text in texts_of(frame):
        side = "near" if is_near(text, calibration) else "far"
        table[f"{text} ({side})"] = interval_column(frame, f"{ON}{text}")
    table["mean_rise_nats"] = frame["mean_rise_nats"]
    title = "How do the methods do near the calibration text and far from it?"
    counts = ", ".join(f"{len(text['losses'])} of {text['name']}" for text in dense.texts)
    about = f"Rise of the loss over the dense model in nats; windows: {counts}."
    files = write_table(directory / "texts", title, f"{note} {about} {NOISE}", table, list(table))
    pictured = frame[frame["kv_ratio"].isna()]
    files += write_figure(directory / "texts", draw(plot_texts, pictured, chosen.newest.case.model))
    sentences = findings.texts(frame)
    section = Section("texts", title, about, sentences=sentences, table=table, picture=directory / "texts.svg")
    return section, files, f"{title}\n  " + "\n  ".join(sentences)


def _fidelity(chosen: RecordSet, directory: Path, note: str) -> tuple[Section, list[Path], str] | None:
    """How near every method stays to the dense model; None where that was not measured."""
    frame = fidelity_frame(fullest(methods_of(chosen)))
    if not len(frame) or (frame["method"] == "dense").all():
        return None
    title = "What does perplexity hide? Predictions beside the dense model's"
    compared = len(chosen.newest.texts[0]["kl_nats"]) if chosen.newest.texts else 0
    about = (
        f"KL divergence of the dense model's predictions and the share of places with the same likeliest token, on "
        f"{counted(compared, 'window')}; share of the tokens of greedy continuations up to the first difference."
    )
    shown = [name for name in frame if name != "fraction_removed" and frame[name].notna().any()]
    files = write_table(directory / "fidelity", title, f"{note} {about}", frame, shown)
    pictured = frame[frame["kv_ratio"].isna()]
    files += write_figure(directory / "fidelity", draw(plot_fidelity, pictured, chosen.newest.case.model))
    sentences = findings.fidelity(frame)
    section = Section(
        "fidelity", title, about, sentences=sentences, table=frame[shown], picture=directory / "fidelity.svg"
    )
    return section, files, f"{title}\n  " + "\n  ".join(sentences)


def _capability(chosen: RecordSet, directory: Path, note: str) -> tuple[Section, list[Path], str]:
    """Accuracy of tasks."""
    name = "capability"
    frame = tasks_frame([record for record in chosen.records if chosen.is_calibrated_alike(record)])
    if not len(frame):
        return Section(name, title_of(name), lead_of(name), file_of(name)), [], ""
    columns = [column for column in frame if column not in ("over_dense_mean", "over_dense_high", "fraction_removed")]
    files = write_table(directory / "tasks", "What a pruned model loses", f"{note} {NOISE}", frame, columns)
    picture = None
    if (frame["metric"] == "acc").any():
        items = sorted(set(frame["items"]))
        several = counted(items[0], "item") if len(items) == 1 else f"{items[0]} to {items[-1]} items"
        title = f"{chosen.newest.case.model}, {chosen.newest.case.dtype}, {several} a task"
        files += write_figure(directory / "tasks", draw(plot_tasks, frame, title))
        picture = directory / "tasks.svg"
    shown = ["task", "items", "method", "ratio", "value", "standard_error", "over_dense", "lost", "won", "mcnemar_p"]
    accuracy = frame[frame["metric"] == "acc"]
    sentences = [*findings.tasks(frame), *findings.flips(frame)]
    section = Section(name, title_of(name), lead_of(name), file_of(name), sentences=sentences,
                      table=frame[["task", "metric", *shown[1:]]], picture=picture)  # fmt: skip
    return section, files, markdown_table(accuracy, shown) if len(accuracy) else ""


def _question(question: Question, found: Answer | None, directory: Path, note: str) -> tuple[Section, list[Path], str]:
    """Table and picture of one question's answer; nothing where there are no records of it."""
    if found is None:
        return Section(question.name, question.title, question.lead, question.file), [], ""
    table = table_of(found)
    stem = directory / question.name
    files = write_table(stem, question.title, f"{note} {NOISE}", table, list(table))
    files += write_figure(stem, draw(question.draw, found))
    sentences = question.find(found)
    section = Section(
        question.name,
        question.title,
        question.lead,
        question.file,
        sentences=sentences,
        table=table,
        picture=stem.with_suffix(".svg"),
        commands=[record.command for record in found.records],
    )
    return section, files, f"{question.title}\n  " + "\n  ".join(sentences)


def _peers(lines: Sequence[dict], directory: Path) -> tuple[Section, list[Path], str] | None:
    """Other packages as they ship; None where none was measured."""
    if not lines:
        return None
    title, lead, table = "How do other packages do, as they ship?", peers.about(lines), peers.peers_frame(lines)
    table = table.dropna(axis="columns", how="all")
    files = write_table(directory / "packages", title, f"{lead} {NOISE}", table, list(table))
    sentences = peers.findings(lines)
    section = Section("packages", title, lead, sentences=sentences, table=table)
    return section, files, f"{title}\n  " + "\n  ".join(sentences)


def write_all_cells(chosen: RecordSet, path: Path) -> Path:
    """Every cell of the set with all its fields and metrics, as CSV."""
    rows = [
        {"method": record.method, **vars(record.case), **record.metrics,
         **{f"{name}_standard_error": error for name, error in record.standard_errors.items()},
         **{f"loss_nats {text['name']}": text["loss_nats"] for text in record.texts[1:]},
         "command": record.command}
        for record in newest_by_case(chosen.records)
    ]  # fmt: skip
    return write_whole(path, csv_of(pd.DataFrame(rows)))


def figure_title(chosen: RecordSet) -> str:
    case = chosen.newest.case
    windows = f"{counted(case.evaluation_windows, 'window')} of {case.evaluation_seq_len} tokens"
    return f"{case.model}, {windows} of {case.evaluation_text}, {case.dtype}"


def provenance(chosen: RecordSet) -> str:
    """What was measured, on what, with which versions: one sentence for every table."""
    case = chosen.newest.case
    where = {
        name: " and ".join(dict.fromkeys(str(record.environment[name]) for record in chosen.records))
        for name in ("device", "torch", "transformers", "transact")
    }
    calibrated = ""
    if chosen.calibration:
        text, _, _, samples, length, seed = chosen.calibration
        calibrated = f" calibrated on {counted(samples, 'window')} of {length} tokens of {text}, seed {seed};"
    return (
        f"Model {case.model} ({case.model_hash}); {counted(case.evaluation_windows, 'window')} of "
        f"{case.evaluation_seq_len} tokens of {case.evaluation_text} (SHA-256 {case.evaluation_sha256[:12]});"
        f"{calibrated} {case.dtype} on {where['device']}; torch {where['torch']}, "
        f"transformers {where['transformers']}, transact {where['transact']} (code {case.code})."
    )
