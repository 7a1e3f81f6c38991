"""Other packages in the report: named with their versions, compared on the same windows, on the front where timed."""

import json
import math

import numpy as np
import pytest

from bench.records import append_record
from reports.__main__ import main
from reports.answers import answer
from reports.families import family_of
from reports.peers import findings, peer_records, peers_frame, read_peers
from reports.questions import FRONT
from reports.report import write_report
from reports.sets import newest_set
from tests.synthetic import BASE
from tests.test_front import NEAR, OTHERS, dense, drawn, timed  # noqa: F401 (a fixture)

LONGER = np.concatenate([NEAR, [3.3, 3.4, 3.6]])  # the suite takes the first of these windows
OTHERWISE, FEWER = {"calibration": "sources:calibration"}, {"samples": BASE.calibration_samples - 1}
SPED = {"decode_speedup": 1.3, "decode_speedup_low": 1.28, "decode_speedup_high": 1.32}


def line(method: str, rise: float, ratio: float = 0.3, *, spread: float = 0.01, windows=LONGER, case=None, device=None,
         **row) -> dict:  # fmt: skip
    """A line of `peers.jsonl`, its losses higher than the dense model's by `rise`."""
    uneven = np.random.default_rng(len(method)).normal(0, spread if rise else 0, len(windows))
    uneven -= uneven.mean()
    texts = {"embedded:evaluation": (windows + rise + uneven).tolist(),
             **{f"{name}:evaluation": (one + rise).tolist() for name, one in OTHERS.items()}}  # fmt: skip
    settings = {"base": "synthetic", "method": method, "ratio": ratio if rise else 0.0,
                "calibration": BASE.calibration_text, "samples": BASE.calibration_samples,
                "seq_len": BASE.calibration_seq_len, "windows": 15, **(case or {})}  # fmt: skip
    row = {"method": method, "fraction_removed": settings["ratio"], "parameters": 9, "prune_s": 1.5,
           "perplexity": {name: float(np.exp(np.mean(one))) for name, one in texts.items()}, "losses": texts,
           **row}  # fmt: skip
    environment = {"device": device or "Imaginary CPU @ 2 GHz", "torch": "2", "transformers": "5", "transact": "0"}
    return {"case": settings, "row": row, "environment": environment, "schema": 1}


def lines() -> list[dict]:
    return [line("dense", 0), line("best", 0.4, **SPED), line("optipfair 0.4.2", 0.9, **SPED)]


def read(tmp_path, *written: dict) -> list[dict]:
    (tmp_path / "peers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written), encoding="utf-8")
    found, complaints = read_peers([tmp_path])
    assert complaints == []
    return found


def chosen():
    return newest_set([dense(), timed("best", 0.3, 0.4, 1.2), timed("flap", 0.3, 0.6, 1.25)])


def test_each_text_has_its_row_over_dense_and_over_the_best(tmp_path):
    frame = peers_frame(read(tmp_path, *lines()))
    rows = frame[frame["text"] == "embedded"].set_index("method")
    assert list(rows.index) == ["dense", "best", "optipfair 0.4.2"]
    assert rows.loc["dense", ["loss_over_dense", "loss_over_best"]].isna().all()
    assert rows.loc["best", "loss_over_dense"].startswith("+0.400")
    assert rows.loc["optipfair 0.4.2", "loss_over_best"].startswith("+0.500")
    assert rows.loc["optipfair 0.4.2", "decode_speedup"] == 1.3
    assert set(frame["text"]) == {"embedded", "sources", "probes"}


def test_a_package_is_behind_beyond_chance_or_that_is_inconclusive(tmp_path):
    sentences = findings(read(tmp_path, *lines(), line("torch-pruning 1.6.1", 0.41, spread=0.5)))
    assert len(sentences) == 3
    assert sentences[0].startswith("With 30 % removed “best” loses least on embedded, with perplexity ")
    assert "“optipfair 0.4.2” is behind by +0.500" in sentences[0]
    assert "nats, beyond chance and “torch-pruning 1.6.1” is behind by " in sentences[0]
    assert sentences[0].endswith("≈ nats, inconclusive.")


def test_a_package_may_lose_least(tmp_path):
    sentences = findings(read(tmp_path, line("dense", 0), line("best", 0.4), line("optipfair 0.4.2", 0.1)))
    assert sentences[0].startswith("With 30 % removed “optipfair 0.4.2” loses least on embedded")
    assert "behind" not in sentences[0]


def test_the_newest_lines_of_the_last_settings_count(tmp_path):
    other = line("optipfair 0.4.2", 0.2, case={"samples": 8})
    found = read(tmp_path, other, *lines(), line("best", 0.35))
    assert [one["row"]["method"] for one in found] == ["dense", "best", "optipfair 0.4.2"]
    assert np.mean(found[1]["row"]["losses"]["probes:evaluation"]) == pytest.approx(np.mean(OTHERS["probes"]) + 0.35)


@pytest.mark.parametrize("content", ['{"torn', '{"schema": 1, "case": {}, "row": {}}', '{"schema": 9}', "[]"])
def test_lines_that_are_none_are_complained_of(tmp_path, content):
    (tmp_path / "peers.jsonl").write_text(content + "\n" + json.dumps(lines()[0]) + "\n", encoding="utf-8")
    found, complaints = read_peers([tmp_path])
    assert len(found) == len(complaints) == 1


@pytest.mark.parametrize("losses", [{}, {"t": []}, {"t": [None, 1.0]}])
def test_lines_without_losses_are_complained_of(tmp_path, losses):
    (tmp_path / "peers.jsonl").write_text(json.dumps(line("best", 0.4, losses=losses)) + "\n", encoding="utf-8")
    found, complaints = read_peers([tmp_path])
    assert (found, len(complaints)) == ([], 1)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("case", "ratio", "0.3"), ("case", "samples", [32]), ("case", "base", None),
     ("row", "fraction_removed", "0.3"), ("row", "method", None), ("row", "losses", "few"), ("row", "losses", [1.0]),
     ("row", "prune_s", "long"), ("row", "decode_speedup", [1.2]), ("row", "decode_speedup_low", "1.1"),
     ("row", "prefill_speedup", {}), ("environment", "device", [1])],
)  # fmt: skip
def test_lines_whose_parts_are_of_another_kind_are_complained_of(part, name, value, tmp_path):
    first, *others = lines()
    others[-1][part][name] = value
    written = "".join(json.dumps(one) + "\n" for one in (first, *others))
    (tmp_path / "peers.jsonl").write_text(written, encoding="utf-8")
    found, complaints = read_peers([tmp_path])
    assert [one["row"]["method"] for one in found] == ["dense", "best"]
    assert len(complaints) == 1


