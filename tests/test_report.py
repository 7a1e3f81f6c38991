"""The report: every question drawn and put into words from records alone, fast, whole, and never invented."""

import errno
import html
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import cycle
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from bench.output.figures import INK, STYLES
from bench.output.files import write_whole
from bench.output.tables import latex_table, markdown_table
from bench.records import append_record, finite, read_records
from reports import drawing, findings
from reports.__main__ import main
from reports.answers import answer, counted, table_of
from reports.drawing import METHODS, style_number, style_of
from reports.findings import plain
from reports.frames import records_frame, tasks_frame
from reports.questions import QUESTIONS
from reports.report import write_report, written
from reports.rises import rises_of_texts, text_label, text_named
from reports.sets import ASIDE, newest_set
from reports.texts import is_near, texts_frame, texts_of
from tests.synthetic import BASE, DENSE, PRESETS, Maker

BY_NAME = {question.name: question for question in QUESTIONS}


@pytest.fixture(scope="module")
def records():
    return list(Maker().every_question())


@pytest.fixture(scope="module")
def report(records, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    failed = replace(records[2], case=replace(BASE, ratio=0.9), metrics={}, losses=(), status="failed",
                     error="OutOfMemoryError: <none> left")  # fmt: skip
    older = replace(records[2], case=replace(records[2].case, code="older"))
    printed, _ = write_report([older, *records, failed], directory)
    return directory, printed


def write_records(path, records):
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return path


class Outline(HTMLParser):
    """What a page holds: tags, identifiers, where links go; complains of tags that do not close."""

    VOID = {"meta", "br", "use", "path", "rect"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.identifiers, self.links, self.sources = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.identifiers += [attributes["id"]] if "id" in attributes else []
        self.links += [value for name, value in attributes.items() if name in ("href", "xlink:href")]
        self.sources += [attributes["src"]] if "src" in attributes else []
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_question_has_table_picture_and_words(report):
    directory, printed = report
    for question in QUESTIONS:
        for suffix in ("md", "csv", "tex", "png", "svg"):
            assert (directory / f"{question.name}.{suffix}").stat().st_size > 0
        assert question.title in printed
        ElementTree.parse(directory / f"{question.name}.svg")
    assert not list(directory.glob(".*"))  # temporary files


def test_the_page_holds_everything_in_itself(report):
    text = (report[0] / "report.html").read_text()
    outline = Outline(text)
    assert outline.sources == []
    assert all(link.startswith("#") for link in outline.links)
    assert {link[1:] for link in outline.links} <= set(outline.identifiers)
    assert len(outline.identifiers) == len(set(outline.identifiers))
    assert "OutOfMemoryError: &lt;none&gt; left" in text
    assert "1 of code older" in text
    assert "prefers-color-scheme: dark" in text


def test_one_screen_says_the_most(report):
    text = (report[0] / "summary.md").read_text()
    [picture] = re.findall(r"!\[.+\]\((.+)\)", text)
    assert (report[0] / picture).stat().st_size > 0
    assert text.count("\n") < 40
    assert "| best " in text
    assert "| 0.1 |" not in text  # one fraction is enough


def test_figures_for_a_history_of_runs(records, report):
    figures = json.loads((report[0] / "benchmark.json").read_text())
    by_name = {figure["name"]: figure for figure in figures}
    assert len(by_name) == len(figures)
    assert all({"name", "unit", "value", "extra"} <= {*figure} for figure in figures)
    best = [record for record in records if record.method == "best" and record.case.ratio == 0.3]
    found = by_name[f"{best[0].case.model} best, 30 % removed: loss"]
    assert (found["value"], found["range"]) in {
        (round(one.metrics["loss_nats"], 5), f"± {one.standard_errors['loss_nats']:.5f}") for one in best
    }
    assert found["unit"] == "nats/token"
    assert by_name[f"{best[0].case.model} best, 30 % removed: rise on other texts"]["value"] > 0


def test_a_broken_model_has_no_figure_in_the_history(tmp_path):
    broken = Maker().record(BASE)
    broken = replace(broken, metrics={**broken.metrics, "perplexity": math.inf, "loss_nats": math.inf})
    write_report([Maker().record(DENSE), broken], tmp_path)
    names = [figure["name"] for figure in json.loads((tmp_path / "benchmark.json").read_text())]
    assert [name for name in names if name.endswith("loss")] == [f"{DENSE.model} dense: loss"]


def test_questions_without_records_are_said_to_have_none(tmp_path):
    write_report([Maker().record(DENSE), Maker().record(BASE)], tmp_path)
    text = (tmp_path / "report.html").read_text()
    silent = text[text.index('id="silent"') :]
    assert silent.count("<li>") == len(QUESTIONS) + 1
    assert "No question has enough records" in text
    assert not (tmp_path / "layer.csv").exists()


@pytest.mark.parametrize("name", BY_NAME)
def test_a_question_takes_records_that_differ_in_its_fields_only(records, name):
    question = BY_NAME[name]
    found = answer(question, newest_set(records))
    free = {*question.subject, *question.along, *ASIDE, "seed"}
    fixed = [field for field in vars(BASE) if field not in free and not field.startswith("calibration")]
    for _, group in found.frame.groupby("group"):
        assert all(group[field].nunique(dropna=False) == 1 for field in fixed)
        assert group.groupby("setting")["label"].nunique().min() > 1
    assert len(found.frame) == len(found.records)
    assert all(found.frame["ratio"] == [record.case.ratio for record in found.records])


def test_the_expected_cells_answer(records):
    chosen = newest_set(records)
    sizes = {name: len(answer(question, chosen).frame) for name, question in BY_NAME.items()}
    assert sizes["criterion"] == 8 * 4
    assert sizes["preset"] == len(PRESETS) * 3
    assert sizes["redundancy"] == 15
    assert sizes["allocation"] == 3 * 6 + 3  # FLAP's has no cache budget
    assert sizes["layer"] == 8
    assert sizes["calibration"] == 9
    assert sizes["domain"] == sizes["transfer"] == 4 * 3 * 2
    assert sizes["recovery"] == 4
    assert sizes["quantisation"] == 6


def test_words_follow_the_figures():
    maker = Maker()
    rivals = [replace(BASE, granularity=granularity) for granularity in ("dims", "heads")]
    better, worse = (maker.record(case) for case in rivals)
    question = BY_NAME["granularity"]

    def said(*records):
        return " ".join(question.find(answer(question, newest_set(records))))

    assert "“dims” loses less than “heads”, beyond chance" in said(maker.record(DENSE), better, worse)
    swapped = [replace(better, case=worse.case), replace(worse, case=better.case)]
    assert "“heads” loses less than “dims”, beyond chance" in said(maker.record(DENSE), *swapped)
    assert "but within noise" in said(maker.record(DENSE), better, replace(better, case=worse.case))


def test_differences_are_over_the_best_of_the_same_setting(records):
    frame = answer(BY_NAME["criterion"], newest_set(records)).frame
    best = frame.loc[frame.groupby("setting")["perplexity"].idxmin()]
    assert best["behind"].isna().all()
    others = frame.drop(best.index)
    assert (others["behind"] > 0).all()
    expected = others["loss_nats"] - others["setting"].map(best.set_index("setting")["loss_nats"])
    assert others["behind"].to_numpy() == pytest.approx(expected.to_numpy())
    assert table_of(answer(BY_NAME["criterion"], newest_set(records)))["loss_over_best"].isna().sum() == len(best)


def test_only_the_newest_comparable_set_is_shown(records):
    other = [replace(record, case=replace(record.case, device="cuda")) for record in records[:5]]
    chosen = newest_set([*other, *records])
    assert len(chosen.records) == len(records)
    assert chosen.left_out == {"device cuda": 5}
    assert len(newest_set([*records, *other]).records) == 5


def test_a_cell_that_failed_and_then_succeeded_is_no_failure(records):
    failed = replace(records[3], status="failed", metrics={}, losses=())
    assert newest_set([failed, *records]).failed == ()
    assert newest_set([*records[:2], failed]).failed == (failed,)


def test_other_calibration_is_shown_only_where_that_is_the_question(records):
    chosen = newest_set(records)
    assert chosen.calibration[-3:] == (64, 256, 0)
    assert set(answer(BY_NAME["criterion"], chosen).frame["calibration_samples"]) == {0, 64}
    assert len(set(answer(BY_NAME["calibration"], chosen).frame["calibration_tokens"])) == 5


def test_commands_measure_a_question_a_cell_and_everything(report):
    text = html.unescape((report[0] / "report.html").read_text())
    assert "<code>python -m pytest ablations/ablate_criterion.py --model synthetic</code>" in text
    assert "<code>python -m pytest ablations --model synthetic</code>" in text
    cell = "ablate_criterion.py::test_criterion[activation-0.3]"
    assert f'<td class="command">{cell}</td>' in text
    assert f"python -m pytest 'ablations/{cell}' --model synthetic" in (report[0] / "cells.csv").read_text()


def test_speeds_of_two_machines_are_not_compared(records, tmp_path):
    timed = [record for record in records if "decode_tokens_per_s" in record.metrics]
    other = replace(timed[0], environment={**timed[0].environment, "device": "H100", "torch": "3"})
    chosen = newest_set([other, *records[1:]])
    assert chosen.left_out == {"speed, measured on H100": 1}
    assert sum("decode_tokens_per_s" in record.metrics for record in chosen.records) == len(timed)
    write_report([other, *records[1:]], tmp_path)
    assert "float32 on H100 and Imaginary CPU @ 2 GHz; torch 3 and 2" in (tmp_path / "criterion.md").read_text()


def test_markdown_cells_hold_no_markup():
    from pandas import DataFrame

    table = markdown_table(DataFrame({"method": ["w|x<script>"], "perplexity": [1e300]}), ["method", "perplexity"])
    assert table.splitlines()[2] == r"| w\|x&lt;script> |     1e+300 |"


def test_latex_is_escaped(records):
    table = latex_table("50 % & more", "a_b", table_of(answer(BY_NAME["rope"], newest_set(records))), ["rope"])
    assert r"\caption{50 \% \& more a\_b}" in table
    assert table.count(r"\\") == table.count("\n") - table.count(r"\toprule") - 8
    assert r"\bottomrule" in table


def seconds_of_report(path):
    """Processor seconds that making the report of a record file takes."""
    before = os.times()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "reports", str(path)], check=True, capture_output=True, env=environment)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.slow
