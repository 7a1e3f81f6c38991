"""Perplexity against an independent loop, bytes against the formula."""

import json
import math

import pytest
import torch

import transact
from bench.__main__ import main
from bench.efficiency.memory import kv_bytes_per_token, peak_memory_mib, reset_peak_memory, weight_bytes
from bench.quality.perplexity import Windows, evaluation_windows, measure_perplexity
from bench.records import append_record, read_records
from bench.suite.workbench import Workbench
from tests.tiny import random_plan, tiny_llama
from transact.recovery import held_out_loss


def independent_loss(model, windows) -> float:
    """Mean negative log-likelihood in nats, one token at a time, as the definition reads."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
            for position in range(len(window) - 1):
                total -= log_probabilities[position, window[position + 1]].item()
                count += 1
    return total / count


def test_perplexity_is_what_a_loop_gives(tiny_directory, tiny_text):
    model, tokenizer = transact.load_model(tiny_directory, device="cpu")
    evaluated = evaluation_windows(transact.load_text(str(tiny_text)), tokenizer, length=30, count=7)
    result, windows = measure_perplexity(model, evaluated, tokens_per_batch=64), evaluated.ids
    expected = independent_loss(model, windows)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == 7 * 29
    assert len(result.losses) == 7
    text_bytes = sum(len(f" w{i}") for window in windows for i in window[1:].tolist())
    assert result.bytes == text_bytes
    assert result.bits_per_byte == pytest.approx(expected * result.tokens / math.log(2) / text_bytes)
    deviations = [(loss - expected) ** 2 for loss in result.losses]
    assert result.standard_error == pytest.approx(math.sqrt(sum(deviations) / 6 / 7), rel=1e-5)


def test_perplexity_refuses_what_it_cannot_measure(tiny_directory):
    model, _ = transact.load_model(tiny_directory, device="cpu")
    with pytest.raises(ValueError, match="read 129 tokens, longer than the model's context of 128"):
        measure_perplexity(model, Windows.of_blocks(torch.ones(1, 130, dtype=torch.int64)))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="window 0 is not finite"):
        measure_perplexity(model, Windows.of_blocks(torch.ones(1, 12, dtype=torch.int64)))


@pytest.fixture
def shouting(tiny_directory, tmp_path):
    """A checkpoint whose logits are so far apart that a token costs thousands of nats."""
    model, tokenizer = transact.load_model(tiny_directory, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    model.save_pretrained(tmp_path / "shouting")
    tokenizer.save_pretrained(tmp_path / "shouting")
    return tmp_path / "shouting"


def test_a_perplexity_that_no_float_holds_is_null_and_its_loss_is_kept(shouting, tiny_text, tmp_path, capsys):
    arguments = ["perplexity", str(shouting), "--text", str(tiny_text), "--seq-len", "16", "--windows", "3"]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["perplexity"] is None
    assert printed["loss"] > 710
    assert printed["bits_per_byte"] > 0
    settings = {"calibration": str(tiny_text), "evaluation": str(tiny_text), "samples": 2, "windows": 3,
                "calibration_seq_len": 16, "evaluation_seq_len": 16, "device": "cpu", "dtype": "float32"}  # fmt: skip
    bench = Workbench(str(shouting), **settings)
    append_record(tmp_path / "records.jsonl", bench.measure(bench.dense_case))
    written = json.loads((tmp_path / "records.jsonl").read_text(encoding="utf-8"))
    assert written["metrics"]["perplexity"] is written["standard_errors"]["perplexity"] is None
    assert written["metrics"]["loss_nats"] == pytest.approx(printed["loss"], rel=1e-6)
    [read], complaints = read_records(tmp_path / "records.jsonl")
    assert complaints == []
    assert read.metrics["perplexity"] == math.inf
    held_out = held_out_loss(bench.dense, bench.evaluation_windows.ids)
    assert held_out["held_out_perplexity"] is None
    assert held_out["held_out_loss"] == pytest.approx(printed["loss"], rel=1e-6)


def test_rolling_windows_predict_every_token_once(tiny_directory, tmp_path):
    _, tokenizer = transact.load_model(tiny_directory, device="cpu")
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range(1, 24)))
    text = transact.load_text(str(tmp_path / "text"))
    windows = evaluation_windows(text, tokenizer, length=10, windowing="rolling")
    assert windows.ids[:, 0].tolist() == [96, 10, 13]  # EOS, then the token before; the last one reads more
    assert windows.ids[:, 1:].tolist() == [[*range(1, 11)], [*range(11, 21)], [*range(14, 24)]]
    assert (windows.in_last, windows.predicted) == (3, 23)
    assert windows.bytes == len(text.content)
    short = evaluation_windows(text, tokenizer, length=100, windowing="rolling")
    assert (short.ids.shape, short.predicted) == ((1, 24), 23)
    few = evaluation_windows(text, tokenizer, length=10, windowing="rolling", count=2)
    assert (few.predicted, few.bytes) == (20, len(" ".join(f"w{i}" for i in range(1, 21))))


def test_bos_begins_every_block(tiny_directory, tiny_text):
    _, tokenizer = transact.load_model(tiny_directory, device="cpu")
    text = transact.load_text(str(tiny_text))
    with pytest.raises(ValueError, match="no BOS token"):
        evaluation_windows(text, tokenizer, length=10, bos=True)
    tokenizer.bos_token = "w96"
    windows = evaluation_windows(text, tokenizer, length=10, count=4, bos=True)
    plain = evaluation_windows(text, tokenizer, length=10, count=4)
    assert (windows.ids[:, 0] == 96).all()
    assert torch.equal(windows.ids[:, 1:], plain.ids)
    assert (windows.predicted, plain.predicted) == (40, 36)
    with pytest.raises(ValueError, match="bos is for windowing blocks"):
        evaluation_windows(text, tokenizer, length=10, windowing="rolling", bos=True)


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_come_from_the_cache(variant, dtype):
    dense = tiny_llama(variant).to(dtype)
    group_heads = dense.config.num_key_value_heads
    assert kv_bytes_per_token(dense) == 2 * 2 * group_heads * 16 * dtype.itemsize
    plan = random_plan(dense.config, drop_heads=True)
    expected = sum(w.kv_heads * (w.qk_head_dim + w.v_head_dim) for w in plan.widths) * dtype.itemsize
    narrowed = transact.apply_plan(dense, plan)
    assert kv_bytes_per_token(narrowed) == expected
    narrowed.config.v_head_dims[0] += 1  # a model that caches other than it says
    with pytest.raises(RuntimeError, match="widths say"):
        kv_bytes_per_token(narrowed)


def test_tied_weights_are_counted_once():
    tied = tiny_llama("tied")
    assert weight_bytes(tied) == 4 * tied.num_parameters()


def test_peak_memory_starts_afresh():
    device = torch.device("cpu")
    held = torch.ones(64 * 2**20)  # 256 MiB
    assert peak_memory_mib(device) > 256
    del held
    reset_peak_memory(device)
    assert peak_memory_mib(device) > 0
