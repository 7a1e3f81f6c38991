"""What does pruning cost beside the bare forward pass of the decoder stack over the same tokens?

`nox -s bench`. Both are timed in one run, in turn, since these machines are noisy; `ratio` in `extra_info` is the
median of the paired ratios. Random weights at the shape of SmolLM2-135M: speed does not depend on their values.
"""

import gc
import statistics
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

import transact
from bench.efficiency.memory import peak_memory_mib, reset_peak_memory
from bench.efficiency.shapes import SMOLLM2_135M
from bench.environment import fast_dtype
from transact.devices import resolve_device
from transact.models import DTYPES
from transact.timing import seconds_of

SEQ_LEN = 256


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SMOLLM2_135M).to(resolve_device("auto"), DTYPES[fast_dtype("auto")]).eval()


def windows(samples: int) -> torch.Tensor:
    return torch.randint(0, SMOLLM2_135M.vocab_size, (samples, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def time_against_the_bare_forward_pass(benchmark, model, recipe, text, capsys, *, rounds: int, warmup_rounds: int):
    """Time calibrating, scoring, planning, pruning and compensating, each round after a bare forward pass."""
    device = model.device
    ratios, forward_seconds = [], []

    @torch.no_grad()
    def bare_forward():
        for batch in text.split(8):
            model.model(input_ids=batch.to(device), use_cache=False)

    def forward_first():
        forward_seconds.append(seconds_of(bare_forward, device))

    def timed_prune():
        prune_seconds = seconds_of(lambda: transact.prune(model, text, recipe=recipe, ratio=0.2), device)
        ratios.append(prune_seconds / forward_seconds[-1])

    benchmark.pedantic(timed_prune, setup=forward_first, rounds=rounds, warmup_rounds=warmup_rounds)
    benchmark.extra_info |= {
        "ratio": statistics.median(ratios[warmup_rounds:]),
        "ratios": ratios[warmup_rounds:],
        "bare_forward_s": statistics.median(forward_seconds[warmup_rounds:]),
        "tokens": text.numel(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
    }
    with capsys.disabled():
        print(f"\n{text.numel()} tokens, {model.dtype}, {device.type}: prune / bare forward = "
              f"{benchmark.extra_info['ratio']:.3f} (median of {rounds})", end=" ")  # fmt: skip


def test_transact_against_the_bare_forward_pass(benchmark, model, capsys):
    recipe = transact.PRESETS["transact"]
    time_against_the_bare_forward_pass(benchmark, model, recipe, windows(32), capsys, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("compensation", ["dense", "pruned"])
def test_best_against_the_bare_forward_pass(benchmark, model, compensation, capsys):
    """With statistics of the dense model throughout, and as the preset is, refitting on the pruned model's inputs."""
    recipe = replace(transact.PRESETS["best"], compensation=compensation)
    time_against_the_bare_forward_pass(benchmark, model, recipe, windows(64), capsys, rounds=1, warmup_rounds=0)


@pytest.mark.parametrize("samples", [8, 32])
def test_peak_memory_does_not_grow_with_samples(benchmark, model, samples, capsys):
    text = windows(samples)
    gc.collect()
    transact.calibrate(model, text[:8])  # allocators settle
    reset_peak_memory(model.device)
    before = peak_memory_mib(model.device)
    benchmark.pedantic(lambda: transact.calibrate(model, text), rounds=1)
    grown = peak_memory_mib(model.device) - before
    benchmark.extra_info |= {"samples": samples, "peak_memory_grown_mib": grown}
    with capsys.disabled():
        print(f"\n{samples} samples, {model.dtype}: peak memory {grown:.0f} MiB above the model's", end=" ")
