"""A question of an ablation file, the records that answer it, and the frame that tables and pictures are made of."""

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import attrgetter
from pathlib import Path

import pandas as pd

from bench.records import Case, Record

from .families import family_of
from .rises import (
    ON,
    differences,
    interval_column,
    interval_columns,
    interval_of,
    mean_rise,
    other_rises,
    rises_of_texts,
)
from .sets import ASIDE, CALIBRATION, QUALITY, SHARED, RecordSet, is_reference, quality

MET = 0.01  # of the parameters: what is removed less what was asked for
ABLATIONS = Path(__file__).resolve().parent.parent / "ablations"
# what every other question leaves alone
PLAIN = {"mha_dim": None, "mlp_dim": None, "only_layer": None, "head_multiple": None, "mlp_multiple": None,
         "ridge": None, "recovery": "", "quantisation": "", "engine": "transformers", "speedup": None,
         "budget": "", "depth": "none", "sparsity": "none", "drop_modules": False}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One ablation file, `ablations/ablate_NAME.py`, and how its records are told from others and shown.

    `subject` are the fields of a case that are compared, `along` those that they are compared along. Records answer
    it that differ in these only, hold the values of `where` (and `PLAIN`'s elsewhere), satisfy `belongs`, and take at
    least two values of the subject. `label` names a record's value of the subject. `draw` and `find` make a picture
    and sentences of an answer; `columns` are the metrics its table shows beside perplexity, `ON` the rise on each text.
    Where each cell is compared with the dense model, one `alone` is an answer.
    """

    name: str
    subject: tuple[str, ...]
    draw: Callable[["Answer"], object]
    find: Callable[["Answer"], list[str]]
    along: tuple[str, ...] = ("ratio",)
    where: Mapping[str, tuple] = field(default_factory=dict)
    belongs: Callable[[Record], bool] = lambda record: True
    label: Callable[[Record], str] | None = None
    columns: tuple[str, ...] = ()
    alone: bool = False

    @property
    def file(self) -> str:
        return file_of(self.name)

    @property
    def title(self) -> str:
        return title_of(self.name)

    @property
    def lead(self) -> str:
        return lead_of(self.name)

    @cached_property
    def plain(self) -> dict[str, object]:
        """The fields that this question leaves alone, with the values that they then have."""
        return {name: value for name, value in PLAIN.items() if name not in {*self.subject, *self.along, *self.where}}

    def matches(self, record: Record) -> bool:
        """Whether the record's fields are those that the question is asked at."""
        fields = vars(record.case)
        return (
            not any(fields[name] != value for name, value in self.plain.items())
            and all(fields[name] in values for name, values in self.where.items())
            and self.belongs(record)
        )

    def value(self, record: Record) -> tuple:
        """The record's values of the subject."""
        return tuple(getattr(record.case, name) for name in self.subject)

    def setting(self, record: Record) -> tuple:
        """The record's values of what the subject is compared along."""
        return tuple(getattr(record.case, name) for name in self.along)

    def label_of(self, record: Record) -> str:
        if self.label:
            return self.label(record)
        return ", ".join(str(value) for value in self.value(record))


def file_of(name: str) -> str:
    """The ablation file of a question."""
    return f"ablations/ablate_{name}.py"


@cache
def docstring(name: str) -> str:
    """The docstring of a question's ablation file, read without running it; empty where there is no such file."""
    path = ABLATIONS / f"ablate_{name}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") if path.is_file() else ""


def title_of(name: str) -> str:
    """The question itself: what its ablation file's docstring says first; the name where there is no file."""
    return re.split(r"(?<=[?.])\s", docstring(name), maxsplit=1)[0] or name.replace("_", " ")


def lead_of(name: str) -> str:
    """What the docstring says after the question."""
    return docstring(name)[len(title_of(name)) :].strip()


@dataclass(frozen=True)
class Answer:
    """The records that answer a question, one row of `frame` each, and the dense model's record if there is one.

    Columns of the frame: `group` (what else differs between records; empty where all are alike), `label` (the value of
    the subject), `setting` (the values along which it is compared, in words), the fields of the case, metrics and their
    standard errors; `times_dense`; differences of loss in nats with their intervals at 95 %: `rise`, `rise_low`,
    `rise_high` over the dense model, and `behind`, `behind_low`, `behind_high` over the best of the same group and
    setting; `other_texts_rise_nats`, the mean over all texts but the first, and, where the question shows every text,
    `on NAME` of each and `mean_rise_nats` of all; `attention_removed` and `mlp_removed` as fractions of dense widths.
    """

    question: Question
    frame: pd.DataFrame
    dense: Record | None
    records: tuple[Record, ...]


