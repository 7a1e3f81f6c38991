"""Programs for ExecuTorch: the traced graph computes what the model does, and what cannot be one is refused first."""

import json
from functools import partial

import pytest
import torch

import transact
from bench.efficiency.continuations import greedy, transformers_stream
from bench.efficiency.executorch_runtime import runs_in_executorch
from tests.tiny import LONGROPE, llama_with, random_plan, tiny_llama, tiny_relative
from transact.__main__ import main
from transact.export import context_of, write_program
from transact.export.executorch import Decoder, traced

CONTEXT = 20
IDS = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(1))


def narrowed(dense):
    return transact.apply_plan(dense, random_plan(dense.config, seed=3, drop_heads=True))


MODELS = {
    "dense": lambda: tiny_llama("gqa"),
    "biases": lambda: narrowed(tiny_llama("biases")),
    "llama3-rope": lambda: narrowed(tiny_llama("llama3-rope")),
    "sliding window": lambda: tiny_relative("mistral"),
    "query-key norms": lambda: narrowed(tiny_relative("qwen3")),
}


@torch.no_grad()
def read_in_pieces(run, pieces=(5, 1, 1, 4, 1)) -> torch.Tensor:
    """Logits (pieces, vocabulary) after each piece of the text, from a program's one method."""
    logits, start = [], 0
    for length in pieces:
        places = torch.arange(start, start + length)
        logits.append(run(IDS[:, places], places).flatten().clone())
        start += length
    return torch.stack(logits)


