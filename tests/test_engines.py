"""Engines: what each holds, plans that keep to it and are the cheapest of these, and what `inspect` says."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import transact
from tests.test_export import byte_level_tokenizer
from tests.test_plan import STORIES
from tests.tiny import llama_with, scores_of, searched_loss, tiny_llama, tiny_relative
from transact import PRESETS, LayerScores, Widths, fraction_removed, kv_fraction_removed, searched_widths
from transact.__main__ import main
from transact.allocate import removal_losses, shared_pairs
from transact.engines import ENGINES, check_held, engine_by_name

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(3))
WHOLE = Widths(3, 64, 64, 1536)


def layers(*changes: dict) -> list[Widths]:
    return [Widths(**vars(WHOLE) | one) for one in changes]


HELD = {
    "all alike": (layers({}, {}), set()),
    "MLPs of two widths": (layers({}, {"mlp": 1024}), {"plain"}),
    "fewer heads in a layer": (layers({}, {"kv_heads": 2}), {"plain"}),
    "heads of two widths": (layers({}, {"qk_head_dim": 32, "v_head_dim": 32}), {"plain", "llama.cpp"}),
    "narrow values": (layers({"v_head_dim": 24}, {"v_head_dim": 24}), {"plain", "llama.cpp"}),
    "wide values": (
        layers({"qk_head_dim": 32}, {"qk_head_dim": 32}), {"plain", "llama.cpp", "vllm", "vllm-cpu"},
    ),
    "heads of 48": (layers(*2 * [{"qk_head_dim": 48, "v_head_dim": 48}]), {"vllm-cpu"}),
    "heads of 24": (layers(*2 * [{"qk_head_dim": 24, "v_head_dim": 24}]), {"vllm", "vllm-cpu"}),
}  # fmt: skip


@pytest.mark.parametrize("case", HELD)
def test_what_each_engine_holds(case):
    widths, refusing = HELD[case]
    for name in ENGINES:
        if name not in refusing:
            check_held(name, widths)
            continue
        with pytest.raises(ValueError, match=f"^engine '{name}' ") as caught:
            check_held(name, widths)
        assert "\n" not in str(caught.value)


def test_pairs_of_their_own_are_held_by_some():
    same = [torch.tensor([[0, 2], [0, 2]])] * 2
    of_heads, of_layers = [torch.tensor([[0, 2], [0, 3]])] * 2, [same[0], same[0] + 1]
    for name, engine in ENGINES.items():
        check_held(name, layers({}, {}), same)
        for pairs in (of_heads, of_layers):
            if engine.own_pairs:
                check_held(name, layers({}, {}), pairs)
            else:
                with pytest.raises(ValueError, match="has the same RoPE pairs in all heads and layers"):
                    check_held(name, layers({}, {}), pairs)


def test_reasons_say_what_is_there_and_what_may_be():
    with pytest.raises(ValueError, match=r"'vllm-cpu' runs query-key heads of 32, 64, 80, .* layer 1 has .* of 48"):
        check_held("vllm-cpu", layers({}, {"qk_head_dim": 48, "v_head_dim": 48}))
    with pytest.raises(ValueError, match=r"'vllm' runs query-key heads of 32 to 256 in steps of 8 .*no wider"):
        check_held("vllm", layers({"qk_head_dim": 32}))
    with pytest.raises(ValueError, match="'plain' has one width of MLPs for all layers, not 1024 to 1536"):
        check_held("plain", layers({}, {"mlp": 1024}))
    with pytest.raises(ValueError, match=r"unknown engine 'vllm-gpu', allowed: transformers, vllm, .* did you"):
        engine_by_name("vllm-gpu")


def random_scores(config, *, seed: int = 0, convex: bool = False) -> list[LayerScores]:
    """Cumulative scores of any model; of convex ones what goes next always costs more than what went before."""
    generator, head_dim = torch.Generator().manual_seed(seed), transact.dense_widths(config)[0].qk_head_dim

    def cumulative(*shape: int) -> torch.Tensor:
        own = torch.rand(*shape, generator=generator)
        return (own.sort(dim=-1).values if convex else own).cumsum(dim=-1)

    heads, layers = config.num_key_value_heads, range(1, config.num_hidden_layers + 1)
    return [
        LayerScores(cumulative(heads, head_dim // 2) * index, cumulative(heads, head_dim),
                    cumulative(config.intermediate_size) / index)
        for index in layers
    ]  # fmt: skip


def for_engine(scores: list[LayerScores], engine: str) -> list[LayerScores]:
    return scores if ENGINES[engine].own_pairs else shared_pairs(scores)


WIDE = LlamaConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=1536,
                   num_hidden_layers=6)  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=5, deadline=None)
@given(ratio=st.floats(0.05, 0.7), kv_ratio=st.sampled_from([None, 0.05, 0.3]), seed=st.integers(0, 9))
def test_plans_obey_their_engine_and_both_budgets(engine, ratio, kv_ratio, seed):
    scores = for_engine(random_scores(WIDE, seed=seed), engine)
    if kv_ratio and ratio < 0.2:
        ratio = 0.2  # that much KV cache takes parameters with it
    widths = searched_widths(WIDE, scores, ratio, kv_ratio=kv_ratio, engine=engine)
    check_held(engine, widths)
    assert -0.005 - 1e-9 <= fraction_removed(WIDE, widths) - ratio <= 0.011  # an MLP step is that large
    cached = [replace(w, v_head_dim=w.qk_head_dim) for w in widths] if engine.startswith("vllm") else widths
    assert kv_fraction_removed(WIDE, cached) >= (kv_ratio or 0) - 1e-9
    multiple = {"llama.cpp": 32, "plain": 4}.get(engine, 64)
    assert all(one.qk_head_dim % 8 == one.v_head_dim % 8 == one.mlp % multiple == 0 for one in widths)


def heads_held(engine: str, layers: int) -> list[tuple[Widths, ...]]:
    """Every choice of head widths that the engine holds, of multiples of 8 up to 64."""
    own = [Widths(1, qk, v, 96) for qk, v in itertools.product(range(8, 65, 8), repeat=2)]
    held = []
    for widths in itertools.product(own, repeat=layers):
        try:
            check_held(engine, widths)
            held.append(widths)
        except ValueError:
            continue
    return held


@pytest.mark.parametrize(("engine", "most"), [("llama.cpp", 1), ("vllm-cpu", 1.02)])
@pytest.mark.parametrize("ratio", [0.15, 0.4])
def test_plans_are_the_cheapest_that_the_engine_holds(engine, most, ratio):
    """Of all that there are; prices reach what no line between two others passes below, which may be a little more."""
    config = LlamaConfig(hidden_size=16, num_attention_heads=1, head_dim=64, intermediate_size=96, num_hidden_layers=2)
    scores = for_engine(random_scores(config, convex=True), engine)
    step = 2 if engine == "llama.cpp" else 4
    mlps, least = torch.arange(step, 97, step), torch.inf
    first, second = (removal_losses(layer.mlp_dims)[mlps] for layer in scores)
    budget = (1 - ratio) * transact.linear_parameters(config, transact.dense_widths(config))
    for heads in heads_held(engine, 2):
        of_heads = transact.linear_parameters(config, [replace(one, mlp=0) for one in heads])
        dear = of_heads + 3 * 16 * (mlps[:, None] + mlps) > budget
        least = min(least, searched_loss(scores, heads) + (first[:, None] + second)[~dear].min().item())
    found = searched_loss(scores, searched_widths(config, scores, ratio, engine=engine))
    assert least * (1 - 1e-9) <= found <= least * most * (1 + 1e-9)


def test_plans_of_transformers_and_plain_are_what_they_were():
    """As found before there were engines."""
    generator = torch.Generator().manual_seed(0)
    scores = [
        LayerScores(
            torch.rand(4, 4, generator=generator).cumsum(1) * (1 + layer),
            torch.rand(4, 8, generator=generator).pow(3).cumsum(1),
            torch.rand(172, generator=generator).pow(2).cumsum(0) / (1 + layer),
        )
        for layer in range(5)
    ]
    found = [tuple(vars(one).values()) for one in searched_widths(STORIES, scores, 0.3)]
    assert found == [(4, 8, 8, 172), (4, 8, 8, 172), (4, 8, 8, 124), (4, 8, 8, 24), (4, 8, 8, 12)]
    plain = searched_widths(STORIES, shared_pairs(scores), 0.3, kv_ratio=0.3, engine="plain")
    assert plain == (Widths(4, 4, 4, 134),) * 5


@pytest.fixture(scope="module")
def dense():
    return tiny_llama("gqa", head_dim=64, layers=3)


def test_what_an_engine_holds_costs_more_the_less_that_is(dense):
    scores = scores_of(dense, "predicted-loss", WINDOWS)
    for ratio in (0.2, 0.4):
        losses = [
            searched_loss(of, searched_widths(dense.config, of, ratio, engine=engine))
            for engine in ("transformers", "llama.cpp", "plain")
            for of in [for_engine(scores, engine)]
        ]
        assert losses == sorted(losses)
        assert losses[0] <= searched_loss(scores, searched_widths(dense.config, scores, ratio, engine="vllm-cpu"))


@pytest.mark.parametrize("engine", ENGINES)
def test_pruned_models_are_held_by_their_engine(engine, dense):
    recipe = replace(PRESETS["best"], engine=engine, measurements=0)
    for changes, options in (
        ({"shots": 2}, {"ratio": 0.3}), ({"modules": ("mlp",)}, {"ratio": 0.02}),
        ({}, {"widths": [Widths(2, 32, 32, 24)] * 3}),
    ):  # fmt: skip
        pruned = transact.prune(dense, WINDOWS, recipe=replace(recipe, **changes), **options)
        pairs = [layer.self_attn.rope_pairs for layer in pruned.model.model.layers]
        check_held(engine, transact.widths_of(pruned.model.config), pairs)
        if "ratio" in options:
            assert fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(options["ratio"], abs=0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_removed_is_the_dense_model_for_every_engine(engine, dense):
    pruned = transact.prune(dense, WINDOWS, recipe=replace(PRESETS["best"], engine=engine), ratio=0.0)
    weights = pruned.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in dense.state_dict().items())


def test_what_the_pruned_model_says_corrects_plans_for_engines():
    recipe, dense = replace(PRESETS["best"], engine="llama.cpp"), tiny_llama("gqa", layers=3)
    measured = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.2)
    predicted_only = transact.prune(dense, WINDOWS, recipe=replace(recipe, measurements=0), ratio=0.2)
    assert measured.plan.widths != predicted_only.plan.widths
    check_held("llama.cpp", measured.plan.widths, [layer.rope_pairs for layer in measured.plan.layers])


REFUSED = {
    "an engine that is none": ({"engine": "ollama"}, {}, "unknown engine 'ollama', allowed: transformers, vllm"),
    "uniform widths": ({"engine": "vllm", "allocation": "uniform"}, {}, "'vllm' is planned for by .*'searched'"),
    "too much": ({"engine": "vllm-cpu"}, {"ratio": 0.9}, r"ratio 0\.9 is out of reach: .* vllm-cpu holds remove 0\.7"),
    "too much of the cache": (
        {"engine": "vllm-cpu"}, {"kv_ratio": 0.6}, r"kv-ratio 0\.6 is out of reach: .* holds remove 0\.500",
    ),
    "widths that it does not hold": (
        {"engine": "llama.cpp"}, {"widths": [Widths(2, 32, 16, 40)] * 3}, "'llama.cpp' has value heads as wide as",
    ),
    "MLPs alone": ({"engine": "plain", "modules": ("mlp",)}, {"ratio": 0.5}, r"0\.5 is out of reach: .* mlp that"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_plan_can_meet_is_refused_before_work(case, dense, monkeypatch):
    changes, options, named = REFUSED[case]
    monkeypatch.setattr("transact.pipeline._in_shots", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=named) as caught:
        transact.prune(dense, WINDOWS, recipe=replace(PRESETS["best"], **changes), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head_dim", "options", "named"),
    [
        (16, {}, "qk+vo+mlp of a model with heads of 16 can be narrowed to none of these"),
        (16, {"ratio": 0.0}, "layer 0 has query-key heads of 16"),
        (40, {"ratio": 0.02}, "ratio 0.02 is out of reach: the widest qk+vo+mlp that vllm-cpu holds remove 0."),
        (40, {"ratio": 0.0}, "layer 0 has query-key heads of 40"),
    ],
)
def test_heads_that_no_kernel_knows_are_refused_before_work(head_dim, options, named, monkeypatch):
    monkeypatch.setattr("transact.pipeline._in_shots", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=re.escape(named)):
        transact.prune(
            tiny_llama(head_dim=head_dim), WINDOWS, recipe=replace(PRESETS["best"], engine="vllm-cpu"), **options
        )


def test_heads_between_two_widths_of_the_kernels_are_narrowed_to_the_next():
    widths = searched_widths(tiny_llama(head_dim=40).config, random_scores(tiny_llama(head_dim=40).config), 0.4,
                             engine="vllm-cpu")  # fmt: skip
    assert {one.qk_head_dim for one in widths} == {32}


@pytest.mark.parametrize("head_dim", [24, 40, 56])
def test_pairs_stay_whole_in_heads_whose_eighth_is_odd(head_dim):
    config = tiny_llama(head_dim=head_dim).config
    for ratio in (0.2, 0.4, 0.6):
        widths = searched_widths(config, random_scores(config), ratio)
        assert all(one.qk_head_dim % 2 == 0 for one in widths)


def commands(model, tiny_text, tmp_path, *options: str) -> int:
    shared = ("--calibration", str(tiny_text), "--samples", "16", "--seq-len", "32", "--device", "cpu")
    return main(["prune", str(model), str(tmp_path / "out"), *shared, *options])


@pytest.fixture
def bytes_directory(tiny_directory, tmp_path) -> Path:
    """The tiny checkpoint with a tokeniser of bytes, as llama.cpp has them."""
    directory = shutil.copytree(tiny_directory, tmp_path / "bytes")
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def test_prune_for_an_engine_and_inspect(bytes_directory, tiny_text, tmp_path, capsys):
    assert commands(bytes_directory, tiny_text, tmp_path, "--for", "llama.cpp", "--ratio", "0.3") == 0
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())["recipe"]
    assert (recipe["engine"], recipe["allocation"]) == ("llama.cpp", "searched")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()[-4:]
    assert said[0] == "held by transformers, llama.cpp, executorch"
    assert [line.partition(":")[0] for line in said[1:]] == ["not by vllm", "not by vllm-cpu", "not by plain"]
    assert "has one width of MLPs for all layers" in said[3]


def test_a_tokeniser_that_llama_cpp_lacks_is_known_before_work(tiny_directory, tiny_text, tmp_path, capsys):
    assert commands(tiny_directory, tiny_text, tmp_path, "--for", "llama.cpp") == 2
    assert "GGUF files are written for byte-level BPE tokenisers" in capsys.readouterr().err
    assert main(["inspect", str(tiny_directory)]) == 0
    assert "not by llama.cpp: GGUF files are written for byte-level BPE" in capsys.readouterr().out


def test_inspect_wants_all_weights_and_a_whole_pruning_json(tmp_path, capsys):
    pruned = transact.prune(tiny_llama(), WINDOWS, recipe="transact", ratio=0.3)
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {"fraction_removed": "all", "model": "tiny"})
    assert main(["inspect", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "pruning.json' is not what `transact prune` writes" in said.err
    (tmp_path / "out" / "pruning.json").unlink()
    (tmp_path / "out" / "model.safetensors").unlink()
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "has the RoPE pairs of 0 of 2 layers: its *.safetensors are not all there" in capsys.readouterr().err


def test_inspect_says_who_holds_what(bytes_directory, tmp_path, capsys):
    assert main(["inspect", str(bytes_directory)]) == 0
    assert "held by transformers, llama.cpp, plain, executorch\nnot by vllm: " in capsys.readouterr().out
    pruned = transact.prune(tiny_llama(), WINDOWS, recipe="transact", ratio=0.3)  # each head has pairs of its own
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {"fraction_removed": 0.3, "model": "tiny"})
    assert main(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("not by llama.cpp: engine 'llama.cpp' has the same RoPE pairs in all") for line in lines)
    pruned.model.config.hidden_act = "gelu"
    transact.save_checkpoint(tmp_path / "gelu", pruned.model, pruned.plan, {"fraction_removed": 0.3, "model": "tiny"})
    assert main(["inspect", str(tmp_path / "gelu")]) == 0
    assert "not by llama.cpp: hidden_act 'gelu' cannot be stated in a GGUF file" in capsys.readouterr().out
    (tmp_path / "out" / "model.safetensors").write_bytes(b"torn")
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "model.safetensors' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "engine", "named"),
    [
        (lambda: tiny_relative("qwen3"), "llama.cpp", "query-key norms"),
        (lambda: tiny_relative("mistral"), "llama.cpp", "a sliding window"),
        (lambda: llama_with(hidden_act="gelu"), "llama.cpp", "hidden_act 'gelu'"),
        (lambda: llama_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "llama.cpp",
         "RoPE type 'dynamic'"),
        (lambda: tiny_relative("qwen3"), "plain", "query-key norms"),
        (lambda: llama_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "executorch",
         "RoPE type 'dynamic' depends on the length"),
    ],
)  # fmt: skip
def test_families_that_an_engine_cannot_hold_are_refused_before_work(
    model, engine, named, tiny_text, tmp_path, capsys, monkeypatch
):
    model().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr("transact.commands.prune.load_model", None)  # nothing is loaded yet
    assert commands(tmp_path / "dense", tiny_text, tmp_path, "--for", engine) == 2
    assert named in capsys.readouterr().err
    with pytest.raises(ValueError, match=named):
        transact.prune(model(), WINDOWS, recipe=replace(PRESETS["best"], engine=engine))


def test_an_unknown_engine_is_refused_in_one_line(tiny_directory, tiny_text, tmp_path, capsys):
    assert commands(tiny_directory, tiny_text, tmp_path, "--for", "llamacpp") == 2
    assert "unknown engine 'llamacpp', allowed: transformers, vllm" in capsys.readouterr().err
