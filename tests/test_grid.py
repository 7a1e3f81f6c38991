"""The grid: one calibration for all cells of a text, one pruning for all of the same weights, costs and bad options."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

import transact
from ablations.options import run_of, workbench_arguments
from ablations.profiles import PROFILES
from bench.suite.cases import ids_hash, recipe_of, weights_of
from bench.suite.grid import Estimate, calibration_of, estimate, in_order, parse_shard, shard_of
from bench.suite.workbench import Workbench
from tests.test_records import CASE, record
from transact import CRITERIA, PRESETS, Recipe


@pytest.fixture
def bench(tiny_directory, tiny_text, tmp_path) -> Workbench:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{i % 7 + 1}" for i in range(600)), encoding="utf-8")
    return Workbench(
        str(tiny_directory), calibration=str(tiny_text), domains=[str(other)], samples=8, calibration_seq_len=32,
        evaluation=str(tiny_text), windows=4, evaluation_seq_len=32, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often the expensive functions were called."""
    counted = Counter()

    def count(name: str):
        function = getattr(transact, name)

        def counting(*arguments, **options):
            counted[name if name != "loss_gradients" else options["of"]] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(transact, name, counting)

    for name in ("calibrate", "loss_gradients", "prune"):
        count(name)
    return counted


def grid(bench: Workbench) -> list:
    """Every criterion at two ratios, everything that makes up, all presets timed and not, and another text."""
    cases = [bench.dense_case]
    cases += [bench.case(Recipe(criterion=criterion), ratio) for criterion, ratio in product(CRITERIA, (0.2, 0.4))]
    cases += [bench.case(Recipe(compensation=how), 0.3) for how in ("none", "bias", "dense", "pruned")]
    cases += [bench.case(preset, 0.3, decode_tokens=tokens) for tokens, preset in product((0, 2), PRESETS)]
    return cases + [bench.case(preset, 0.3, calibration=bench.domains[0]) for preset in ("best", "transact")]


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few", "ignore:ratio .* of 2 layers")
def test_each_text_is_calibrated_once_and_each_model_pruned_once(bench, calls):
    cases = in_order(grid(bench))
    assert len(cases) == 1 + 20 + 4 + 8 + 9 + 2  # what several questions ask is there once
    records = [bench.measure(case) for case in cases]
    assert [one.case for one in records] == cases
    assert calls["calibrate"] == 2
    assert (calls["outputs"], calls["weights"]) == (2, 1)
    assert calls["prune"] == len({weights_of(case) for case in cases}) - 1
    timed = [one for one in records if one.case.decode_tokens]
    assert len(timed) == 9
    for one in timed:
        assert one.metrics["decode_tokens_per_s"] > 0
        assert one.standard_errors["decode_tokens_per_s"] > 0


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_what_is_scored_on_half_is_calibrated_beside_what_is_scored_on_all(bench, calls):
    obs, flap, best, later, dense = (
        bench.case(recipe, ratio, samples=32)
        for recipe, ratio in (
            (Recipe(criterion="obs"), 0.3), ("flap", 0.3), ("best", 0.3), ("best", 0.4),
            (replace(PRESETS["best"], compensation="dense"), 0.3),
        )
    )  # fmt: skip
    cases = in_order([obs, flap, best, later, dense])
    assert cases == [best, flap, later, obs, dense]
    shared = [bench.measure(case).losses for case in cases]
    assert (calls["calibrate"], calls["outputs"]) == (3, 2)
    for case, losses in zip(cases, shared, strict=True):
        alone = transact.prune(bench.dense, bench.windows_of(case), recipe=recipe_of(case), ratio=case.ratio)
        assert losses == bench.measure_model(alone.model, {}, replace(case, ratio=0.31)).losses
    assert bench.measure(replace(best, ratio=0.2)).losses  # moments of all windows were there meanwhile
    assert calls["calibrate"] == 4


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_ways_of_training_begin_with_the_same_model(bench, calls):
    bare = bench.case("transact", 0.3)
    ways = [bench.case("transact", 0.3, recovery=way, recovery_tokens=256) for way in ("full", "lora")]
    between = bench.case("flap", 0.3)
    cases = in_order([bare, between, *ways])
    assert cases == [bare, *ways, between]
    records = [bench.measure(case) for case in cases]
    assert calls["prune"] == 2
    again = bench.measure(ways[0])  # of a model that has not been trained since
    assert again.losses == records[1].losses != records[0].losses
    assert again.history == records[1].history != ()
    train = bench._trainer(ways[0], [], {})
    at_once = transact.prune(bench.dense, bench.windows_of(bare), recipe="transact", ratio=0.3, train=train)
    assert bench.measure_model(at_once.model, {}, ways[0]).losses == records[1].losses


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
@pytest.mark.parametrize("preset", ["best", "transact", "flap", "llm-pruner"])
def test_shared_statistics_give_what_a_cell_gives_by_itself(bench, preset):
    case = bench.case(preset, 0.3)
    windows = bench.windows_of(case)
    alone = transact.prune(bench.dense, windows, recipe=preset, ratio=0.3)
    bench.measure(bench.case(Recipe(criterion="obs"), 0.3))
    shared = bench.measure(case)
    assert shared.losses == bench.measure_model(alone.model, {}, replace(case, ratio=0.31)).losses


