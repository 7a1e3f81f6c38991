"""What pruning takes by size: choices by the time there is, extrapolation, resuming, records of what fails."""

import json

import pytest
import torch
from transformers import LlamaConfig

from bench.__main__ import main
from bench.efficiency import report, scale
from bench.efficiency.report import read_scale, write_scale_report
from bench.efficiency.scale import Choice, Taken, choose, estimated_seconds, first_layers, parameters_of, run_scale
from bench.efficiency.shapes import SHAPES, random_model

CPU = torch.device("cpu")
RATES = (1e12, 5e11, 2e11)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", config)
    monkeypatch.setattr(scale, "rates_of", lambda device, dtype: RATES)
    return config


def of_the_weights(config, case, device) -> Taken:
    """What a pruning would take that takes nothing but the weights' own memory."""
    mib = 4 * parameters_of(config) / 2**20
    return Taken({"total": 1.0}, {"host": mib, "weights": mib})


def records_in(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "scale.jsonl").read_text().splitlines()]


def test_a_size_is_measured_once_and_again_on_more_windows(tmp_path, capsys):
    arguments = ["scale", "tiny", "--seq-len", "16", "--device", "cpu", "--results", str(tmp_path)]
    assert main([*arguments, "--samples", "2"]) == 0
    assert main([*arguments, "--samples", "2"]) == 0
    [record] = records_in(tmp_path)
    assert record["how"] == "measured"
    assert record["layers_measured"] == [3]
    assert {"make", "calibrate and score", "plan", "prune", "compensate", "total"} == record["seconds"].keys()
    assert record["seconds"]["total"] >= record["seconds"]["compensate"] > 0
    assert record["mib"]["host"] > record["mib"]["weights"] > 0
    assert main([*arguments, "--samples", "4"]) == 0
    assert [one["case"]["samples"] for one in records_in(tmp_path)] == [2, 4]
    assert "| 4 x 16 " in capsys.readouterr().out
    assert {"scale.md", "scale.csv", "scale.tex", "scale.png", "scale.svg"} <= {f.name for f in tmp_path.iterdir()}
    with (tmp_path / "scale.jsonl").open("a") as file:
        file.write('{"torn')
    frame, complaints = read_scale(tmp_path / "scale.jsonl")
    assert list(frame["windows"]) == ["4 x 16"]
    assert len(complaints) == 1


@pytest.mark.parametrize(
    ("allowed", "chosen"),
    [
        (1280, Choice(128, (10,), 1280)),
        (1279, Choice(32, (10,), 320)),
        (100, Choice(8, (10,), 80)),
        (79, Choice(8, (2, 4), 48)),
        (47, None),
    ],
)
def test_windows_are_given_up_before_layers(allowed, chosen):
    assert choose(lambda samples, layers: samples * layers, 128, 10, allowed) == chosen


def test_few_layers_of_a_shallow_model_are_all_of_them():
    assert choose(lambda samples, layers: samples * layers, 16, 4, 32) == Choice(8, (4,), 32)
    assert choose(lambda samples, layers: samples * layers, 16, 4, 31) is None


def test_layers_are_extrapolated_along_a_line():
    two = Taken({"plan": 3.0, "total": 10.0}, {"host": 100.0, "weights": 8.0})
    four = Taken({"plan": 5.0, "total": 9.0}, {"host": 140.0, "weights": 12.0})
    whole = four.at(32, two, (2, 4))
    assert whole.seconds == {"plan": 33.0, "total": 9.0}  # what more layers do not lengthen stays
    assert whole.mib == {"host": 700.0, "weights": 68.0}


def test_where_time_is_short_a_few_layers_are_measured(monkeypatch, tiny_shape):
    monkeypatch.setattr(scale, "estimated_seconds", lambda config, *rest: 10.0 * config.num_hidden_layers)
    monkeypatch.setattr(scale, "take", of_the_weights)
    monkeypatch.setitem(SHAPES, "tiny", tiny_shape := first_layers(tiny_shape, 6))
    [record] = run_scale(["tiny"], samples=2, seq_len=16, device="cpu", seconds=61 / 0.6)
    assert (record["status"], record["how"], record["layers_measured"]) == ("success", "measured", [6])
    monkeypatch.setattr(scale, "FEW_LAYERS", (1, 2))
    [record] = run_scale(["tiny"], samples=2, seq_len=16, device="cpu", seconds=31 / 0.6)
    assert (record["status"], record["how"], record["layers_measured"]) == ("success", "extrapolated", [1, 2])
    size = 4 * parameters_of(tiny_shape) / 2**20
    assert record["mib"]["weights"] == pytest.approx(size, rel=1e-6)
    [record] = run_scale(["tiny"], samples=2, seq_len=16, device="cpu", seconds=29 / 0.6)
    assert record["status"] == "skipped"
    assert record["error"] == "a few layers would take about 30 s, it may take 29 s"


def test_an_estimate_is_corrected_by_what_was_measured(monkeypatch, tiny_shape):
    monkeypatch.setitem(SHAPES, "second", tiny_shape)
    monkeypatch.setattr(scale, "estimated_seconds", lambda config, *rest: 1e-4 * config.num_hidden_layers)
    monkeypatch.setattr(scale, "take", of_the_weights)
    seen = []
    monkeypatch.setattr(scale, "choose", lambda *arguments: seen.append(arguments[-1]) or Choice(1, (3,), 1e-9))
    assert [
        r["status"] for r in run_scale(["tiny", "second"], samples=1, seq_len=9, device="cpu", seconds=100)
    ] == 2 * ["success"]
    assert seen[0] == pytest.approx(60, rel=0.1)
    assert seen[1] == pytest.approx(60 / 5, rel=0.1)  # far slower than it should be: at most five times


