"""The commands: what they write and print, and that mistakes end in one line, exit code 2 and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import transact
from bench.__main__ import main as bench_main
from tests.test_measures import independent_loss
from tests.tiny import NARROWING, tiny_llama, zeroed
from transact.__main__ import main
from transact.commands.export import heads_and_mlp_in_words
from transact.commands.inspect import layers_in_words
from transact.commands.prune import RECIPE_OPTIONS
from transact.recovery import hold_out
from transact.texts import SELF, TEXTS

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(autouse=True)
def quiet_transformers():
    """The commands turn transformers' bars and warnings off: put them back for the tests that follow."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def prune(tiny_directory, tiny_text, tmp_path):
    """A function that runs `transact prune` on the tiny model with small settings; later arguments win."""

    def run(*arguments: str, model=tiny_directory, out=tmp_path / "out") -> int:
        settings = ["--calibration", str(tiny_text), "--samples", "8", "--seq-len", "32", "--device", "cpu"]
        return main(["prune", str(model), str(out), *settings, *arguments])

    return run


def test_prune_writes_a_checkpoint_that_anyone_can_check(prune, tiny_directory, tmp_path, capsys):
    assert prune("--ratio", "0.3", "--preset", "transact") == 0
    assert "of the decoder layers' linear parameters and 25.0% of the KV cache removed" in capsys.readouterr().out
    narrowed, tokenizer = transact.load_model(tmp_path / "out", device="cpu")
    plan = transact.load_plan(tmp_path / "out")
    oracle = zeroed(tiny_llama("gqa"), plan)
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        expected = oracle(input_ids=ids).logits
        scale = expected.abs().max()
        torch.testing.assert_close(narrowed(input_ids=ids).logits / scale, expected / scale, rtol=1e-5, atol=1e-5)
    assert tokenizer("w3 w5").input_ids == [3, 5]

    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert pruning["parameters_before"] == tiny_llama("gqa").num_parameters()
    assert pruning["parameters_after"] == narrowed.num_parameters()
    assert pruning["fraction_removed"] == pytest.approx(0.3, abs=0.005)
    assert pruning["layers"] == [vars(widths) for widths in plan.widths]
    assert pruning["criterion"] == "activation"
    assert pruning["calibration"]["tokens"] == 8 * 32
    assert len(pruning["calibration"]["sha256"]) == 64
    assert set(pruning["seconds"]) == {"load", "text", "calibrate and score", "plan", "prune", "compensate"}
    tensors = load_file(tmp_path / "out" / "pruning" / "plan.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}
    assert tensors["layers.1.rope_pairs"].shape[0] == 2


@pytest.mark.parametrize(
    "how", [["--ratio", "0.3"], ["--mha-dim", "24"], ["--preset", "crash", "--ratio", "0.5"]], ids=str
)
def test_prune_checks_what_the_model_computes_once(prune, monkeypatch, how):
    checked = []
    monkeypatch.setattr("transact.pipeline.check_computed", checked.append)
    assert prune("--preset", "transact", *how) == 0
    assert len(checked) == 1


def test_prune_calibrates_on_sources_in_turn(prune, tiny_text, tmp_path, capsys):
    settings = ["--preset", "transact", "--samples", "6", "--seq-len", "16"]
    assert prune("--calibration", f"self,{tiny_text},self", *settings) == 0
    assert "calibrated on 4 windows of self, 2 of words.txt\n" in capsys.readouterr().err
    calibration = json.loads((tmp_path / "out" / "pruning.json").read_text())["calibration"]
    assert (calibration["text"], calibration["sha256"]) == (f"self,{tiny_text},self", None)
    assert [(one["text"], one["samples"]) for one in calibration["sources"]] == [("self", 4), ("words.txt", 2)]
    assert {len(one["sha256"]) for one in calibration["sources"]} == {64}
    assert (calibration["samples"], calibration["seq_len"], calibration["tokens"]) == (6, 16, 96)


def test_prune_looks_at_texts_before_the_model(prune, tmp_path, capsys):
    assert prune("--calibration", "self,nowhere", model=tmp_path / "no model") == 2
    assert "no text 'nowhere' in 'self,nowhere', allowed: self, embedded" in capsys.readouterr().err


def test_prune_is_reproducible(prune, tmp_path):
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        assert prune("--criterion", "random", "--seed", seed, out=tmp_path / name) == 0
    first, again, other = (
        load_file(tmp_path / name / "pruning" / "plan.safetensors") for name in ("first", "again", "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_prune_by_widths_and_overwrite(prune, tmp_path):
    assert prune("--mha-dim", "48", "--mlp-dim", "24", "--criterion", "magnitude") == 0
    config = transact.TransActConfig.from_pretrained(tmp_path / "out")
    assert (config.qk_head_dims, config.v_head_dims, config.intermediate_sizes) == ([8, 8], [8, 8], [24, 24])
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["calibration"] is None
    assert prune("--ratio", "0") == 2
    assert prune("--ratio", "0", "--overwrite") == 0
    config = transact.TransActConfig.from_pretrained(tmp_path / "out")
    assert config.intermediate_sizes == [40, 40]


def test_inspect_prints_widths_and_bytes(prune, tmp_path, capsys):
    assert prune("--mha-dim", "48", "--mlp-dim", "24") == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "2", "8", "8", "24", f"{48 * (6 * 8 * 2 + 2 * 8 * 2 + 3 * 24) + 2 * 48:,}", "128"]
    assert lines[3].split()[-1] == "256"
    assert lines[-1].startswith("not by plain: ")
    code = tmp_path / "out" / "modeling_transact.py"
    code.write_bytes(code.read_bytes().replace(b"\n", b"\r\n"))  # as some systems write it
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    code.write_text(code.read_text().replace("CACHE", "KV_CACHE"))
    assert main(["inspect", str(tmp_path / "out")]) == 0
    [line] = capsys.readouterr().out.splitlines()[len(lines) :]
    assert line.startswith("modeling_transact.py is not this version's and serves where TransAct is not installed: ")


def test_bench_perplexity_prints_json_last(tiny_directory, tiny_text, capsys):
    arguments = ["--text", str(tiny_text), "--seq-len", "40", "--windows", "5", "--device", "cpu"]
    assert bench_main(["perplexity", str(tiny_directory), *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    windows = torch.tensor([(i * i) % 96 + 1 for i in range(200)]).view(5, 40)
    assert result["loss"] == pytest.approx(independent_loss(tiny_llama("gqa"), windows), rel=1e-5)
    assert result["tokens"] == 5 * 39
    assert {"perplexity", "bits_per_byte", "sha256", "standard_error"} <= result.keys()


def test_bench_perplexity_prints_a_line_for_each_text(tiny_directory, tiny_text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("w1 w2 w3 w4 w5 " * 20)
    arguments = ["perplexity", str(tiny_directory), "--seq-len", "20", "--windows", "5", "--device", "cpu", "--text"]
    assert bench_main([*arguments, f"{tiny_text},{other}"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in results] == ["words.txt", "other.txt"]
    assert bench_main([*arguments, str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(results[1]["loss"])
    for texts, message in (
        (f"{tiny_text},nofile", "no text 'nofile', allowed: embedded"),
        (f"{other},{other}", "is the same as 'other.txt' before it: name each text once"),
    ):
        assert bench_main([*arguments, texts]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    other.write_text("w1 " * 19)
    assert bench_main([*arguments, f"{tiny_text},{other}"]) == 2
    assert "evaluation text 'other.txt': the text is too short: 0 windows of 20 in 19 tokens" in capsys.readouterr().err


def test_bench_perplexity_is_strict_json(tiny_directory, tiny_text, capsys):
    arguments = ["--text", str(tiny_text), "--seq-len", "40", "--windows", "1", "--device", "cpu"]
    assert bench_main(["perplexity", str(tiny_directory), *arguments]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line, parse_constant=pytest.fail)["standard_error"] is None  # of one window there is none


def test_bench_memory(prune, tmp_path, capsys):
    assert prune("--mha-dim", "48") == 0
    capsys.readouterr()
    assert bench_main(["memory", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bytes_per_token"] == 256


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ratio", "1"], "[0, 1), got 1.0"),
        (["--ratio", "-0.1"], "[0, 1), got -0.1"),
        (["--ratio", "nan"], "[0, 1), got nan"),
        (["--ratio", "much"], "invalid float value: 'much'"),
        (["--ratio", "0.99"], "out of reach"),
        (["--ratio", "0.2", "--mlp-dim", "8"], "give one of them"),
        (["--mlp-dim", "41"], "between 1 and the model's 40, got 41"),
        (["--mha-dim", "54"], "multiple of 12"),
        (["--mha-dim", "108"], "up to the model's 96, got 108"),
        (["--criterion", "activatoin"], "did you mean 'activation'?"),
        (["--preset", "bets"], "did you mean 'best'?"),
        (["--kv-ratio", "1"], "kv-ratio is the fraction removed and must lie in [0, 1), got 1.0"),
        (["--kv-ratio", "0.8", "--ratio", "0.05"], "cannot be met together"),
        (["--kv-ratio", "0.5", "--mlp-dim", "8"], "give one of them"),
        (["--mha-dim", "48", "--drop-modules"], "--drop-modules says which widths are found, --mha-dim/--mlp-dim name"),
        (["--mlp-dim", "24", "--modules", "mlp"], "--modules says which widths are found"),
        (["--mha-dim", "48", "--allocation", "searched", "--criterion", "predicted-loss"], "--allocation says which"),
        (["--mha-dim", "48", "--measurements", "2"], "--measurements says which widths are found"),
        (["--modules", "mlp,ears"], "must name some of qk, vo, mlp, got mlp, ears"),
        (["--granularity", "heads", "--mha-dim", "144"], "up to the model's 96, got 144"),
        (["--granularity", "limbs"], "allowed: dims, heads, both"),
        (["--allocation", "searched", "--preset", "flap"], "needs a criterion that predicts losses"),
        (["--shots", "0"], "shots must be at least 1"),
        (["--criterion", "magnitude", "--samples", "0"], "at least one window"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (
            ["--calibration", "no-such.txt"],
            "no text 'no-such.txt', allowed: self, embedded, docstrings, sources, wikitext2, ptb, c4, or a text file",
        ),
        (["--samples", "200"], "125 windows of 32 in 4,000 tokens, 200 asked for"),
        (["--samples", "0"], "at least one window"),
        (["--seq-len", "1"], "seq-len must be at least 2"),
        (["--seq-len", "129"], "context of 128"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(prune, tmp_path, capsys, arguments, named):
    assert_refused(lambda: prune(*arguments), named, capsys)
    assert list(tmp_path.iterdir()) == []


def assert_refused(run, named: str, capsys):
    try:
        code = run()
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert named in error
    assert error.count("\n") == 1, error


def test_texts_that_are_none(prune, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    assert_refused(lambda: prune("--calibration", str(tmp_path / "empty.txt")), "is empty", capsys)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert_refused(lambda: prune("--calibration", str(tmp_path / "binary.txt")), "cannot be read as UTF-8", capsys)
    (tmp_path / "zeros.txt").write_bytes(bytes(5000))
    assert_refused(lambda: prune("--calibration", str(tmp_path / "zeros.txt")), "NUL characters", capsys)
    assert_refused(lambda: prune("--calibration", str(tmp_path)), "no text", capsys)


def test_models_that_are_none(prune, tiny_directory, tmp_path, capsys, monkeypatch):
    assert_refused(lambda: prune(model=tmp_path / "nowhere"), "no model", capsys)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert_refused(lambda: prune(model=tmp_path / "gpt2"), "is of type 'gpt2', allowed: llama", capsys)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_ty')
    assert_refused(lambda: prune(model=tmp_path / "torn"), "no model", capsys)

    infinite = shutil.copytree(tiny_directory, tmp_path / "infinite")
    weights = load_file(infinite / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(weights, infinite / "model.safetensors", metadata={"format": "pt"})
    assert_refused(lambda: prune(model=infinite), "not finite: model.layers.1.mlp.up_proj.weight", capsys)
    (infinite / "model.safetensors").write_bytes((tiny_directory / "model.safetensors").read_bytes()[:5000])
    assert_refused(lambda: prune(model=infinite), "cannot be read", capsys)

    missing = shutil.copytree(tiny_directory, tmp_path / "missing")
    weights = load_file(missing / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, missing / "model.safetensors", metadata={"format": "pt"})
    assert_refused(lambda: prune(model=missing), "model.layers.1.mlp.up_proj.weight is missing", capsys)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 48)
    save_file(weights, missing / "model.safetensors", metadata={"format": "pt"})
    assert_refused(lambda: prune(model=missing), "up_proj.weight is of the wrong shape", capsys)

    assert prune(out=tmp_path / "pruned") == 0
    capsys.readouterr()
    assert_refused(lambda: prune(model=tmp_path / "pruned"), "pruned already", capsys)
    assert_refused(lambda: main(["inspect", str(tmp_path / "nowhere")]), "there is no such directory", capsys)
    assert not (tmp_path / "out").exists()


def test_output_that_exists_is_left_alone(prune, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("dear")
    assert_refused(prune, "exists; name another or pass --overwrite", capsys)
    assert_refused(lambda: prune("--overwrite"), "holds no pruned checkpoint", capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter"]


def test_output_that_cannot_be_made_is_refused_before_any_work(prune, tmp_path, capsys, monkeypatch):
    assert_refused(lambda: prune(out=tmp_path / ("x" * 300)), "cannot be made: File name too long", capsys)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pruning.json").write_text("{}")
    assert_refused(lambda: prune("--overwrite", out="."), "is where this command runs", capsys)


def test_everyone_can_read_a_checkpoint(prune, tmp_path):
    assert prune("--ratio", "0.3") == 0
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*")}
    assert modes == {(False, 0o644), (True, 0o755)}


@pytest.mark.parametrize("preset", NARROWING)
def test_presets_by_command(prune, tmp_path, preset):
    assert prune("--preset", preset, "--ratio", "0.3", "--layerwise") == 0
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert pruning["fraction_removed"] == pytest.approx(0.3, abs=0.0055)
    assert pruning["recipe"]["criterion"] == transact.PRESETS[preset].criterion
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_best_is_the_default_and_a_criterion_alone_is_the_papers(prune, tmp_path):
    assert prune(out=tmp_path / "default") == 0
    assert prune("--criterion", "wanda", out=tmp_path / "wanda") == 0
    made = [json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("default", "wanda")]
    assert [pruning["preset"] for pruning in made] == ["best", "transact"]
    recipes = [pruning["recipe"] for pruning in made]
    assert [recipe["allocation"] for recipe in recipes] == ["searched", "uniform"]
    assert [recipe["criterion"] for recipe in recipes] == ["predicted-loss", "wanda"]


def test_guide_and_help_name_every_preset_and_criterion(capsys):
    guide = (Path(__file__).parent.parent / "docs" / "pruning.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    for name in (*transact.PRESETS, *transact.CRITERIA):
        assert f"| `{name}`" in guide
        assert name in shown or name in shown.replace("- ", "-")
    for name in (*RECIPE_OPTIONS, "output_bias", "drop_modules"):
        option = {"engine": "for"}.get(name, name).replace("_", "-")
        assert f"| `--{option}` |" in guide
    for name in (*TEXTS, SELF, "probes"):
        assert f"`{name}`" in guide[guide.index("## Texts") : guide.index("## How much goes")]


def test_hub_that_cannot_be_reached_is_one_line(prune, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert_refused(lambda: prune("--calibration", "wikitext2"), "Couldn't reach the Hub", capsys)


def test_a_checkpoint_that_a_caller_described_is_inspected(tmp_path, capsys):
    dense = tiny_llama("gqa")
    pruned = transact.prune(dense, torch.arange(96).view(4, 24), recipe="transact", ratio=0.3)
    transact.save_checkpoint(tmp_path / "pruned", pruned.model, pruned.plan, {"ratio": 0.3})
    assert main(["inspect", str(tmp_path / "pruned")]) == 0
    assert f"{transact.fraction_removed(dense.config, pruned.plan.widths):.1%}" in capsys.readouterr().out


def test_one_of_anything_is_one(prune, tiny_directory, tiny_text, tmp_path, capsys):
    training = ["--tokens", "32", "--text", str(tiny_text), "--train-seq-len", "32", "--way", "lora"]
    assert prune("--preset", "transact", "--samples", "1", *training) == 0
    said = capsys.readouterr().err
    assert ", in 1 step\n" in said
    assert "calibrated on 1 window of words.txt\n" in said
    tiny_llama(layers=1).save_pretrained(tmp_path / "low")
    assert main(["inspect", str(tmp_path / "low")]) == 0
    assert "of the linear parameters of 1 decoder layer removed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the text is too short: 1 window of 9 in 10 tokens, 2 asked for"):
        transact.cut_windows(torch.arange(10), length=9, count=2)
    with pytest.raises(ValueError, match="the text is too short: 1 window of 9 tokens, at least 16 are needed"):
        hold_out(torch.arange(9)[None])
    one_head = LlamaConfig(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, intermediate_size=16)
    assert heads_and_mlp_in_words(one_head) == "1 head of 8, MLP 16"
    assert layers_in_words([3]) == "layer 3"
    assert layers_in_words([0, 1, 4]) == "layers 0 to 1, 4"
