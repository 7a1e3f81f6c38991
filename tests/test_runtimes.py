"""Models in engines: records, table and picture of them; an engine here is transformers, or one that is made up."""

import json
import sys

import pytest
import torch

import transact
from bench.__main__ import main
from bench.efficiency import continuations, engines
from bench.efficiency.continuations import Run, agreement, prompts_of
from bench.efficiency.engines import ENGINES, Engine, compare_engines
from bench.efficiency.report import read_engines, write_engines_report
from transact import PRESETS, Recipe
from transact.engines import check_held
from transact.models import load_tokenizer
from transact.texts import load_text


def forgetful(model, tokenizer, prompts):
    """Says one token for ever."""
    yield Run("forgetful f16", [[1] * continuations.NEW_TOKENS for _ in prompts], 50.0, 2.0)


FORGETFUL = Engine(lambda: "9.9", forgetful)


@pytest.fixture
def short_text(monkeypatch, tiny_text):
    """Few words in place of the embedded text, and few of them to say."""
    for module in (continuations, engines):
        monkeypatch.setattr(module, "load_text", lambda name, split=None: load_text(str(tiny_text)))
    monkeypatch.setattr(continuations, "PROMPTS", 2)
    monkeypatch.setattr(continuations, "NEW_TOKENS", 6)


@pytest.fixture
def two_engines(monkeypatch, short_text):
    """Transformers and an engine that is always wrong, both with a recipe that costs little."""
    monkeypatch.setitem(PRESETS, "best", Recipe(criterion="predicted-loss", allocation="searched"))
    monkeypatch.setitem(ENGINES, "executorch", FORGETFUL)
    return ["transformers", "executorch"]


def test_every_engine_runs_every_model(two_engines, tiny_directory):
    records = [*compare_engines(str(tiny_directory), engines=two_engines, ratio=0.3, samples=2, length=32)]
    rows = [record["row"] for record in records]
    assert [row.keys() for row in rows] == [{"model", "engine", "tokens_per_s", "mib", "same_tokens"}] * 6
    assert [(row["model"], row["engine"]) for row in rows] == [
        (model, engine) for engine in ("transformers", "forgetful f16") for model in ("dense", "plain", "searched")
    ]
    assert all(row["same_tokens"] == 1.0 for row in rows[:3])
    assert all(row["same_tokens"] < 0.5 for row in rows[3:])
    assert rows[0]["mib"] > rows[1]["mib"] > 0
    assert [record["case"]["ratio"] for record in records] == [0.0, 0.3, 0.3] * 2
    assert records[-1]["environment"]["executorch"] == "9.9"
    json.dumps(records, allow_nan=False)


def test_engines_that_hold_the_same_run_one_model_and_all_are_searched_by_one_reading_of_the_text(
    two_engines, tiny_directory, monkeypatch
):
    prunings, prune = [], transact.prune

    def counted(*arguments, **options):
        prunings.append(options)
        return prune(*arguments, **options)

    monkeypatch.setattr(transact, "prune", counted)
    assert len([*compare_engines(str(tiny_directory), engines=two_engines, samples=2, length=32)]) == 6
    assert [options["recipe"].engine for options in prunings] == ["plain", "transformers"]
    assert prunings[0]["statistics"] is prunings[1]["statistics"] is not None


def test_what_an_engine_cannot_hold_is_said_and_left_out(two_engines, tiny_directory, monkeypatch, capsys):
    monkeypatch.setattr(engines, "check_held", lambda name, widths: check_held("vllm-cpu", widths))
    assert not [*compare_engines(str(tiny_directory), engines=["executorch"], samples=2, length=32)]
    assert "dense: engine 'vllm-cpu' runs query-key heads of 32, 64" in capsys.readouterr().err


def test_what_cannot_be_run_is_known_before_anything_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match=r"llama\.cpp is not installed: `nox -s engines`"):
        next(compare_engines("no such model", engines=["transformers", "llama.cpp"]))
    with pytest.raises(ValueError, match=r"unknown engine 'lama\.cpp', allowed: transformers, llama\.cpp"):
        next(compare_engines("no such model", engines=["lama.cpp"]))
    with pytest.raises(ValueError, match="ratio is the fraction removed"):
        next(compare_engines("no such model", engines=["transformers"], ratio=1.5))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--engines", "lama.cpp"], "unknown engine 'lama.cpp', allowed: transformers, llama.cpp"),
        (["--engines", "transformers", "--ratio", "1.5"], "ratio is the fraction removed"),
        (["--engines", "llama.cpp"], "llama.cpp is not installed"),
    ],
)
def test_mistakes_are_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    try:
        code = main(["engines", *arguments, "--results", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def record_of(model: str, engine: str, rate: float, mib: float, same: float = 1.0, **changes) -> dict:
    ratio = 0.0 if model == "dense" else 0.2
    return {
        "case": {"base": "tiny", "model": model, "engine": engine, "ratio": ratio} | changes.pop("case", {}),
        "row": {"model": model, "engine": engine, "tokens_per_s": rate, "mib": mib, "same_tokens": same},
        "environment": {"device": "a chip", "threads": 2} | changes.pop("environment", {}), "schema": 1, **changes,
    }  # fmt: skip


def test_speed_and_bytes_go_over_the_dense_models_in_the_same_engine(tmp_path):
    path = tmp_path / "engines.jsonl"
    records = [
        record_of("dense", "llama.cpp f32", 9.0, 99.0),  # measured again below
        record_of("dense", "llama.cpp f32", 10.0, 100.0), record_of("searched", "llama.cpp f32", 15.0, 80.0),
        record_of("dense", "transformers", 5.0, 110.0), record_of("plain", "transformers", 6.0, 55.0),
        record_of("searched", "transformers", 6.0, 55.0, case={"base": "other"}),  # no dense one to compare with
    ]  # fmt: skip
    records += [record_of("plain", "halting", None, 5.0), record_of("plain", "halting", "fast", 5.0)]
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"case": {"torn', encoding="utf-8")
    frame, complaints = read_engines(path)
    assert len(complaints) == 3
    assert frame["model"].tolist() == ["dense", "searched, 20% removed", "dense", "plain, 20% removed",
                                       "searched, 20% removed"]  # fmt: skip
    assert frame["tokens_per_s_over_dense"].tolist()[:4] == [1.0, 1.5, 1.0, 1.2]
    assert frame["mib_over_dense"].tolist()[:4] == [1.0, 0.8, 1.0, 0.5]
    assert frame["mib_over_dense"].isna().tolist() == [False] * 4 + [True]
    table, files = write_engines_report(frame, tmp_path / "out")
    assert "| searched, 20% removed | llama.cpp f32 |         15.0 |  80 |       1.000 |" in table.splitlines()
    assert [file.name for file in files] == [f"engines.{end}" for end in ("md", "csv", "tex", "png", "svg")]


def test_a_continuation_counts_up_to_its_first_difference():
    assert agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 0, 4], [5, 6, 7, 8]]) == 6 / 8


def test_the_prompts_are_token_ids_of_one_length(short_text, tiny_directory):
    prompts = prompts_of(load_tokenizer(str(tiny_directory)))
    assert [len(prompt) for prompt in prompts] == [continuations.PROMPT_TOKENS] * 2
    assert torch.tensor(prompts).dtype == torch.int64