def swapped(directory: Path, tmp_path: Path, first: str, second: str) -> Path:
    """A copy of a checkpoint whose tokeniser takes two words for each other."""
    copy = shutil.copytree(directory, tmp_path / "swapped")
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    return copy


def test_another_tokeniser_makes_another_case(tiny_directory, tiny_text, tmp_path):
    evaluation, training = tmp_path / "evaluation.txt", tmp_path / "training.txt"
    evaluation.write_text("w1 w2 w3 w4 " * 100, encoding="utf-8")
    training.write_text("w1 w2 w5 w6 " * 100, encoding="utf-8")
    settings = {"samples": 2, "calibration_seq_len": 16, "windows": 2, "evaluation_seq_len": 16, "device": "cpu",
                "dtype": "float32", "evaluation": str(evaluation), "calibration": str(training)}  # fmt: skip
    own = Workbench(str(tiny_directory), **settings)
    assert own.dense_case == Workbench(str(tiny_directory), **settings).dense_case
    for pair in (("w1", "w2"), ("w5", "w6"), ("w90", "w91")):  # the last ones may be in tasks
        other = Workbench(str(swapped(tiny_directory, tmp_path, *pair)), **settings)
        assert other.dense_case.evaluation_ids != own.dense_case.evaluation_ids
        assert other.dense_case.model_hash == own.dense_case.model_hash
        shutil.rmtree(tmp_path / "swapped")


def test_texts_of_other_token_ids_make_other_cases(bench):
    case = bench.with_recovery(bench.case(Recipe(), 0.2), "full", 1000)
    kept = case.calibration_ids, case.recovery_ids
    assert all(kept)
    assert bench.dense_case.calibration_ids is bench.dense_case.recovery_ids is None
    bench.text(bench.calibration[0])[1][-1] += 1  # what another tokeniser might make of the same text
    bench.ids_hashes.clear()
    bench._identities.clear()
    again = bench.with_recovery(bench.case(Recipe(), 0.2), "full", 1000)
    assert again.evaluation_ids == case.evaluation_ids
    assert again.calibration_ids != kept[0]
    assert again.recovery_ids != kept[1]


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_a_mixture_is_one_text_with_the_same_windows(bench, tiny_text):
    mixture = f"self,{tiny_text},{bench.domains[0]}"
    case = bench.case("transact", 0.2, calibration=mixture)
    assert case.calibration_text == "self + words.txt + other.txt"
    windows = bench.windows_of(case)
    assert torch.equal(windows, bench.calibration_windows(mixture, 8, 32))
    bench._sources.clear()
    assert bench.case("transact", 0.2, calibration=mixture) == case
    assert torch.equal(bench.windows_of(case), windows)
    again = bench.case("transact", 0.2, calibration=mixture.replace(",", " , "))
    other = bench.case("transact", 0.2, calibration=f"{tiny_text},self,{bench.domains[0]}")
    assert again == case
    assert other.calibration_sha256 != case.calibration_sha256
    assert other.calibration_ids != case.calibration_ids
    assert bench.measure(case).status == "success"


def test_a_text_is_tokenised_once_whatever_is_cut_of_it(bench, tiny_text, monkeypatch):
    tokenise, tokenised = transact.tokenise, Counter()

    def counting(text, tokenizer):
        tokenised[text.name] += 1
        return tokenise(text, tokenizer)

    for module in ("transact", "transact.texts.sources"):
        monkeypatch.setattr(f"{module}.tokenise", counting)
    bench._texts.clear()
    for calibration in (f"self,{tiny_text},{bench.domains[0]}", str(tiny_text)):
        for samples in (4, 8):
            bench.case("transact", 0.2, calibration=calibration, samples=samples)
    assert tokenised == {tiny_text.name: 1, "other.txt": 1}