def test_what_fails_is_a_record_and_the_next_size_follows(monkeypatch, tiny_shape):
    def failing(config, case, device):
        if case.shape == "tiny":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        if case.shape == "second":
            raise RuntimeError("no\nsuch thing")
        return of_the_weights(config, case, device)

    monkeypatch.setattr(scale, "take", failing)
    monkeypatch.setitem(SHAPES, "second", tiny_shape)
    monkeypatch.setitem(SHAPES, "third", tiny_shape)
    records = list(run_scale(["tiny", "second", "third"], samples=2, seq_len=16, device="cpu"))
    assert [record["status"] for record in records] == ["out of memory", "failed", "success"]
    assert [record.get("error") for record in records[:2]] == [
        "CUDA out of memory. Tried to allocate 1 GiB", "RuntimeError: no such thing",
    ]  # fmt: skip


def test_estimates_grow_with_tokens_layers_and_size():
    small, large = SHAPES["smollm2-135m"], SHAPES["llama2-7b"]
    base = estimated_seconds(large, 10_000, RATES, CPU)
    assert estimated_seconds(large, 20_000, RATES, CPU) > base > estimated_seconds(small, 10_000, RATES, CPU)
    assert estimated_seconds(first_layers(large, 16), 10_000, RATES, CPU) == pytest.approx(base / 2)
    assert large.num_hidden_layers == 32


@pytest.mark.parametrize("name", ["llama3-1b", "llama3-3b", "llama3-8b", "llama2-7b", "smollm2-135m"])
def test_shapes_have_the_parameters_that_they_are_called_by(name):
    with torch.device("meta"):
        model = random_model(SHAPES[name], dtype="bfloat16", device=torch.device("meta"))
    assert parameters_of(SHAPES[name]) == model.num_parameters()
    millions = {"llama3-1b": 1236, "llama3-3b": 3213, "llama3-8b": 8030, "llama2-7b": 6738, "smollm2-135m": 135}
    assert parameters_of(SHAPES[name]) // 10**6 in (millions[name] - 1, millions[name])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["llama9"], "unknown shape 'llama9'"),
        (["tiny", "--samples", "0"], "at least 1"),
        (["tiny", "--seq-len", "129"], "seq-len 129 is longer than the context of tiny: 128"),
        (["tiny", "--ways", "best,worst"], "unknown way 'worst', allowed: best, layerwise"),
        (["tiny", "--minutes", "nan"], "minutes must be positive"),
    ],
)
def test_mistakes_are_one_line(arguments, named, tmp_path, capsys):
    try:
        code = main(["scale", *arguments, "--device", "cpu", "--results", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "scale.jsonl").exists()


def line(**changes) -> dict:
    """A line of `scale.jsonl`."""
    case = {"shape": "tiny", "way": "best", "ratio": 0.2, "samples": 2, "seq_len": 16, "dtype": "float32",
            "device": "cpu", "code": "c0de"}  # fmt: skip
    record = {"schema": 1, "environment": {"device": "EPYC", "torch": "2"}, "case": case, "status": "success",
              "how": "measured", "parameters": 7, "layers": 3, "seconds": {"total": 1.0, "plan": 0.5},
              "mib": {"weights": 1.0, "host": 2.0}}  # fmt: skip
    return record | changes


BROKEN = {
    "samples in words": {"case": line()["case"] | {"samples": "2"}},
    "a shape in parts": {"case": line()["case"] | {"shape": ["tiny"]}},
    "seconds in a list": {"seconds": [1.0]},
    "seconds in words": {"seconds": {"total": "long"}},
    "memory in words": {"mib": {"weights": "much"}},
    "no device": {"environment": {"device": None, "torch": "2"}},
    "an error in parts": {"error": ["a"]},
    "how in parts": {"how": ["measured"]},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_lines_that_tell_nothing_are_passed_over_by_number(broken, tmp_path, monkeypatch):
    path = tmp_path / "scale.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (line(**BROKEN[broken]), line())))
    frame, complaints = read_scale(path)
    assert complaints == [f"{path}:1: not a record (torn line?), passed over"]
    assert len(frame) == 1
    write_scale_report(frame, tmp_path)
    monkeypatch.setattr(scale, "code_hash", lambda: "c0de")
    assert not list(run_scale(["tiny"], samples=2, seq_len=16, dtype="float32", device="cpu", path=path))


def test_bars_of_two_dtypes_and_machines_are_told_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "write_figure", lambda stem, figure: drawn.append(figure) or [])
    other = line()["case"] | {"dtype": "bfloat16"}
    lines = line(), line(case=other), line(environment={"device": "Xeon", "torch": "2"})
    (tmp_path / "scale.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    write_scale_report(read_scale(tmp_path / "scale.jsonl")[0], tmp_path)
    labels = {label.get_text() for label in drawn[0].axes[0].get_yticklabels()}
    assert labels == {
        "tiny, best, float32, EPYC", "tiny, best, bfloat16, EPYC", "tiny, best, float32, Xeon"
    }  # fmt: skip