def answer(question: Question, chosen: RecordSet) -> Answer | None:
    """The answer that the records give, or None where none can be compared."""
    varying = {*question.subject, *question.along}
    identity = attrgetter(*(n for n in Case.__dataclass_fields__ if n not in {*varying, *ASIDE, *SHARED, *CALIBRATION}))
    free = [name for name in CALIBRATION if name in varying]
    # of two records that differ in what was measured aside, the one with most texts, then the one timed
    groups: dict[tuple, dict[tuple, Record]] = {}
    for record in sorted(chosen.records, key=lambda record: (len(record.texts), record.case.decode_tokens > 0)):
        if is_reference(record) and "quantisation" not in question.subject:
            continue
        if question.matches(record) and chosen.is_calibrated_alike(record, but=free):
            groups.setdefault(identity(record.case), {})[QUALITY(record.case)] = record
    asked = compared(question, [list(group.values()) for group in groups.values()])
    if not asked:
        return None
    references = sorted((r for r in chosen.records if is_reference(r)), key=lambda record: len(record.texts))
    dense = next((r for r in reversed(references) if question.belongs(r)), references[-1] if references else None)
    names = group_names(question, asked)
    settings = settings_of(question, [record for group in asked for record in group])
    rows = [row for name, group in zip(names, asked, strict=True)
            for row in group_rows(question, name, group, dense, settings)]  # fmt: skip
    records = tuple(record for group in asked for record in group)
    frame = pd.DataFrame(rows).assign(position=range(len(records)))
    order = list(dict.fromkeys(["group", "ratio", "kv_ratio", *question.subject]))
    frame = frame.sort_values(order, key=_sortable, kind="stable", ignore_index=True)
    records = tuple(records[position] for position in frame.pop("position"))
    return Answer(question, frame, dense, records)