def test_a_text_by_itself_is_known_as_a_whole(bench, tiny_text):
    text = transact.load_text(str(tiny_text))
    first, few = bench.case("transact", 0.2), bench.case("transact", 0.2, samples=4)
    assert (first.calibration_text, first.calibration_sha256) == (text.name, text.sha256)
    assert first.calibration_ids == ids_hash(transact.tokenise(text, bench.tokenizer), bench.tokenizer)
    assert (few.calibration_sha256, few.calibration_ids) == (first.calibration_sha256, first.calibration_ids)
    own = bench.case("transact", 0.2, calibration="self")
    assert own.calibration_text == "self"
    assert own.calibration_sha256 == bench.sources("self", 8, 32)[0].sha256


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_a_mixture_is_trained_on_by_the_budget(bench, tiny_text, monkeypatch):
    bench.calibration = f"self,{tiny_text}", 8, 32
    case = bench.case("transact", 0.2, recovery="full", recovery_tokens=32 * 11)
    assert case.recovery_sha256 != case.calibration_sha256
    seen = []

    def recover(model, windows, *arguments, **options):
        seen.append(windows)
        raise InterruptedError

    monkeypatch.setattr(transact, "recover", recover)
    with pytest.raises(InterruptedError):
        bench.measure(case)
    assert torch.equal(seen[0], bench.calibration_windows(bench.calibration[0], 11, 32))


def test_order_keeps_texts_and_weights_together():
    recipes = {"criterion": "obs"}, {"criterion": "activation"}
    cases = [
        replace(CASE, **recipe, ratio=ratio, decode_tokens=tokens, calibration_sha256=text)
        for tokens, ratio, text, recipe in product((0, 16), (0.1, 0.2), ("a", "b"), recipes)
    ]
    ordered = in_order([*cases, *cases])
    assert sorted(map(str, ordered)) == sorted(map(str, cases))
    for part in (calibration_of, weights_of):
        changes = sum(part(before) != part(after) for before, after in pairwise(ordered))
        assert changes == len({part(case) for case in cases}) - 1
    assert [case.criterion for case in ordered[:2]] == ["obs"] * 2  # its second moments serve the others
    assert [case.criterion for case in ordered[2:4]] == ["activation"] * 2  # then first come, first served