def test_a_package_that_was_timed_is_on_the_front(tmp_path):
    [record] = peer_records(read(tmp_path, *lines()), chosen())
    assert (record.method, family_of(record)) == ("optipfair 0.4.2", "width")
    assert len(record.losses) == len(NEAR)
    assert [len(text["losses"]) for text in record.texts] == [12, 6, 6]
    found = answer(FRONT, newest_set([*chosen().records[:1], record, *chosen().records[1:]]))
    rows = found.frame.set_index("label")
    assert rows.loc["optipfair 0.4.2", "rise"] == pytest.approx(0.9, abs=0.02)
    assert "“optipfair 0.4.2” with 30 % removed loses least" in " ".join(FRONT.find(found))


@pytest.mark.parametrize(
    "theirs",
    [
        [line("dense", 0), line("optipfair 0.4.2", 0.9)],  # not timed
        [line("dense", 0), line("optipfair 0.4.2", 0.9, **SPED, device="another")],
        [line("dense", 0, windows=LONGER + 0.1), line("optipfair 0.4.2", 0.9, **SPED)],  # other windows, or model
        [line("dense", 0, windows=NEAR[:5]), line("optipfair 0.4.2", 0.9, windows=NEAR[:5], **SPED)],  # too few
        [line("optipfair 0.4.2", 0.9, **SPED)],  # without the dense model
        [line("dense", 0, case=OTHERWISE), line("optipfair 0.4.2", 0.9, case=OTHERWISE, **SPED)],
        [line("dense", 0, case=FEWER), line("optipfair 0.4.2", 0.9, case=FEWER, **SPED)],
    ],
)
def test_what_cannot_be_compared_is_not_on_the_front(theirs, tmp_path):
    assert peer_records(read(tmp_path, *theirs), chosen()) == []


@pytest.mark.usefixtures("drawn")
def test_the_page_names_packages_with_their_versions(tmp_path):
    read(tmp_path, *lines())
    write_report(chosen().records, tmp_path, read_peers([tmp_path])[0])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="packages">') :]
    assert "optipfair 0.4.2" in section
    calibrated = f"{BASE.calibration_samples} windows of {BASE.calibration_seq_len} tokens of {BASE.calibration_text}"
    assert f"calibrated on {calibrated}" in section
    assert "optipfair 0.4.2" in (tmp_path / "packages.md").read_text(encoding="utf-8")
    assert "optipfair 0.4.2" in (tmp_path / "front.csv").read_text(encoding="utf-8")
    assert "optipfair" not in (tmp_path / "perplexity.csv").read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawn")
def test_the_command_reads_them_beside_the_records(tmp_path, capsys):
    for record in chosen().records:
        append_record(tmp_path / "records.jsonl", record)
    read(tmp_path, *lines())
    assert main([str(tmp_path)]) == 0
    assert "How do other packages do, as they ship?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("prune_s", -1.0), ("decode_speedup", math.inf), ("fraction_removed", -0.5)]
)
def test_figures_that_cannot_be_are_complained_of_by_name(name, value, tmp_path):
    first, *others = lines()
    others[-1]["row"][name] = value
    written = "".join(json.dumps(one) + "\n" for one in (first, *others))
    (tmp_path / "peers.jsonl").write_text(written, encoding="utf-8")
    found, [complaint] = read_peers([tmp_path])
    assert [one["row"]["method"] for one in found] == ["dense", "best"]
    assert f"its row {name} is {value}, allowed: 0 " in complaint