def assert_reads_as(model, run):
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits[0, [4, 5, 6, 10, 11]]
    scale = expected.abs().max()
    for _ in range(2):  # a second text overwrites the first
        torch.testing.assert_close(read_in_pieces(run) / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_traced_graph_computes_what_the_model_does(name):
    model = MODELS[name]()
    assert_reads_as(model, traced(model, CONTEXT).module())
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_cache_has_each_layers_own_widths():
    model = narrowed(tiny_llama("gqa"))
    decoder = Decoder(model, CONTEXT)
    for index, of in enumerate(transact.widths_of(model.config)):
        assert decoder.get_buffer(f"keys_{index}").shape == (1, of.kv_heads, CONTEXT, of.qk_head_dim)
        assert decoder.get_buffer(f"values_{index}").shape == (1, of.kv_heads, CONTEXT, of.v_head_dim)


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (tiny_llama("gqa").config, {"kind": "q8_0"}, "unknown type of a program 'q8_0', allowed: f32, int8"),
        (tiny_llama("gqa").config, {"context": 1}, "context must be from 2 to the model's 128 tokens, got 1"),
        (tiny_llama("gqa").config, {"context": 129}, "context must be from 2 to the model's 128 tokens, got 129"),
        (llama_with(rope_parameters=dict(LONGROPE)).config, {}, "RoPE type 'longrope' depends on the length"),
        (
            llama_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}).config, {},
            "RoPE type 'dynamic' depends on the length",
        ),
        (llama_with(quantization_config={"quant_method": "gptq", "bits": 4}).config, {}, "the model is quantised"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_program_is_known_before_it(config, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        context_of(config, **options)
    assert "\n" not in str(caught.value)


def test_without_executorch_what_to_do_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("transact.export.executorch.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"executorch, the extra \[phone\]: python -m pip install"):
        write_program(tmp_path / "m.pte", tiny_llama("gqa"))
    assert not [*tmp_path.iterdir()]


def test_context_is_the_models_where_that_is_shorter(monkeypatch):
    monkeypatch.setattr("transact.export.executorch.importlib.util.find_spec", lambda name: True)
    assert context_of(tiny_llama("gqa").config) == 128
    assert context_of(llama_with(max_position_embeddings=4096).config) == 1024


def test_quantised_weights_are_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("transact.export.executorch.importlib.util.find_spec", lambda name: True)
    model = tiny_llama("gqa")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(40, 48).char(), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is quantised"):
        write_program(tmp_path / "m.pte", model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # executorch's own
def test_program_runs_in_executorch_as_the_model_does(tmp_path):
    runtime = pytest.importorskip("executorch.runtime")
    model = narrowed(tiny_llama("gqa"))
    write_program(tmp_path / "m.pte", model, context=CONTEXT)
    program = runtime.Runtime.get().load_program(tmp_path / "m.pte")
    assert program.load_method("get_max_context_len").execute([])[0] == CONTEXT
    method = program.load_method("forward")
    assert_reads_as(model, lambda tokens, places: method.execute([tokens, places])[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_engine_continues_as_transformers_does_and_int8_nearly(monkeypatch):
    pytest.importorskip("executorch.runtime")
    monkeypatch.setattr("bench.efficiency.executorch_runtime.NEW_TOKENS", 12)
    monkeypatch.setattr("bench.efficiency.continuations.NEW_TOKENS", 12)
    model, prompts = narrowed(tiny_llama("biases")), [IDS[0].tolist(), IDS[0, 3:].tolist()]
    exact, eight_bits = runs_in_executorch(model, None, prompts)
    expected, _ = greedy(partial(transformers_stream, model), prompts)
    assert (exact.engine, eight_bits.engine) == ("ExecuTorch f32", "ExecuTorch int8")
    assert exact.continuations == expected
    assert eight_bits.mib < exact.mib
    assert [said[0] for said in eight_bits.continuations] == [said[0] for said in expected]


@pytest.fixture
def as_if_installed(monkeypatch):
    """executorch seems to be there, and a program is nothing but its mark."""
    monkeypatch.setattr("transact.export.executorch.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(
        "transact.commands.export.write_program", lambda path, model, **settings: path.write_bytes(b"....ET12")
    )


def export(source, out, *options):
    return main(["export", str(source), str(out), "--format", "executorch", *map(str, options)])


@pytest.mark.usefixtures("as_if_installed")
def test_command_writes_program_and_tokeniser_or_neither(tiny_directory, tmp_path, capsys, monkeypatch):
    out, beside = tmp_path / "tiny.pte", tmp_path / "tiny.tokenizer.json"
    assert export(tiny_directory, out) == 0
    assert "room for 128 tokens" in capsys.readouterr().out
    assert json.loads(beside.read_text(encoding="utf-8"))["model"]["vocab"]["w1"] == 1
    assert export(tiny_directory, out) == 2
    assert "exists; name another or pass --overwrite" in capsys.readouterr().err
    assert export(tiny_directory, out, "--overwrite") == 0

    def fails(path, model, **settings):
        raise ValueError("no")

    monkeypatch.setattr("transact.commands.export.write_program", fails)
    out.unlink()
    beside.unlink()
    assert export(tiny_directory, out) == 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("as_if_installed")
def test_command_replaces_nothing_that_is_not_its_own(tiny_directory, tmp_path, capsys):
    (tmp_path / "notes.pte").write_text("mine")
    assert export(tiny_directory, tmp_path / "notes.pte", "--overwrite") == 2
    assert "nothing that was exported: it is not replaced" in capsys.readouterr().err
    (tmp_path / "new.tokenizer.json").write_text("mine")
    assert export(tiny_directory, tmp_path / "new.pte", "--overwrite") == 2
    assert "new.tokenizer.json', for the tokeniser, exists; name another" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.tokenizer.json", "notes.pte"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--format", "executorch", "--type", "q8_0"), "--type q8_0 is none of --format executorch, allowed: f32"),
        (("--format", "gguf", "--type", "int8"), "--type int8 is none of --format gguf, allowed: f32, f16"),
        (("--type", "f32"), "--type is for --format gguf and executorch"),
        (("--context", "64"), "--context is for --format executorch"),
        (("--format", "executorch", "--pad"), "nothing is padded"),
        (("--format", "executorch", "--context", "0"), "context must be from 2 to the model's 128 tokens, got 0"),
    ],
)
@pytest.mark.usefixtures("as_if_installed")
def test_options_of_other_formats_are_refused(tiny_directory, tmp_path, capsys, options, named):
    assert main(["export", str(tiny_directory), str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
    assert not [*tmp_path.iterdir()]