def test_cases_say_what_this_model_or_text_cannot_give(bench):
    for changes, message in (
        ({"only_layer": 99}, "layer must lie between"), ({"mha_dim": 1}, "mha-dim must be a multiple"),
        ({"samples": 10**6}, "too short"), ({"seq_len": 10**6}, "longer than the model's context"),
        ({"ratio": 0.999}, "out of reach"), ({"calibration": "no such file"}, "no text"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bench.case(Recipe(), **{"ratio": 0.2} | changes)
    foreign = replace(bench.case(Recipe(), 0.2), calibration_sha256="f" * 64)
    with pytest.raises(ValueError, match="no calibration text here is"):
        bench.measure(foreign)


def test_named_widths_are_what_is_measured(bench):
    config = bench.dense.config
    dense = transact.dense_widths(config)
    one = bench.measure(bench.case(Recipe(), 0.5, only_layer=1))
    assert [layer == vars(whole) for layer, whole in zip(one.widths, dense, strict=True)].count(False) == 1
    named = bench.measure(bench.case(Recipe(), mha_dim=4 * config.num_attention_heads, mlp_dim=20))
    assert {(layer["v_head_dim"], layer["mlp"]) for layer in named.widths} == {(4, 20)}
    fine = bench.measure(bench.case(Recipe(), 0.3, head_multiple=2, mlp_multiple=1))
    assert fine.metrics["fraction_removed"] == pytest.approx(0.3, abs=0.005)


def test_shards_are_all_cells_each_once():
    cases = [replace(CASE, ratio=index / 100) for index in range(17)]
    parts = [shard_of([*cases, *cases], index, 5) for index in range(1, 6)]
    assert sorted(case.ratio for part in parts for case in part) == [case.ratio for case in cases]
    assert parse_shard("2/5") == (2, 5)


def test_estimates_come_from_like_records_or_a_stated_rate():
    cases = [replace(CASE, ratio=ratio) for ratio in (0.1, 0.2, 0.3)]
    by_rate = estimate(cases, [], 10**8)
    assert (by_rate.cells, by_rate.recorded, by_rate.measured) == (3, 0, 0)
    evaluation = 3 * 8 * 1.3  # its windows, compared with the dense model
    tokens = 3 * evaluation + 2 * 8  # three evaluations, one calibration
    assert by_rate.seconds == pytest.approx(3 * 1.5 + tokens * 2e8 / 2.4e11)
    measured = record(ratio=0.1)
    measured = replace(measured, metrics={**measured.metrics, "cell_s": 90.0})
    assert str(estimate(cases, [measured], 10**8)) == (
        "3 cells, 1 with records; the other 2 take about 3 minutes (2 by the recorded seconds of like cells, 0 by a "
        "stated rate)"
    )
    others = replace(cases[0], other_texts="a+b", other_windows=2, compared_windows=1)
    more = 2 * 2 * 8 + 16 * (32 + 64)  # two windows of both, as many compared as before, and greedy continuations
    assert estimate([others], [], 10**8).seconds - estimate(cases[:1], [], 10**8).seconds == pytest.approx(
        more * 2e8 / 2.4e11
    )
    failed = replace(measured, status="failed")
    assert estimate(cases, [failed], 10**8).recorded == 0
    assert str(estimate(cases[:1], [measured], 10**8)) == "1 cell, all measured already"
    assert str(Estimate(1, 0, 1, 1.2)).startswith("1 cell, 0 with records; the other 1 takes about 1 second (")


OPTIONS = {"profile": "quick", "results": "results"}


def options(**given):
    return (OPTIONS | given).get


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profile": "huge"}, "unknown profile 'huge', allowed: quick, full, paper"),
        ({"profile": "paper"}, "profile 'paper' has no model of its own: name one by --model"),
        ({"ratios": "0.1,1.5"}, r"ratio is the fraction removed and must lie in \[0, 1\), got 1.5"),
        ({"ratios": "0.1,much"}, "ratios must be numbers with commas, got '0.1,much'"),
        ({"presets": "best,flop"}, "unknown preset 'flop'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"seq_len": 1}, "seq-len must be at least 2, got 1"),
        ({"domains": "embedded,nofile"}, "no text 'nofile', allowed: self, embedded"),
        ({"domains": "embedded,self+nofile"}, "no text 'nofile' in 'self,nofile', allowed: self, embedded"),
        ({"calibration": "self,nofile"}, "no text 'nofile' in 'self,nofile', allowed: self, embedded"),
        ({"ray": "foo"}, "ray address must be auto, local, host:port"),
        ({"results": __file__}, "is no directory"),
        ({"windows": -1}, r"windows must be 0 \(all\) or more, got -1"),
        ({"shard": "5/4"}, "shard must be i/n with 1 <= i <= n, as in 2/5, got '5/4'"),
        ({"shard": "0/4"}, "shard must be i/n"),
        ({"shard": "two"}, "shard must be i/n"),
        ({"shard": "1/2", "ray": "auto"}, "--shard and --ray exclude each other"),
        ({"gpus_per_cell": 1.0}, "--gpus-per-cell is for --ray"),
        ({"gpus_per_cell": -1.0, "ray": "auto"}, "gpus-per-cell must be 0 or more, got -1"),
    ],
)
def test_options_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        run_of(options(**given))


def test_profiles_are_defaults_that_options_override():
    assert {frozenset(profile) for profile in PROFILES.values()} == {frozenset(PROFILES["quick"])}
    run = run_of(options(profile="paper", model="some/llama", ratios="0.2, 0.4", shard="2/3", samples=7))
    assert run.settings["model"] == "some/llama"
    assert (run.settings["ratios"], run.settings["samples"]) == ((0.2, 0.4), 7)
    assert run.settings["tasks"] == "paper"
    assert run.file.as_posix() == "results/records-2of3.jsonl"


def test_texts_in_turn_are_named_from_anywhere(tiny_text, monkeypatch):
    monkeypatch.chdir(tiny_text.parent)
    given = options(calibration="self, words.txt,embedded", domains="self+words.txt,sources")
    with monkeypatch.context() as patch:
        patch.setattr("ablations.options.evaluation", lambda given, run: "embedded")
        defaults = {"windowing": "blocks", "bos": False, "seed": 0, "dtype": "auto", "device": "cpu"}
        arguments = workbench_arguments(lambda name: given(name, defaults.get(name)), run_of(given))
    assert arguments["calibration"] == f"self,{os.path.abspath('words.txt')},embedded"
    assert arguments["domains"] == (f"self,{os.path.abspath('words.txt')}", "sources")


def test_a_refused_option_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "pytest", "ablations", "--shard", "5/4", "--results", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).splitlines() == [
        "Exit: ablations: error: shard must be i/n with 1 <= i <= n, as in 2/5, got '5/4'"
    ]
    assert not (tmp_path / "none").exists()
