"""Recovery: the ways to train, exact resumption, merged adapters, the token budget, and what is refused."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transact
from tests.tiny import random_plan, tiny_llama
from transact.__main__ import main
from transact.recovery.held_out import held_out_loss, hold_out
from transact.recovery.schedule import WAYS, epoch_order, parse_tokens, rate_of_step
from transact.recovery.trainer import NonFiniteLossError, _Windows

DENSE = tiny_llama("gqa")
DOWNHILL = {"lozo": 1e-3, "lozo-distillation": 1e-3}  # rates of the ways that take another than the others
WINDOWS = torch.randint(1, 97, (40, 16), generator=torch.Generator().manual_seed(0))
TOKENS = 40 * 16


def narrowed():
    return transact.apply_plan(DENSE, random_plan(DENSE.config))


def training(**changes) -> transact.Training:
    return transact.Training(**{"tokens": TOKENS, "way": "full", "learning_rate": 1e-2, "batch": 4} | changes)


def trained(**changes) -> transact.Recovered:
    settings = training(**{name: value for name, value in changes.items() if name not in ("checkpoints", "evaluate")})
    rest = {name: value for name, value in changes.items() if name in ("checkpoints", "evaluate")}
    return transact.recover(narrowed(), WINDOWS, settings, teacher=DENSE if settings.needs_teacher() else None, **rest)


def rank_of(way: str) -> dict:
    return {"rank": 4} if way.startswith("lo") else {}


def weights(model) -> dict:
    return model.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_lowers_its_loss_and_leaves_a_narrowed_checkpoint(way, tmp_path):
    recovered = trained(way=way, tokens=4 * TOKENS, **rank_of(way), learning_rate=DOWNHILL.get(way, 1e-2))
    losses = [row["loss"] for row in recovered.history if "loss" in row]
    assert min(losses[-10:]) < losses[0]
    assert recovered.tokens == 4 * TOKENS
    assert recovered.epochs == 4
    before = narrowed()
    assert {name: tensor.shape for name, tensor in weights(recovered.model).items()} == {
        name: tensor.shape for name, tensor in weights(before).items()
    }
    recovered.model.save_pretrained(tmp_path)
    again = transact.TransActForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(recovered.model).items())
    moved = [
        name for name, tensor in weights(recovered.model).items() if not torch.equal(tensor, weights(before)[name])
    ]
    assert moved
    assert not any("rope_pairs" in name for name in moved)
    assert all("proj" in name for name in moved) == ("lora" in way)


def test_merged_adapters_compute_what_the_adapters_did(monkeypatch):
    from peft import PeftModel

    seen = {}
    merge = PeftModel.merge_and_unload if hasattr(PeftModel, "merge_and_unload") else None
    assert merge is None  # peft hands the call on to its tuner: watch that one
    from peft.tuners.lora import LoraModel

    original = LoraModel.merge_and_unload

    def watched(self, *arguments, **options):
        with torch.no_grad():
            seen["logits"] = self.model.eval()(input_ids=WINDOWS[:4]).logits
        return original(self, *arguments, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", watched)
    recovered = trained(way="lora", rank=4)
    with torch.no_grad():
        merged = recovered.model(input_ids=WINDOWS[:4]).logits
        untrained = narrowed().eval()(input_ids=WINDOWS[:4]).logits
    assert (merged - seen["logits"]).abs().max() < 1e-4
    assert (merged - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["distillation", "lora", "lozo"])
def test_an_interrupted_run_goes_on_to_the_same_result(way, tmp_path):
    whole = trained(way=way, **rank_of(way), checkpoints=tmp_path / "whole")

    calls = []

    def interrupted(model):
        calls.append(model)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"calls": 1.0}

    with pytest.raises(KeyboardInterrupt):
        trained(way=way, **rank_of(way), checkpoints=tmp_path / "cut", evaluate=interrupted)
    left = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
    assert left
    torn = tmp_path / "cut" / "checkpoint-9"  # killed while it was being written
    torn.mkdir(exist_ok=True)
    (torn / "trainer_state.json").write_text('{"global')
    resumed = trained(way=way, **rank_of(way), checkpoints=tmp_path / "cut")
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, weights(resumed.model)[name]), name
    done = trained(way=way, **rank_of(way), checkpoints=tmp_path / "cut")  # nothing is left to do
    assert all(torch.equal(tensor, weights(done.model)[name]) for name, tensor in weights(whole.model).items())


def test_checkpoints_of_another_run_are_refused(tmp_path):
    trained(checkpoints=tmp_path / "run")
    with pytest.raises(ValueError, match=r"another run: learning_rate 0.01 \(now 0.02\)"):
        trained(checkpoints=tmp_path / "run", learning_rate=2e-2)
    (tmp_path / "run" / "recovery.json").write_text("{")
    with pytest.raises(ValueError, match=r"recovery\.json' cannot be read"):
        trained(checkpoints=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        trained(checkpoints=tmp_path / "other")
    with pytest.raises(ValueError, match="is a file"):
        trained(checkpoints=tmp_path / "other" / "file")


def test_another_teacher_is_another_run_and_a_run_without_checkpoints_binds_nothing(tmp_path):
    trained(way="distillation", checkpoints=tmp_path / "run")
    with pytest.raises(ValueError, match=r"another run: teacher "):
        transact.recover(narrowed(), WINDOWS, training(way="distillation"), teacher=narrowed(),
                         checkpoints=tmp_path / "run")  # fmt: skip

    def stopped(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(checkpoints=tmp_path / "stopped", learning_rate=1.0, evaluate=stopped)
    trained(checkpoints=tmp_path / "stopped", learning_rate=1e-2)


def test_nothing_is_left_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained()
    assert not list(tmp_path.iterdir())


def test_seeds_decide_the_order_and_nothing_outside_is_seeded():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = trained()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one, other) for one, other in
               zip(weights(first.model).values(), weights(trained().model).values(), strict=True))  # fmt: skip
    other = weights(trained(seed=1).model)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights(first.model).items())
    first_epoch, second_epoch = (epoch_order(epoch, 40, seed=0).tolist() for epoch in (0, 1))
    assert sorted(first_epoch) == sorted(second_epoch) == list(range(40))
    assert first_epoch != second_epoch


def test_accumulated_batches_are_one_batch():
    """The budget ends in the middle of a step, too."""
    at_once = weights(trained(tokens=38 * 16, batch=8).model)
    in_parts = weights(trained(tokens=38 * 16, batch=8, device_batch=2).model)
    for name, tensor in at_once.items():
        torch.testing.assert_close(tensor, in_parts[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["full", "lozo"])
def test_windows_of_a_last_step_that_is_not_full_count_alike(way):
    """Five windows at the end, at once or in parts of four and one: the loss of the step is their mean."""
    last_losses = [
        trained(way=way, learning_rate=1e-6, tokens=37 * 16, batch=8, device_batch=at_once).history[-1]["loss"]
        for at_once in (8, 4)
    ]
    assert last_losses[1] == pytest.approx(last_losses[0], rel=1e-5)


def test_relative_errors_of_layers_do_not_hang_on_how_many_windows_are_computed_at_once():
    first_losses = [
        trained(way="distillation", layer_weight=1.0, batch=8, device_batch=at_once).history[0]["loss"]
        for at_once in (1, 8)
    ]
    assert first_losses[0] == pytest.approx(first_losses[1], rel=1e-5)


def test_recomputed_activations_and_layer_outputs():
    plain = weights(trained().model)
    recomputed = trained(gradient_checkpointing=True)
    for name, tensor in weights(recomputed.model).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-4)
    assert not recomputed.model.model.gradient_checkpointing
    with_layers = trained(way="distillation", layer_weight=1.0)
    assert with_layers.history[0]["loss"] > trained(way="distillation").history[0]["loss"]


def test_a_teacher_does_not_change_a_way_without_one():
    given = transact.recover(narrowed(), WINDOWS, training(), teacher=DENSE).model
    assert all(torch.equal(weights(given)[name], tensor) for name, tensor in weights(trained().model).items())


def test_every_step_has_a_rate_and_a_recorded_loss():
    recovered = trained(evaluate=lambda model: {"measured": 1.0})
    assert [row["tokens"] for row in recovered.history if "loss" in row] == [64 * step for step in range(1, 11)]
    rates = [rate_of_step(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert rate_of_step(0, 1) == 1.0


def test_a_bfloat16_model_comes_back_in_bfloat16():
    model = narrowed().to(torch.bfloat16)
    model.model.rotary_emb = copy.deepcopy(DENSE.model.rotary_emb)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    recovered = transact.recover(model, WINDOWS, training())
    assert {parameter.dtype for parameter in recovered.model.parameters()} == {torch.bfloat16}
    assert torch.equal(recovered.model.model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize("way", ["distillation", "full", "lora"])
def test_training_in_bfloat16_goes_as_in_float32(way):
    """Each step computes with the weights of the step before, not with copies in bfloat16 from the first one."""
    losses = [
        [row["loss"] for row in trained(way=way, tokens=2 * TOKENS, bf16=in_bfloat16).history if "loss" in row]
        for in_bfloat16 in (False, True)
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.02, atol=0)


@pytest.mark.parametrize("way", ["full", "lozo"])
def test_a_launcher_s_precision_does_not_stand_above_that_of_the_training(way, monkeypatch):
    expected = weights(trained(way=way, bf16=False).model)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    found = weights(trained(way=way, bf16=False).model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("way", ["lora", "lora-distillation"])
def test_adapters_of_a_float16_model_get_gradients_that_float16_does_not_hold(way):
    """The loss is a mean over all tokens of a step: parts of its gradient are less than float16 tells from nothing."""
    model = narrowed().half()
    settings, teacher = training(way=way, bf16=False), DENSE if "distillation" in way else None
    expected = transact.recover(copy.deepcopy(model).float(), WINDOWS, settings, teacher=teacher).model
    found = transact.recover(model, WINDOWS, settings, teacher=teacher).model
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float16}
    assert all(
        torch.equal(one.half(), other) for one, other in zip(expected.parameters(), found.parameters(), strict=True)
    )


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = []

    def poisoned(model):
        calls.append(1)
        if len(calls) == 3:  # half of the way
            with torch.no_grad():
                model.lm_head.weight.fill_(math.nan)
        return {}

    with pytest.raises(NonFiniteLossError, match=r"not finite|loss is nan"):
        trained(checkpoints=tmp_path / "run", evaluate=poisoned)
    kept = list((tmp_path / "run").glob("checkpoint-*"))
    assert kept
    for directory in kept:
        model = transact.TransActForCausalLM.from_pretrained(directory)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_schedule_of_the_paper():
    budgets = transact.shot_budgets(1_000_000_000, 8, 5e-5)
    assert sum(tokens for tokens, _ in budgets) == 1_000_000_000
    share = 1e9 / 8
    for k, (tokens, rate) in enumerate(budgets, start=1):
        assert tokens == pytest.approx(share / 2 + share * (k - 1) / 7, abs=1)
        assert rate == pytest.approx(5e-5 * 2 * k / 8)
    assert transact.shot_budgets(100, 1, 1e-3) == [(100, 1e-3)]


@pytest.mark.parametrize(("text", "tokens"), [("1000", 1000), ("500k", 500_000), ("2M", 2_000_000), ("1.5B", 1.5e9)])
def test_parse_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "many", "-3", "0", "nan", "inf", "2T"])
def test_parse_tokens_refuses(text):
    with pytest.raises(ValueError, match="tokens must be a number"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": "magic"}, "unknown way 'magic', allowed: distillation, full"),
        ({"tokens": 5}, "tokens 5 are less than one window of 16"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        ({"tokens": "640"}, "tokens must be a whole number of at least 1, got '640'"),
        ({"batch": 2.5}, "batch must be a whole number of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be a whole number between 0 and 4294967295, got -1"),
        ({"learning_rate": math.nan}, "learning-rate must be positive"),
        ({"learning_rate": -1.0}, "learning-rate must be positive"),
        ({"layer_weight": 1.0}, "has no teacher"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"way": "lozo", "rank": 5}, "rank of way 'lozo' must be between 1 and 4, got 5"),
        ({"way": "lozo-distillation", "rank": 16}, "rank of way 'lozo-distillation' must be between 1 and 4, got 16"),
        ({"way": "lozo", "refresh": 0}, "refresh must be a whole number of at least 1, got 0"),
        ({"way": "lozo", "refresh": 2.5}, "refresh must be a whole number of at least 1, got 2.5"),
        ({"way": "lozo", "refresh": True}, "refresh must be a whole number of at least 1, got True"),
        ({"way": "lozo", "perturbation": math.inf}, "perturbation must be positive and at most 1, got inf"),
        ({"way": "lozo", "perturbation": 1e30}, "perturbation must be positive and at most 1, got 1e\\+30"),
        ({"rank": 8}, "rank is of ways 'lora' and 'lozo', got 8 with way 'full'"),
        ({"way": "distillation", "rank": 8}, "rank is of ways 'lora' and 'lozo', got 8 with way 'distillation'"),
        ({"way": "lozo", "gradient_checkpointing": True}, "of which way 'lozo' keeps none"),
        ({"refresh": 50}, "refresh is of way 'lozo', got 50 with way 'full'"),
        ({"way": "lora", "perturbation": 1e-3}, "perturbation is of way 'lozo', got 0.001 with way 'lora'"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        trained(**changes)


class Packed(torch.Tensor):
    """Stands for torchao's tensors, which say that they are floating-point."""


