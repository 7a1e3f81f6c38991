"""Checkpoints: bit-equal after a round trip, with and without the package, and never half-written."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import transact
from tests.tiny import VARIANTS, random_plan, tiny_llama
from transact import checkpoint


def narrowed_and_plan(variant: str = "gqa"):
    dense = tiny_llama(variant)
    plan = random_plan(dense.config, drop_heads=True)
    return transact.apply_plan(dense, plan), plan


def some_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40)[None]).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_equal(variant, tmp_path):
    narrowed, plan = narrowed_and_plan(variant)
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is transact.TransActForCausalLM
    state = narrowed.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    # a copy, since weights mapped from the file lie unaligned and kernels then round otherwise
    assert torch.equal(some_logits(copy.deepcopy(loaded)), some_logits(narrowed))
    for saved, kept in zip(transact.load_plan(tmp_path / "out").layers, plan.layers, strict=True):
        tensors = {name: value for name, value in vars(kept).items() if value is not None}
        assert all(torch.equal(getattr(saved, name), value) for name, value in tensors.items())


def test_bfloat16_keeps_the_pairs(tmp_path):
    narrowed, plan = narrowed_and_plan()
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.layers[1].self_attn.rope_pairs, plan.layers[1].rope_pairs)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["transact"] = None  # any import of the package fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(1, 40)[None]
bare = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.equal(model.lm_head(bare(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)
built = AutoModel.from_config(bare.config, trust_remote_code=True)
assert type(built).__module__ != "transact.modeling_transact" and built.state_dict().keys() == bare.state_dict().keys()
classifier = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, num_labels=3)
assert torch.equal(classifier(input_ids=ids).logits, classifier.score(bare(input_ids=ids).last_hidden_state)[:, -1])
generated = model.generate(torch.arange(1, 20)[None], do_sample=False, max_new_tokens=5, eos_token_id=None)
torch.save((model(input_ids=torch.arange(1, 40)[None]).logits.detach(), generated), sys.argv[2])
"""