def compared(question: Question, groups: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """The groups, each without the records that have no other value of the subject at the same setting.

    Where one group has three values or more, those of two are chance meetings of other questions' records, and left
    out. A question that one cell answers takes all.
    """
    if question.alone:
        return [list(group) for group in groups]

    def values(group: Sequence[Record]) -> int:
        return len({question.value(record) for record in group})

    asked = []
    for group in groups:
        at_setting: dict[tuple, list[Record]] = {}
        for record in group:
            at_setting.setdefault(question.setting(record), []).append(record)
        asked.append([record for rivals in at_setting.values() if values(rivals) > 1 for record in rivals])
    least = 3 if max(map(values, asked), default=0) >= 3 else 2
    return [group for group in asked if values(group) >= least]


def _sortable(column: pd.Series) -> pd.Series:
    """Numbers by size, words in their order of appearance, what is missing first."""
    if pd.api.types.is_numeric_dtype(column):
        return column.fillna(-1)
    if column.map(lambda value: value is None or isinstance(value, int | float)).all():
        return pd.to_numeric(column).fillna(-1)
    return pd.Series(pd.factorize(column)[0], index=column.index)


def group_names(question: Question, groups: Sequence[Sequence[Record]]) -> list[str]:
    """What tells the groups apart: the preset that one of its records is, or else the fields that differ."""
    if len(groups) == 1:
        return [""]
    aside = {*question.subject, *question.along, *ASIDE, *CALIBRATION}
    fields = [name for name in Case.__dataclass_fields__ if name not in aside]
    differing = [name for name in fields if len({getattr(group[0].case, name) for group in groups}) > 1]

    def words(group: Sequence[Record], names: Sequence[str]) -> list[str]:
        return [word for name in names if (word := _field_words(name, getattr(group[0].case, name)))]

    names = []
    for group in groups:
        preset = next((record.method for record in group if record.method != record.case.criterion), None)
        dense = group[0].case.criterion == "dense"
        names.append([preset] if preset else ["dense"] if dense else words(group, differing))
    if len(set(map(tuple, names))) < len(names):  # the same preset at several ratios, or otherwise changed
        added = [name for name in differing if len({getattr(g[0].case, name) for g in _pruned(groups)}) > 1]
        names = [name + [word for word in words(group, added) if word not in name] if name != ["dense"] else name
                 for name, group in zip(names, groups, strict=True)]  # fmt: skip
    return [", ".join(name) for name in names]


def _pruned(groups: Sequence[Sequence[Record]]) -> list[Sequence[Record]]:
    return [group for group in groups if group[0].case.criterion != "dense"]


def percent(fraction: float) -> str:
    """ "12.5 %"."""
    return f"{fraction * 100:.3g} %"


def counted(number: int, noun: str) -> str:
    """ "1 cell", "2,000 cells"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def is_met(ratio: float, removed: float) -> bool:
    """Whether so much is removed as was asked for: whole layers or heads of a small model may not come near."""
    return abs(removed - ratio) <= MET


def asked_words(ratio: float, removed: Iterable[float]) -> str:
    """ "30 % removed" of several models, or "30 % asked for" where not all of them lost that."""
    return f"{percent(ratio)} {'removed' if all(is_met(ratio, one) for one in removed) else 'asked for'}"


def removed_words(ratio: float, removed: float) -> str:
    """ "30 % removed" of one model, or "20 % removed (30 % asked for)"."""
    if is_met(ratio, removed):
        return f"{percent(ratio)} removed"
    return f"{percent(round(removed, 3))} removed ({percent(ratio)} asked for)"


def _field_words(name: str, value) -> str:
    if value in (None, "", False):
        return ""
    if name in ("ratio", "kv_ratio"):
        return f"{percent(value)} of the KV cache removed" if name == "kv_ratio" else f"{percent(value)} removed"
    return str(value) if isinstance(value, str) else f"{name.replace('_', ' ')} {value}"


def group_rows(
    question: Question, name: str, group: Sequence[Record], dense: Record | None, settings: Mapping[tuple, str]
) -> list[dict]:
    """The rows of one group; see `Answer`. `settings` are those of `settings_of`."""
    best: dict[tuple, Record] = {}
    for record in group:
        rival = best.setdefault(question.setting(record), record)
        if quality(record) < quality(rival):
            best[question.setting(record)] = record
    full = widths_total(dense) if dense else None
    rises = differences(group, [dense] * len(group))
    rises_by_text = rises_of_texts(group, dense) if ON in question.columns else [{}] * len(group)
    others = other_rises(group, dense)
    lags = differences(group, [best[question.setting(record)] for record in group])
    rows = []
    for record, rise, by_text, other, lag in zip(group, rises, rises_by_text, others, lags, strict=True):
        row = {
            "group": name, "label": question.label_of(record), "setting": settings[question.setting(record)],
            "method": record.method, **vars(record.case), "loss_nats": None, **record.metrics,
        }  # fmt: skip
        row |= {f"{metric}_standard_error": error for metric, error in record.standard_errors.items()}
        row["weight_mib"] = record.metrics["weight_bytes"] / 2**20 if "weight_bytes" in record.metrics else None
        packed = record.metrics.get("packed_weight_bytes", record.metrics.get("weight_bytes"))
        row["packed_weight_mib"] = None if packed is None else packed / 2**20
        row["family"] = family_of(record)
        row["calibration_tokens"] = record.case.calibration_samples * record.case.calibration_seq_len
        row["times_dense"] = record.metrics["perplexity"] / dense.metrics["perplexity"] if dense else None
        row |= interval_columns(by_text) | {"mean_rise_nats": mean_rise(by_text.values())}
        row["other_texts_rise_nats"] = other
        row |= interval_of("rise", rise) | interval_of("behind", lag)
        total = widths_total(record)
        kept = [mine / whole for mine, whole in zip(total, full, strict=True)] if total and full else (None, None)
        row["attention_removed"], row["mlp_removed"] = (None if share is None else 1 - share for share in kept)
        rows.append(row)
    return rows


def widths_total(record: Record) -> tuple[int, int] | None:
    """Widths of all layers added up: attention's (elements of the KV cache), and the MLP's."""
    if not record.widths:
        return None
    attention = sum(one["kv_heads"] * (one["qk_head_dim"] + one["v_head_dim"]) for one in record.widths)
    return attention, sum(one["mlp"] for one in record.widths)


def settings_of(question: Question, records: Sequence[Record]) -> dict[tuple, str]:
    """By setting the words for where along the question its records stand, as `setting_words` has it."""
    at: dict[tuple, list[Record]] = {}
    for record in records:
        at.setdefault(question.setting(record), []).append(record)
    return {setting: setting_words(question, alike) for setting, alike in at.items()}


def setting_words(question: Question, alike: Sequence[Record]) -> str:
    """Where records of one setting stand: "30 % (KV cache 50 %) removed" (or "asked for"), "1.3 times the speed"."""
    case = alike[0].case
    if "speedup" in question.along:
        return f"{case.speedup:g} times the speed"
    if "ratio" not in question.along:
        return ""
    # one layer loses a fraction of its own
    removed = [record.metrics["fraction_removed"] for record in alike if record.case.only_layer is None]
    words = asked_words(case.ratio, removed)
    cache = case.kv_ratio if "kv_ratio" in question.along else None
    return words.replace(" %", f" % (KV cache {percent(cache)})", 1) if cache else words


def table_of(found: Answer) -> pd.DataFrame:
    """What readers of the table want: only columns that say something, in words where there are words."""
    frame, question = found.frame, found.question
    table = pd.DataFrame({question.name: frame["label"]})
    if frame["group"].any():
        table.insert(0, "of", frame["group"])

    def add(names: Sequence[str], values: int = 1) -> None:
        """The columns of the frame that take at least so many values."""
        for name in names:
            if name in frame and frame[name].nunique(dropna=False) >= values:
                table[name] = frame[name]

    add(question.along, 2)
    if ON in question.columns:
        for name in [name for name in frame if name.startswith(ON) and f"{name}_low" in frame]:
            table[name] = interval_column(frame, name)
        add(("mean_rise_nats",))
    add(("perplexity", "perplexity_standard_error", "times_dense"))
    table["loss_over_dense"] = interval_column(frame, "rise")
    table["loss_over_best"] = interval_column(frame, "behind")
    add(("other_texts_rise_nats", "kl_nats", "top1_agreement", "greedy_agreement"))
    add(("fraction_removed", "kv_fraction_removed"), 2)
    add(question.columns)
    return table.dropna(axis="columns", how="all")
