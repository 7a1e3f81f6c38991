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
from transformers import AutoModelForCausalLM

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
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
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
        ("qk_head_dims", [4], "1 entries for 2 layers"),
        ("v_head_dims", [4, 17], "between 1 and the dense model's 16"),
        ("intermediate_sizes", [4, 0], "between 1 and the dense model's 40"),
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