def test_loads_as_remote_code_without_the_package(tmp_path):
    narrowed, plan = narrowed_and_plan()
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "out"), str(tmp_path / "result.pt")]
    subprocess.run(arguments, check=True, cwd=tmp_path, env=environment)
    logits, generated = torch.load(tmp_path / "result.pt")
    assert torch.equal(logits, some_logits(narrowed))
    expected = narrowed.generate(torch.arange(1, 20)[None], do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(generated, expected)


def test_other_tools_find_every_class_and_one_file_of_weights(tmp_path):
    narrowed, plan = narrowed_and_plan()
    out = transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    assert json.loads((out / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_transact.TransActConfig",
        "AutoModel": "modeling_transact.TransActModel",
        "AutoModelForCausalLM": "modeling_transact.TransActForCausalLM",
        "AutoModelForSequenceClassification": "modeling_transact.TransActForSequenceClassification",
    }
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]  # vLLM reads all that are there
    if os.name == "posix":
        assert {path.stat().st_mode & 0o044 for path in out.rglob("*")} == {0o044}


def test_the_bare_model_and_a_classifier_load_and_save(tmp_path):
    narrowed, plan = narrowed_and_plan()
    out = transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])  # the second is padded
    bare = AutoModel.from_pretrained(out)
    assert type(bare) is type(narrowed.model)
    # copies: see test_round_trip_is_bit_equal
    hidden = copy.deepcopy(bare)(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, narrowed.model(input_ids=ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(out, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(loaded) is transact.TransActForSequenceClassification
    logits = copy.deepcopy(loaded)(input_ids=ids).logits
    assert torch.equal(logits, copy.deepcopy(loaded).score(hidden)[[0, 1], [3, 1]])
    labels = torch.tensor([0, 2])
    loss = loaded(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    loss.backward()
    assert loaded.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_the_plan_of_an_earlier_checkpoint_is_read(tmp_path):
    narrowed, plan = narrowed_and_plan()
    out = transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    (out / "pruning" / "plan.safetensors").rename(out / "plan.safetensors")
    assert transact.load_plan(out).widths == plan.widths
    (out / "plan.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no pruning/plan\.safetensors: not a pruned checkpoint"):
        transact.load_plan(out)


def heads_said_of_layers(config) -> list[tuple[int, int, int]]:
    """Query heads, key-value heads and head width, as vLLM and others read them layer by layer."""
    return [(layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) for layer in config.per_layer_config]


def test_the_configuration_says_each_layers_heads_as_engines_ask_for_them(tmp_path):
    settings = tiny_llama("gqa", head_dim=96).config.to_dict()
    config = transact.TransActConfig(
        **settings, kv_head_counts=[2, 1], qk_head_dims=[64, 34], v_head_dims=[30, 66], intermediate_sizes=[40, 7]
    )
    config.save_pretrained(tmp_path)
    for one in (config, transact.TransActConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert one.is_heterogeneous
        assert heads_said_of_layers(one) == [(6, 2, 64), (3, 1, 80)]  # the width that kernels have next
        assert (one.head_dim, one.num_attention_heads, one.num_key_value_heads) == (96, 6, 2)
        assert "per_layer_config" not in one.to_dict()
    assert len(config.per_layer_config[:1]) == 1


def test_a_configuration_whose_heads_are_whole_says_nothing_of_layers():
    dense = tiny_llama("gqa", head_dim=32).config
    config = transact.TransActConfig(**dense.to_dict(), v_head_dims=[32, 5], intermediate_sizes=[40, 7])
    assert heads_said_of_layers(config) == [(6, 2, 32)] * 2
    assert config.is_heterogeneous is False


def test_existing_output_is_refused_and_only_a_checkpoint_is_replaced(tmp_path):
    narrowed, plan = narrowed_and_plan()
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {"first": True})
    with pytest.raises(ValueError, match="exists; name another or pass --overwrite"):
        transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {"second": True}, overwrite=True)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == {"second": True}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(ValueError, match="holds no pruned checkpoint"):
        transact.save_checkpoint(tmp_path / "thesis", narrowed, plan, {}, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a directory"):
        transact.save_checkpoint(tmp_path / "file", narrowed, plan, {}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "thesis"]


def test_failure_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    narrowed, plan = narrowed_and_plan()
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {"first": True})

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        transact.save_checkpoint(tmp_path / "out", narrowed, plan, {"second": True}, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        transact.save_checkpoint(tmp_path / "new", narrowed, plan, {})
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == {"first": True}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SAVE_FOR_EVER = """
import sys, itertools, transact
from tests.tiny import random_plan, tiny_llama
dense = tiny_llama("gqa")
plan = random_plan(dense.config)
narrowed = transact.apply_plan(dense, plan)
print("ready", flush=True)
for count in itertools.count():
    transact.save_checkpoint(f"{sys.argv[1]}/out-{count}", narrowed, plan, {})
"""


def test_killed_while_saving_leaves_whole_checkpoints_only(tmp_path):
    for delay in (0.02, 0.05, 0.09):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
        with process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        for directory in tmp_path.glob("out-*"):
            AutoModelForCausalLM.from_pretrained(directory)
            transact.load_plan(directory).check(tiny_llama("gqa").config)
            json.loads((directory / "pruning.json").read_text())


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("qk_head_dims", [4, 5], "must be even"),
        ("qk_head_dims", [4], "must be one width a layer, 2 of them, got"),
        ("v_head_dims", [4, 17], "between 0 and the dense model's 16"),
        ("intermediate_sizes", [4, -1], "between 0 and the dense model's 40"),
        ("intermediate_sizes", [4, 41], "between 0 and the dense model's 40"),
    ],
)
def test_configuration_that_no_plan_gives_is_refused(field, value, named):
    settings = narrowed_and_plan()[0].config.to_dict() | {field: value}
    with pytest.raises(Exception, match=named):
        transact.TransActConfig(**settings)


def hash_with(directory, tmp_path, **changes) -> str:
    """The hash of a checkpoint whose config.json is edited so."""
    edited = tmp_path / "edited"
    shutil.rmtree(edited, ignore_errors=True)
    shutil.copytree(directory, edited)
    config = json.loads((edited / "config.json").read_text(encoding="utf-8"))
    (edited / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return checkpoint.model_hash(transact.load_model(edited, dtype="float32", device="cpu")[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    ],
)
def test_models_that_compute_otherwise_have_another_hash(changes, tiny_directory, tmp_path):
    assert hash_with(tiny_directory, tmp_path, **changes) != hash_with(tiny_directory, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "/elsewhere"},
        {"transformers_version": "5.0.0"},
        {"dtype": "bfloat16"},
        {"use_cache": False},
        {"initializer_range": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"a_note": "read by nobody"},
    ],
)
def test_what_changes_no_figure_changes_no_hash(changes, tiny_directory, tmp_path):
    assert hash_with(tiny_directory, tmp_path, **changes) == hash_with(tiny_directory, tmp_path)


def test_the_same_weights_at_other_rope_pairs_have_another_hash():
    narrowed, _ = narrowed_and_plan()
    before = checkpoint.model_hash(narrowed)
    with torch.no_grad():
        narrowed.model.layers[0].self_attn.rope_pairs += 1
    assert checkpoint.model_hash(narrowed) != before
