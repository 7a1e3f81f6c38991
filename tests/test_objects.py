"""The object is asked, not its configuration: what a model computes beyond its weights is refused, never lost."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import transact
from bench.__main__ import main as bench_main
from tests.test_odd_models import WINDOWS, checkpoint, edit_config, odd_model, prune_command  # noqa: F401
from tests.tiny import plain_plan, tiny_llama
from transact.__main__ import main
from transact.export import plain_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
MAGNITUDE = transact.Recipe(criterion="magnitude")


def each(model: nn.Module, name: str, value) -> None:
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, value)


def forward_twice(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    before = mlp.forward
    mlp.forward = lambda hidden: 2 * before(hidden)


class Capped(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


class Scaled(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(inputs)


EDITS = {
    "another activation": lambda model: each(model, "act_fn", nn.ReLU()),
    "another epsilon": lambda model: each(model, "variance_epsilon", 0.5),
    "another epsilon in the configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "another activation in the configuration": lambda model: setattr(model.config, "hidden_act", "relu"),
    "another softmax scale": lambda model: each(model, "scaling", 0.9),
    "a hook on a layer": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: 2 * out),
    "a hook before a projection": lambda model: model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] / 2,)
    ),
    "a forward of its own": forward_twice,
    "a projection of another class": lambda model: setattr(model.model.layers[1].mlp.down_proj, "__class__", Scaled),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_that_computes_something_else_is_not_pruned(edit):
    dense = tiny_llama()
    EDITS[edit](dense)
    for recipe in ("best", MAGNITUDE):
        with pytest.raises(ValueError, match=r"computes something else than its weights and configuration .*% off"):
            transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.0)


def test_rope_that_is_not_the_configurations_would_be_lost_at_the_save():
    edited = tiny_llama()
    edited.config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
    rescaled = tiny_llama()
    for name in ("inv_freq", "original_inv_freq"):
        getattr(rescaled.model.rotary_emb, name).mul_(0.5)
    for dense in (edited, rescaled):
        with pytest.raises(ValueError, match="RoPE tables are not those of its rope_parameters"):
            transact.prune(dense, WINDOWS, ratio=0.0)
    transact.prune(tiny_llama().bfloat16(), recipe=MAGNITUDE)  # whose tables are rounded


def test_a_class_of_the_users_own_is_judged_by_what_it_computes():
    dense = tiny_llama()
    dense.__class__ = Capped
    with pytest.raises(ValueError, match="computes something else"):
        transact.prune(dense, recipe=MAGNITUDE)
    dense.__class__ = type("Renamed", (LlamaForCausalLM,), {})
    transact.prune(dense, recipe=MAGNITUDE)


def test_hooks_that_only_look_change_nothing_and_stay():
    dense, seen = tiny_llama(), []
    dense.model.layers[0].register_forward_hook(lambda *arguments: seen.append(1))
    pruned = transact.prune(dense, WINDOWS, recipe="transact", ratio=0.3)
    expected = transact.prune(tiny_llama(), WINDOWS, recipe="transact", ratio=0.3)
    assert torch.equal(pruned.model(WINDOWS).logits, expected.model(WINDOWS).logits)
    assert seen
    assert len(dense.model.layers[0]._forward_hooks) == 1
    assert not pruned.model.model.layers[0]._forward_hooks


@pytest.mark.parametrize("edit", EDITS)
def test_a_pruned_model_that_computes_something_else_is_not_exported(edit):
    dense = tiny_llama()
    narrowed = transact.apply_plan(dense, plain_plan(dense.config, head_dim=12))
    plain_llama(narrowed)
    EDITS[edit](narrowed)
    with pytest.raises(ValueError, match=r"computes something else than .*% off"):
        plain_llama(narrowed)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_attention_to_later_tokens_is_refused_by_name(family):
    dense = odd_model(family, is_causal=False)
    with pytest.raises(ValueError, match="is_causal"):
        transact.prune(dense, WINDOWS, ratio=0.0)


def test_layer_types_of_layers_that_are_gone_do_not_count():
    dense = odd_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    dense.model.layers = dense.model.layers[:1]
    dense.config.num_hidden_layers = 1
    pruned = transact.prune(dense, WINDOWS, ratio=0.0).model
    assert torch.equal(pruned(WINDOWS).logits, dense(WINDOWS).logits)


UNRUNNABLE = {
    "heads that their key-value heads do not divide": ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4"),
    "RoPE of a part of each head": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}},
        "RoPE rotates 8 of 16 dimensions",
    ),
}


@pytest.mark.parametrize("case", UNRUNNABLE)
def test_what_transformers_cannot_run_is_refused_when_it_is_loaded(case, tiny_directory, tiny_text, tmp_path, capsys):
    settings, named = UNRUNNABLE[case]
    odd_model("llama", **settings).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_directory / name).read_bytes())
    capsys.readouterr()
    model = str(tmp_path / "model")
    for command in (
        lambda: prune_command(tmp_path / "model", tmp_path / "out", tiny_text, "--ratio", "0"),
        lambda: bench_main(["perplexity", model, "--text", str(tiny_text), "--seq-len", "32"]),
        lambda: bench_main(["memory", model]),
    ):
        assert command() == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_setting_that_is_not_known_is_named(checkpoint, tmp_path, capsys):  # noqa: F811
    for name, value in (("hidden_act", "nonsense"), ("rope_parameters", {"rope_type": "su", "rope_theta": 1e4})):
        edit_config(checkpoint, **{name: value})
        capsys.readouterr()
        assert main(["prune", str(checkpoint), str(tmp_path / "out")]) == 2
        assert "KeyError" in capsys.readouterr().err


def test_a_model_that_answers_in_tuples_is_pruned_all_the_same(checkpoint, tiny_text, tmp_path):  # noqa: F811
    dense = tiny_llama()
    dense.config.return_dict = False
    expected = transact.prune(tiny_llama(), WINDOWS, ratio=0.3).model
    narrowed = transact.prune(dense, WINDOWS, ratio=0.3).model
    assert dense.config.return_dict is False
    for name, tensor in narrowed.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])
    edit_config(checkpoint, return_dict=False)
    assert bench_main(["perplexity", str(checkpoint), "--text", str(tiny_text), "--seq-len", "32"]) == 0
    assert prune_command(checkpoint, tmp_path / "out", tiny_text) == 0