def test_refused_models():
    with pytest.raises(ValueError, match="not pruned"):
        transact.recover(tiny_llama("gqa"), WINDOWS, training())
    with pytest.raises(ValueError, match="needs the dense model as teacher"):
        transact.recover(narrowed(), WINDOWS, training(way="distillation"))
    other = tiny_llama("gqa")
    other.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="vocabulary has 50 tokens, the model's 97"):
        transact.recover(narrowed(), WINDOWS, training(way="distillation"), teacher=other)
    quantised = narrowed()
    quantised.lm_head.weight = torch.nn.Parameter(quantised.lm_head.weight.detach().as_subclass(Packed))
    with pytest.raises(ValueError, match=r"lm_head\.weight is quantised \(Packed"):
        transact.recover(quantised, WINDOWS, training())
    for windows, message in [
        (WINDOWS.float(), "token ids"),
        (WINDOWS[0], "matrix"),
        (WINDOWS[:, :1], "at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            transact.recover(narrowed(), windows, training())
    with pytest.raises(ValueError, match="at least 16 are needed"):
        hold_out(WINDOWS[:15])
    fitted, held_out = hold_out(WINDOWS)
    assert (len(fitted), len(held_out)) == (38, 2)


@pytest.fixture
def pruned(tiny_directory, tiny_text, tmp_path):
    out = tmp_path / "pruned"
    assert main(["prune", str(tiny_directory), str(out), "--calibration", str(tiny_text), "--samples", "8",
                 "--seq-len", "32", "--device", "cpu", "--ratio", "0.3"]) == 0  # fmt: skip
    return out


def options(tiny_text, *more: str) -> list[str]:
    return ["--tokens", "2k", "--text", str(tiny_text), "--train-seq-len", "32", "--device", "cpu", *more]


def test_recover_command(pruned, tiny_directory, tiny_text, tmp_path, capsys):
    out = tmp_path / "recovered"
    assert main(["recover", str(pruned), str(out), *options(tiny_text, "--learning-rate", "0.01")]) == 0
    said = capsys.readouterr()
    assert "2,000 tokens are 0.53 epochs of words.txt" in said.err
    assert "perplexity of held-out windows" in said.out
    assert not list(tmp_path.glob("*.checkpoints"))
    pruning = json.loads((out / "pruning.json").read_text())
    (recovery,) = pruning["recovery"]
    assert recovery["tokens"] == 1984
    measured = [row["held_out_loss"] for row in recovery["history"] if "held_out_loss" in row]
    assert len(measured) == 5
    assert measured[-1] < measured[0]
    model, tokenizer = transact.load_model(out, device="cpu")
    windows = hold_out(
        transact.cut_windows(transact.tokenise(transact.load_text(str(tiny_text)), tokenizer), length=32)
    )
    assert held_out_loss(model, windows[1])["held_out_loss"] == pytest.approx(measured[-1], rel=1e-5)
    assert transact.load_plan(out).widths == transact.load_plan(pruned).widths
    assert main(["recover", str(out), str(tmp_path / "again"), *options(tiny_text, "--way", "lora")]) == 0
    assert len(json.loads((tmp_path / "again" / "pruning.json").read_text())["recovery"]) == 2


def test_own_samples_are_the_dense_models(pruned, tiny_directory, tiny_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path / "cache"))
    command = [*options(tiny_text), "--text", f"self,{tiny_text},self"]
    assert main(["recover", str(pruned), str(tmp_path / "out"), *command, "--way", "full"]) == 0
    assert "2,000 tokens are 0.9" in capsys.readouterr().err  # as many windows as are seen
    (recovery,) = json.loads((tmp_path / "out" / "pruning.json").read_text())["recovery"]
    assert (recovery["text"], recovery["teacher"]) == ("self, words.txt", None)
    dense, tokenizer = transact.load_model(tiny_directory, device="cpu")
    transact.calibration_windows(dense, tokenizer, "self", count=2, length=32)
    (sampled,) = (tmp_path / "cache" / "samples").iterdir()  # of the dense model: nothing new was sampled
    assert len(list(sampled.iterdir())) == 1


def test_prune_and_train_in_shots(tiny_directory, tiny_text, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["prune", str(tiny_directory), str(out), "--calibration", str(tiny_text), "--samples", "8", "--seq-len",
               "32", "--preset", "transact", "--shots", "3", "--ratio", "0.4",
               *options(tiny_text, "--learning-rate", "0.01")]  # fmt: skip
    assert main(command) == 0
    recovery = json.loads((out / "pruning.json").read_text())["recovery"]
    assert [round(one["learning_rate"], 5) for one in recovery] == [0.00667, 0.01333, 0.02]
    assert [one["tokens"] for one in recovery] == [320, 640, 992]  # whole windows of 333, 667 and 1000
    model, _ = transact.load_model(out, device="cpu")
    assert transact.widths_of(model.config) == transact.load_plan(out).widths
    assert not list(tmp_path.glob("*.checkpoints"))
    said = capsys.readouterr().out
    assert said.count("perplexity of held-out windows") == 3
    mine = tmp_path / "second.checkpoints"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert main([*command[:2], str(tmp_path / "second"), *command[3:]]) == 2
    assert (mine / "thesis.txt").exists()
    assert "holds something else (thesis.txt)" in capsys.readouterr().err


SHARDED = """
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
import transact
from tests.tiny import random_plan, tiny_llama
from transact.recovery.trainer import gathered, is_finite
distributed.init_process_group("gloo")
dense = tiny_llama("gqa")
model = transact.apply_plan(dense, random_plan(dense.config))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
ids = torch.arange(1, 17)[None]
model(input_ids=ids, labels=ids).loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
whole = gathered(model, model.config)
with torch.no_grad():
    assert torch.equal(whole(input_ids=ids).logits, model(input_ids=ids).logits)
model.reshard()
assert all(map(is_finite, model.parameters()))
with torch.no_grad():
    if distributed.get_rank() == 1:
        model.lm_head.weight.to_local().fill_(torch.nan)
assert not is_finite(model.lm_head.weight)
print("sharded", type(model.lm_head.weight).__name__, flush=True)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_spread_over_processes_is_gathered_whole(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(tmp_path / "sharded.py")], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DTensor") == 2


@pytest.mark.slow
def test_two_processes_train_as_one_does(pruned, tiny_text, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["recover", str(pruned), str(one), *options(tiny_text)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "transact"]
    done = subprocess.run([*command, "recover", str(pruned), str(two), *options(tiny_text)], capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity of held-out windows") == 1
    models = [transact.load_model(out, device="cpu")[0].state_dict() for out in (one, two)]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-3, atol=1e-3)


def test_a_budget_beyond_any_text_needs_no_memory():
    windows = _Windows(WINDOWS, 10**12, seed=0)
    assert len(windows) == 10**12
    assert windows[10**12 - 1]["input_ids"].shape == (16,)


def test_a_model_named_by_a_relative_path_is_found_again_from_elsewhere(
    tiny_directory, tiny_text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tiny_directory.parent)
    out = tmp_path / "out"
    command = ["prune", tiny_directory.name, str(out), "--preset", "transact", "--calibration", str(tiny_text),
               "--samples", "4", "--seq-len", "32", "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["recover", str(out), "again", *options(tiny_text)]) == 0
    pruning = json.loads((out / "pruning.json").read_text())
    (out / "pruning.json").write_text(json.dumps(pruning | {"model": "/gone/model"}))
    assert main(["recover", str(out), "third", *options(tiny_text)]) == 2
    assert "--teacher says where it is now" in capsys.readouterr().err.splitlines()[-1]


def test_mistakes_are_one_line(pruned, tiny_directory, tiny_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transact.commands.prune.calibration_sources", None)  # samples take minutes: no mistake waits
    out = tmp_path / "out"
    short, other = tmp_path / "short.txt", tmp_path / "other"
    short.write_text("w1 w2 w3")
    for arguments, message in [
        (["recover", str(tiny_directory), str(out), *options(tiny_text)], "not a pruned checkpoint"),
        (["recover", str(pruned), str(out), *options(tiny_text, "--tokens", "lots")], "tokens must be a number"),
        (["recover", str(pruned), str(out), *options(short)], "too short"),
        (["recover", str(pruned), str(out), *options(tiny_text, "--way", "x")], "unknown way"),
        (["recover", str(pruned), str(out), *options(tiny_text, "--way", "lozo", "--rank", "5")], "between 1 and 4"),
        (["recover", str(pruned), str(out), *options(tiny_text, "--way", "lozo", "--refresh", "0")], "refresh must be"),
        (["recover", str(pruned), str(out), *options(tiny_text, "--refresh", "9")], "refresh is of way 'lozo'"),
        (["recover", str(pruned), str(pruned), *options(tiny_text)], "exists"),
        (["recover", str(pruned), str(out), *options(tiny_text, "--learning-rate", "1e30")], "training stopped"),
        (
            ["recover", str(pruned), str(out), *options(tiny_text, "--train-seq-len", "1")],
            "train-seq-len must be at least",
        ),
        (
            ["recover", str(pruned), str(out), *options(tiny_text, "--train-seq-len", "9999")],
            "train-seq-len 9999 is longer",
        ),
        (["recover", str(pruned), str(out), *options(tiny_text, "--seed", "-1")], "seed must be"),
        (["prune", str(tiny_directory), str(out), *options(tiny_text, "--layerwise")], "drop --tokens"),
        (["prune", str(tiny_directory), str(other), *options(tiny_text, "--shots", "99")], "leave 10 for one of them"),
        (["prune", str(tiny_directory), str(out), "--way", "lora"], "--way is for training: give --tokens"),
        (["prune", str(tiny_directory), str(out), "--seed", "-1"], "seed must be a whole number between 0"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
        assert not out.exists()