def test_ten_thousand_records_cost_less_than_three_times_what_few_do(tmp_path):
    """In processor time of one thread, so that neither the machine nor what else it does decides."""
    maker = Maker()
    records = list(maker.every_question())
    few = write_records(tmp_path / "few.jsonl", records)
    ratios = [number / 20_000 for number in range(1, 10_001 - len(records))]
    criteria = ("activation", "wanda", "taylor", "obs")
    records += [
        maker.record(replace(BASE, criterion=criteria[i % 4], ratio=ratios[i // 4])) for i in range(len(ratios))
    ]
    path = write_records(tmp_path / "records.jsonl", records)
    assert len(records) == 10_000
    assert seconds_of_report(path) < 3 * seconds_of_report(few)
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_shards_are_read_together(tmp_path, records, capsys):
    paths = [write_records(tmp_path / f"{i}.jsonl", records[i::3]) for i in range(3)]
    assert main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    together = write_records(tmp_path / "all.jsonl", [one for i in range(3) for one in records[i::3]])
    assert main([str(together), "--out", str(tmp_path / "out2")]) == 0
    assert (tmp_path / "out" / "criterion.md").read_text() == (tmp_path / "out2" / "criterion.md").read_text()


def test_a_directory_stands_for_its_records(tmp_path, records, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no record file" in capsys.readouterr().err
    for shard in range(2):
        write_records(tmp_path / f"records-{shard + 1}of2.jsonl", records[shard:10:2])
    assert main([str(tmp_path)]) == 0
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 1 + 9  # the dense model's two are one cell


def test_bad_lines_are_complained_of_briefly(tmp_path, records, capsys):
    path = tmp_path / "records.jsonl"
    line = json.dumps(asdict(records[0]) | {"schema": 1})
    path.write_text(f"{line}\n" * 250)
    append_record(path, records[0])
    with path.open("a") as file:
        file.write('{"torn')
    assert main([str(path), "--out", str(tmp_path)]) == 0
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 11
    assert complaints[-1] == "and 241 more"


@pytest.mark.parametrize("content", ["", "nonsense\n"])
def test_without_records_there_is_no_report(tmp_path, capsys, content):
    (tmp_path / "r.jsonl").write_text(content)
    assert main([str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "no successful record yet" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_missing_file_or_a_directory_that_cannot_be_made_is_one_line(tmp_path, records, capsys):
    assert main([str(tmp_path / "none")]) == 2
    path = write_records(tmp_path / "r.jsonl", records[:3])
    (tmp_path / "file").write_text("")
    assert main([str(path), "--out", str(tmp_path / "file" / "out")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("reports: error: ") for line in errors)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, records, capsys):
    (tmp_path / "report.html").write_text("old")
    path = write_records(tmp_path / "r.jsonl", records[:3])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full)
    assert main([str(path), "--out", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "report.html", "new")
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.jsonl", "report.html"]


def test_the_same_records_give_the_same_files(tmp_path, report, records):
    failed = replace(records[2], case=replace(BASE, ratio=0.9), metrics={}, losses=(), status="failed",
                     error="OutOfMemoryError: <none> left")  # fmt: skip
    older = replace(records[2], case=replace(records[2].case, code="older"))
    write_report([older, *records, failed], tmp_path)
    for name in ("report.html", "layer.svg", "cells.csv"):
        assert (tmp_path / name).read_bytes() == (report[0] / name).read_bytes()


def test_presets_of_the_synthetic_records_are_those_of_the_core():
    from transact import PRESETS as REAL

    for name, fields in PRESETS.items():
        assert all(getattr(REAL[name], field) == value for field, value in fields.items())


def record_on(case, texts: dict[str, list[float]], calibration: str = "near:calibration", **changes):
    """A record with these losses on these texts, the first the main one."""
    one = Maker(windows=2).record(replace(case, calibration_text=calibration if case.ratio else None), **changes)
    losses = next(iter(texts.values()))
    metrics = {**one.metrics, "loss_nats": sum(losses) / len(losses), "kl_nats": 0.25}
    entries = tuple(
        {"name": name, "sha256": name[0] * 64, "tokens": 9, "loss_nats": sum(each) / len(each), "losses": each,
         "kl_nats": [0.2, 0.3], "top1_agreement": [0.5, 0.75]}
        for name, each in texts.items()
    )  # fmt: skip
    return replace(one, losses=tuple(losses), texts=entries, metrics=metrics)


def some_texts():
    """The dense model, and two presets of which each is better on one of two texts."""
    dense = record_on(DENSE, {"near:evaluation": [3.0, 4.0], "far": [2.0, 2.5, 3.0]})
    best = record_on(
        replace(BASE, **PRESETS["best"]), {"near:evaluation": [3.1, 4.3], "far": [2.5, 3.0, 3.8]}
    )  # fmt: skip
    flap = record_on(
        replace(BASE, **PRESETS["flap"]), {"near:evaluation": [3.5, 4.5], "far": [2.2, 2.8, 3.4]}
    )  # fmt: skip
    return dense, best, flap


def test_every_text_has_its_rise_and_all_their_mean(tmp_path):
    dense, best, flap = some_texts()
    frame = texts_frame([dense, best, flap], dense)
    rows = frame.set_index("method")
    assert rows.loc["best", ["on near", "on far", "mean_rise_nats"]].tolist() == pytest.approx([0.2, 0.6, 0.4])
    assert rows.loc["flap", ["on near", "on far", "mean_rise_nats"]].tolist() == pytest.approx([0.5, 0.3, 0.4])
    assert texts_of(frame) == ["near", "far"]
    printed, _ = write_report([dense, best, flap], tmp_path)
    assert "Least on each: “best” on near; “flap” on far." in printed
    head = (tmp_path / "texts.csv").read_text().splitlines()[0]
    assert head == "method,ratio,near (near),far (far),mean_rise_nats"
    assert records_frame([dense, best, flap])["other_texts_rise_nats"].tolist()[1:] == pytest.approx([0.6, 0.3])
    assert "0.600" in (tmp_path / "preset.md").read_text()
    assert "is nearest to the dense model: KL divergence 0.250 nats" in printed
    assert "on 2 windows" in (tmp_path / "fidelity.md").read_text()


def test_texts_of_the_same_name_are_told_apart_and_other_windows_are_not_paired():
    dense, best, _ = some_texts()
    entries = [dense.texts[0] | {"name": "far"}, dense.texts[1]]
    twin = replace(dense, texts=tuple(entries))
    assert [text_label(place, twin) for place in (0, 1)] == ["far nnnnnn", "far ffffff"]
    short = replace(best, texts=(best.texts[0], best.texts[1] | {"losses": [2.0]}))
    assert list(rises_of_texts([short, best], dense)[0]) == ["near"]
    assert rises_of_texts([best], None) == [{}]


@pytest.mark.parametrize(
    ("evaluation", "calibration", "near"),
    [("embedded:evaluation", "embedded:calibration", True), ("sources:evaluation", "embedded:calibration", False),
     ("probes", None, False), ("my.txt", "my.txt", True), ("sources:evaluation", "self,sources:calibration", True)],
)  # fmt: skip
def test_near_is_the_source_of_the_calibration_text(evaluation, calibration, near):
    assert is_near(evaluation, calibration) == near


def test_a_mixture_is_called_as_it_was_asked_for():
    assert text_named("self,embedded:calibration,sources:calibration") == "self,embedded,sources"


def test_transfer_compares_calibration_texts_by_the_mean_of_all_texts(tmp_path):
    dense, best, _ = some_texts()
    other = record_on(best.case, {"near:evaluation": [3.4, 4.4], "far": [2.1, 2.6, 3.1]}, "far:calibration")
    other = replace(other, case=replace(other.case, calibration_sha256="f" * 64))
    found = answer(BY_NAME["transfer"], newest_set([dense, best, other]))
    table = table_of(found).set_index("transfer")
    assert table["mean_rise_nats"].to_dict() == pytest.approx({"near": 0.4, "far": 0.25})
    assert table.loc["far", "on far"].startswith("+0.100 [")
    assert BY_NAME["transfer"].find(found)[0] == (
        "With 30 % removed the mean rise over 2 texts is least with “calibrated on far”, 0.250 nats; 0.150 near and "
        "0.500 far on average."
    )


def test_flips_of_known_items_are_counted_in_both_directions():
    def answered(case, scores):
        result = {"version": 1.0, "shots": 0, "items": 8, "sha256": "d" * 64, "capability": None, "chance": None,
                  "metrics": {"acc": sum(scores) / 8, "f1": 0.5}, "standard_errors": {"acc": 0.1, "f1": 0.1},
                  "scores": {"acc": scores, "f1": [0.5] * 8}}  # fmt: skip
        return Maker().record(replace(case, tasks="t"), tasks={"t": result})

    dense = answered(DENSE, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    pruned = answered(BASE, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    frame = tasks_frame([dense, pruned])
    rows = frame[frame["metric"] == "acc"].set_index("method")
    assert rows.loc["transact", ["lost", "won"]].tolist() == [5, 1]
    assert rows.loc["transact", "mcnemar_p"] == 2 * (1 + 6) / 2**6
    assert frame[frame["metric"] == "f1"]["lost"].isna().all()  # no score of right or wrong
    assert findings.flips(frame) == [
        "“transact” with 30 % removed answers 6 of 8 items otherwise than the dense model: 5 wrong where that is "
        "right, 1 right where that is wrong (McNemar's exact p 0.22)."
    ]
    other = replace(pruned, tasks={"t": {**pruned.tasks["t"], "sha256": "e" * 64}})  # the data set has changed since
    alone = tasks_frame([dense, other])
    assert alone["value"].tolist() == frame["value"].tolist()
    assert alone[["over_dense", "lost", "mcnemar_p"]].isna().all(axis=None)


def test_every_ablation_file_has_a_question():
    from reports.answers import ABLATIONS

    files = {re.fullmatch(r"ablate_(\w+)", path.stem)[1] for path in ABLATIONS.glob("ablate_*.py")}
    assert files <= {*BY_NAME, "capability"}


@pytest.mark.parametrize(("value", "text"), [(29_610.4, "29,610"), (38.819, "38.82"), (0.12345, "0.1235")])
def test_figures_are_plain(value, text):
    assert plain(value, 4) == text


def test_lines_far_above_the_others_leave_the_picture_and_are_named():
    from pandas import DataFrame

    from reports.drawing import highest_shown
    from reports.overviews import plot_perplexity
    from reports.plots import draw

    rows = [
        ("dense", 0.0, 23.0),
        ("best", 0.3, 32.0),
        ("flap", 0.3, 47.0),
        ("random", 0.1, 1316.0),
        ("random", 0.3, 29871.0),
    ]
    frame = DataFrame(rows, columns=["method", "fraction_removed", "perplexity"]).assign(
        ratio=lambda one: one["fraction_removed"]
    )
    assert highest_shown(frame["perplexity"]) == 47
    assert highest_shown(frame["perplexity"][:3]) == 47  # nothing is far off: nothing is cut
    axes = draw(plot_perplexity, frame).axes[0]
    assert axes.get_ylim()[1] < 100
    assert axes.get_title(loc="left").splitlines() == ["above the picture:", "random 1,316, 29,871"]


def broken(record):
    """The record of a model whose loss is so high that no float holds its perplexity."""
    losses = tuple(loss + 800 for loss in record.losses)
    history = tuple({**row, "loss_nats": row["loss_nats"] + 800, "perplexity": math.inf} for row in record.history)
    metrics = record.metrics | {"perplexity": math.inf, "loss_nats": record.metrics["loss_nats"] + 800}
    errors = record.standard_errors | {"perplexity": math.inf}
    return replace(record, metrics=metrics, standard_errors=errors, losses=losses, history=history)


BROKEN = {
    "one criterion and the trained": lambda case: case.criterion == "random" or bool(case.recovery),
    "all": lambda case: True,
}


@pytest.mark.parametrize("which", BROKEN.values(), ids=BROKEN)
def test_models_without_a_perplexity_keep_their_loss(which, records, tmp_path, capsys, monkeypatch):
    drawn = []

    def noted(stem, figure):  # laid out, not written: that takes seconds
        drawn.append(stem.name)
        stem.with_suffix(".svg").write_text('<svg width="1" height="1"></svg>', encoding="utf-8")
        return []

    monkeypatch.setattr("reports.report.write_figure", noted)
    lines = (finite(asdict(broken(record) if which(record.case) else record)) for record in records)
    content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    (tmp_path / "records.jsonl").write_text(content, encoding="utf-8")
    assert '"perplexity": null' in content
    read, complaints = read_records(tmp_path / "records.jsonl")
    assert (len(read), complaints) == (len(records), [])
    assert main([str(tmp_path)]) == 0
    assert {"criterion", "preset", "perplexity", "layer", "recovery", "redundancy", "speed"} <= {*drawn}
    for path in (path for suffix in ("md", "csv", "tex") for path in tmp_path.glob(f"*.{suffix}")):
        assert not re.search(r"\b(inf|nan|None)\b", path.read_text(encoding="utf-8")), path
    assert not re.search(r"\b(inf|nan)\b", capsys.readouterr().out)


def test_the_highest_line_stays_in_the_picture():
    from pandas import Series

    from reports.drawing import highest_rise

    assert highest_rise(Series([0.157, 0.381, 0.335])) == 0.381
    assert highest_rise(Series([0.1, 0.2, 0.3, 4.0])) == 0.3


def test_methods_that_need_no_text_have_a_page_of_several_texts(records, tmp_path):
    chosen = [one for one in records if one.case.calibration_text is None and one.case.ratio in (0.0, 0.2)]
    assert {one.method for one in chosen} >= {"dense", "magnitude", "random"}
    write_report(chosen, tmp_path)
    assert (tmp_path / "texts.md").exists()


def test_speeds_run_in_turn_have_verdicts(records):
    chosen = newest_set(records)
    found = answer(BY_NAME["speed"], chosen)
    fastest, verdict = BY_NAME["speed"].find(found)[1:]
    assert re.search(r"tokens per second \(1\.\d+ times the dense model's, 1\.\d+ to 1\.\d+\)", fastest)
    assert re.fullmatch(r"Run in turn with the dense model, of \d+ cells \d+ are faster\.", verdict)
    changed = [
        replace(record, metrics=record.metrics | {"decode_speedup_low": low, "decode_speedup_high": high})
        if "decode_speedup" in record.metrics else record
        for record, (low, high) in zip(records, cycle([(0.9, 1.1)] * 2 + [(0.8, 0.9)] * 2), strict=False)
    ]  # fmt: skip
    verdict = BY_NAME["speed"].find(answer(BY_NAME["speed"], newest_set(changed)))[-1]
    assert "are slower" in verdict
    assert "are inconclusive" in verdict
    before = [replace(r, metrics={n: v for n, v in r.metrics.items() if "speedup" not in n}) for r in records]
    assert len(BY_NAME["speed"].find(answer(BY_NAME["speed"], newest_set(before)))) == 2


def test_budgets_are_compared_at_the_same_speed(records):
    found = answer(BY_NAME["budget"], newest_set(records))
    assert list(dict.fromkeys(found.frame["setting"])) == ["1.1 times the speed", "1.3 times the speed"]
    assert set(found.frame["label"]) == {"latency", "parameters"}
    sentences = BY_NAME["budget"].find(found)
    assert sentences[0].startswith("“latency” loses least everywhere")
    assert (
        "“latency” asked for 1.3 times the speed decodes at 1.21 times the dense model's, 1.19 to 1.23" in sentences[-1]
    )


def with_metrics(records, change):
    """The records with metrics of decoding changed: `change` gives the new value of one by its name."""
    return [
        replace(
            record, metrics=record.metrics | {n: change(record, n) for n in record.metrics if n.startswith("decode_")}
        )
        for record in records
    ]


@pytest.mark.parametrize("value", [None, 0.0])
def test_what_is_no_speed_is_on_no_front(records, value):
    changed = with_metrics(records, lambda record, name: value if record.method == "best" else record.metrics[name])
    found = answer(BY_NAME["speed"], newest_set(changed))
    assert "transact" in set(found.frame["method"])
    assert "best" not in set(found.frame["method"])
    sentences = BY_NAME["speed"].find(found)
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(sentences))
    BY_NAME["speed"].draw(found)
    assert answer(BY_NAME["speed"], newest_set(with_metrics(records, lambda *_: value))) is None


def test_too_few_runs_for_an_interval_are_said_to_be(records):
    ends = ("decode_speedup_low", "decode_speedup_high")
    changed = with_metrics(records, lambda record, name: None if name in ends else record.metrics[name])
    for question in ("speed", "budget"):
        found = answer(BY_NAME[question], newest_set(changed))
        sentences = " ".join(BY_NAME[question].find(found))
        assert "times the dense model's, in too few runs for an interval" in sentences
        assert "nan" not in sentences
        BY_NAME[question].draw(found)
        table_of(found)


def test_speeds_of_other_numbers_of_cores_are_not_compared(records):
    timed = [record for record in records if "decode_tokens_per_s" in record.metrics]
    one, two = ({**timed[0].environment, "threads": threads} for threads in (1, 2))
    others = [replace(record, environment=two) for record in records[2:]]
    chosen = newest_set([replace(timed[0], environment=one), *others])
    assert chosen.left_out == {"speed, measured on Imaginary CPU @ 2 GHz, 1 threads": 1}
    on_card = replace(timed[0].case, device="cuda")
    cards = [replace(timed[0], case=on_card, environment=where) for where in (one, two)]
    assert newest_set(cards).left_out == {}


def trained(way, peak, rise=0.0, frugal=False):
    """The record of a way of training that held so much, its losses higher by `rise` than those of another."""
    case = replace(BASE, recovery=way, recovery_tokens=9, recovery_sha256="f" * 64, recovery_frugal=frugal)
    base = Maker().record(replace(BASE, recovery="full"))
    losses = tuple(loss + rise + 0.001 * (place % 3) for place, loss in enumerate(base.losses))
    metrics = {"recovery_peak_mib": peak, "loss_nats": sum(losses) / 48, "perplexity": math.exp(sum(losses) / 48)}
    return replace(base, case=case, losses=losses, metrics=base.metrics | (metrics if peak else {}))


def said_of_training(*records):
    return findings.memory(answer(BY_NAME["recovery"], newest_set([Maker().record(DENSE), *records])))


def test_memory_of_each_way_of_training_and_the_best_in_that_of_forward_passes():
    peaks, within = said_of_training(
        trained("distillation", 1500.0), trained("lozo", 820.0, 0.3), trained("lora", 900.0, 0.1, frugal=True),
        trained("lozo", 800.0, 0.5, frugal=True),
    )  # fmt: skip
    assert "held in training, with all else that lay there: 800 MiB by “lozo, 9 tokens, one window at once”" in peaks
    assert peaks.endswith("900 MiB by “lora, 9 tokens, one window at once” and 1,500 MiB by “distillation, 9 tokens”.")
    assert "in the memory of forward passes alone, 800 MiB, “lozo, 9 tokens” loses least, with perplexity" in within
    assert "its lead over “lozo, 9 tokens, one window at once”, +0.200 [" in within
    assert within.endswith("nats, is beyond chance.")


def test_another_way_may_be_best_in_that_memory_or_nothing_else_fit_or_nothing_be_known():
    lora, lozo = trained("lora", 790.0, 0.1), trained("lozo", 800.0, 0.3)
    assert "“lora, 9 tokens” loses least" in said_of_training(lora, lozo)[1]
    assert said_of_training(trained("lora", 900.0, 0.1), lozo)[1].endswith("; nothing else fits.")
    assert len(said_of_training(lora, trained("full", 1500.0))) == 1  # nothing trained by forward passes alone
    assert said_of_training(trained("lora", None), trained("full", None)) == []
    same = trained("lozo-distillation", 800.0, 0.3)
    assert said_of_training(lozo, same)[1].endswith("is inconclusive.")


def removing(record, fraction):
    """The record, of which another fraction was removed than was asked for."""
    return replace(record, metrics=record.metrics | {"fraction_removed": fraction})


def of_ways(*cells):
    """The dense model and cells of the question of drops: (preset, drops, ratio, fraction removed)."""
    maker = Maker()
    made = [removing(maker.record(replace(BASE, **PRESETS[preset], ratio=ratio, drop_modules=drops)), fraction)
            for preset, drops, ratio, fraction in cells]  # fmt: skip
    return [maker.record(DENSE), *made]


COARSE = (("best", False, 0.3, 0.302), ("best", True, 0.3, 0.298), ("shortgpt", False, 0.3, 0.2),
          ("best", False, 0.5, 0.5), ("best", True, 0.5, 0.5), ("shortgpt", False, 0.5, 0.4))  # fmt: skip


def test_fractions_that_were_not_met_are_not_said_to_be_removed(tmp_path):
    found = answer(BY_NAME["drops"], newest_set(of_ways(*COARSE)))
    assert set(found.frame["setting"]) == {"30 % asked for", "50 % asked for"}
    sentences = BY_NAME["drops"].find(found)
    first = sentences[0]  # the one that a summary takes
    assert first.endswith(" “whole layers” removed 20 % where 30 % was asked for, and 40 % where 50 % was asked for.")
    assert not any("30 % removed" in one or "50 % removed" in one for one in sentences)
    write_report(of_ways(*COARSE), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "With 50 % asked for the mean rise over 3 texts is least" in page
    assert "“shortgpt” (40 % removed)" in page
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "“whole layers” removed 20 % where 30 % was asked for" in summary
    assert "With 50 % asked for “" in page[page.index('id="fidelity"') :]
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "50 % removed" not in summary
    assert "fraction_removed" in summary
    names = {one["name"] for one in json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))}
    assert "synthetic shortgpt, 40 % removed (50 % asked for): loss" in names
    assert "synthetic best, 50 % removed: loss" in names


def test_settings_that_all_met_are_said_to_be_removed():
    met = [(preset, drops, ratio, ratio + 0.005) for preset, drops, ratio, _ in COARSE]
    found = answer(BY_NAME["drops"], newest_set(of_ways(*met)))
    assert set(found.frame["setting"]) == {"30 % removed", "50 % removed"}
    assert not any("asked for" in one for one in BY_NAME["drops"].find(found))


def test_one_layer_alone_loses_a_fraction_of_its_own():
    records = [Maker().record(replace(BASE, only_layer=layer, ratio=0.5)) for layer in range(3)]
    assert set(answer(BY_NAME["layer"], newest_set(records)).frame["setting"]) == {"50 % removed"}


def test_accuracy_is_of_what_was_removed():
    maker = Maker()
    cases = (replace(case, tasks="probe_sums+probe_copying", task_limit=80) for case in (DENSE, BASE))
    dense, pruned = (maker.with_tasks(maker.record(case), rate) for case, rate in zip(cases, (0.9, 0.4), strict=True))
    frame = tasks_frame([dense, removing(pruned, 0.2)])
    for sentence in (*findings.tasks(frame), *findings.flips(frame)):
        assert sentence.startswith("“transact” with 20 % removed (30 % asked for) ")


def test_ways_without_cells_are_not_spoken_of():
    drops = BY_NAME["drops"]
    two = of_ways(*(cell for cell in COARSE if not cell[1]))
    sentences = drops.find(answer(drops, newest_set(two)))
    assert sentences[0].startswith("Not measured: “widths and modules”. ")
    some = of_ways(*(cell for cell in COARSE if cell[:3] != ("best", True, 0.3)))
    sentences = drops.find(answer(drops, newest_set(some)))
    assert sentences[0].startswith("Not measured: “widths and modules” at 30 % asked for. ")
    assert not drops.find(answer(drops, newest_set(of_ways(*COARSE))))[0].startswith("Not measured")


def test_no_two_lines_look_alike():
    assert len({style_of(method)[0] for method in METHODS}) == len(METHODS)
    lines = [style_number(number) for number in range(3 * len(STYLES))]
    assert len({(colour, dashes) for colour, _, dashes in lines}) == len(lines)
    assert len({(colour, marker) for colour, marker, _ in lines}) == len(lines)


def test_colours_are_seen_on_the_light_and_on_the_dark_page():
    def luminance(colour: str) -> float:
        parts = (int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4))
        linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    page = (Path(drawing.__file__).parent / "page.css").read_text(encoding="utf-8")
    grounds = {luminance(ground) for ground in re.findall(r"--ground: #([0-9a-f]{6});", page)}
    assert len(grounds) == 2
    for colour in {colour.lower() for colour, _, _ in STYLES} - {INK}:  # the ink of a page is that of its words
        for ground in grounds:
            darker, brighter = sorted((luminance(colour.removeprefix("#")), ground))
            assert (brighter + 0.05) / (darker + 0.05) > 2.2, colour


def test_one_of_anything_is_one():
    one = pd.DataFrame({"decode_speedup": [1.2], "decode_speedup_low": [1.1], "decode_speedup_high": [1.3]})
    assert findings.verdicts(one) == ["Run in turn with the dense model, of 1 cell 1 is faster."]
    two = pd.concat([one, one * 0.5])
    assert findings.verdicts(two) == ["Run in turn with the dense model, of 2 cells 1 is faster and 1 is slower."]
    task = {"metric": "acc", "method": "best", "ratio": 0.3, "fraction_removed": 0.3, "task": "t", "value": 0.5}
    worse = pd.DataFrame([{**task, "over_dense_mean": -0.1, "over_dense_high": math.nan, "over_dense": "-0.100"}])
    assert findings.tasks(worse) == [
        "“best” with 30 % removed is less accurate than the dense model, beyond chance, on 0 of 1 task (1 has too few "
        "items to tell); it falls furthest on t: -0.100, to 0.50."
    ]
    flipped = pd.DataFrame([{**task, "lost": 1, "won": 0, "items": 1}])
    assert "answers 1 of 1 item otherwise" in findings.flips(flipped)[0]
    assert counted(1, "window") == "1 window"
    assert counted(2000, "window") == "2,000 windows"
    assert written([Path("one.png")]) == "wrote 1 file, 1 picture among them; open one.png"


def test_layers_within_noise_are_counted_in_words():
    cases = [replace(BASE, only_layer=layer, ratio=0.5) for layer in range(3)]
    records = [Maker().record(case) for case in cases]
    dense = Maker().record(DENSE)
    as_dense = replace(records[0], losses=tuple(loss + 0.01 * (-1) ** i for i, loss in enumerate(dense.losses)))
    found = answer(BY_NAME["layer"], newest_set([dense, as_dense, *records[1:]]))
    [sentence] = BY_NAME["layer"].find(found)
    assert sentence.startswith("50 % of the layer removed: Layer ")
    assert sentence.endswith(" nats. Of 3 layers 1 is within noise of the dense model.")


def test_what_falls_on_no_task_is_not_said_to_fall():
    task = {"metric": "acc", "method": "best", "ratio": 0.3, "fraction_removed": 0.3, "task": "t", "value": 0.5}
    rows = pd.DataFrame([{**task, "over_dense_mean": 0.1, "over_dense_high": 0.2, "over_dense": "+0.100"}])
    assert findings.tasks(rows)[0].endswith("on 0 of 1 task; it falls on none.")


def test_what_is_as_good_as_the_dense_model_is_so_many_times_it():
    row = {"perplexity": 22.35, "times_dense": 1.0}
    assert findings.perplexity_of(row) == "perplexity 22.35 (1.00 times dense)"
    assert findings.perplexity_of({**row, "times_dense": None}) == "perplexity 22.35"


def test_of_two_the_better_is_said_to_be_better_than_the_other():
    maker = Maker()
    records = [maker.record(replace(BASE, **fields)) for fields in ({}, {"granularity": "heads"})]
    found = answer(BY_NAME["granularity"], newest_set([maker.record(DENSE), *records]))
    assert BY_NAME["granularity"].find(found)[0] == "“dims” loses less than “heads”, beyond chance."
