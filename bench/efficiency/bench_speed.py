"""How fast is one decoded token, and what do narrower, unaligned or per-head RoPE'd shapes change?

`nox -s bench`. Random weights; sizes that two CPU cores finish. Ratios are medians of paired rounds in one run.
`--benchmark-autosave` and `--benchmark-compare --benchmark-compare-fail=median:10%` make it a gate on speed.
"""

import statistics

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from bench.efficiency.costs import decode_costs, measure_roofline
from bench.efficiency.shapes import SMOLLM2_135M, narrowed, random_model, shape_by_name
from bench.environment import fast_dtype
from transact.devices import resolve_device
from transact.modeling_transact import CACHE
from transact.models import DTYPES
from transact.timing import seconds_of

CONTEXT, TOKENS = 256, 8


@pytest.fixture(scope="module")
def device() -> torch.device:
    return resolve_device("auto")


@pytest.fixture(scope="module")
def roofline(device):
    return measure_roofline(device, DTYPES[fast_dtype("auto")])


def decoder(config, device: torch.device):
    """A function that decodes some tokens after a prompt."""
    model = random_model(config, dtype=fast_dtype("auto"), device=device)
    ids = torch.zeros(1, CONTEXT, dtype=torch.int64, device=device)

    @torch.no_grad()
    def run():
        for _ in range(TOKENS):
            model(input_ids=ids[:, :1], **{CACHE: cache}, use_cache=True)
        cache.crop(-TOKENS)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    run()
    return run


@pytest.mark.parametrize("shape", ["smollm2-135m", "smollm2-135m-pruned", "smollm2-135m-odd"])
def test_decode_step(benchmark, shape, device, roofline, capsys):
    config = shape_by_name(shape)
    run = decoder(config, device)
    benchmark.pedantic(lambda: seconds_of(run, device), rounds=9, warmup_rounds=2)
    seconds = benchmark.stats.stats.median / TOKENS
    size = DTYPES[fast_dtype("auto")].itemsize
    costs = decode_costs(config, context=CONTEXT, batch=1, element_size=size)
    benchmark.extra_info |= {
        "tokens_per_s": 1 / seconds, "roofline_fraction": roofline.seconds(costs) / seconds, "device": device.type,
        "dtype": fast_dtype("auto"),
    }  # fmt: skip
    with capsys.disabled():
        print(
            f"\n{shape}: {1 / seconds:.1f} tokens/s, {roofline.seconds(costs) / seconds:.2f} of the roofline", end=" "
        )


@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [
        ("our module", "dense"),
        ("our module with per-head RoPE pairs", "stock Llama as narrow"),
        ("30 % removed", "dense"),
        ("30 % removed, unaligned", "30 % removed"),
    ],
)
def test_ratio_of_decode_steps(benchmark, numerator, denominator, device, capsys):
    dense = SMOLLM2_135M
    configs = {
        "dense": dense,
        "30 % removed": shape_by_name("smollm2-135m-pruned"),
        "30 % removed, unaligned": shape_by_name("smollm2-135m-odd"),
        "our module": narrowed(dense, dense.num_key_value_heads, 64, dense.intermediate_size),
        "stock Llama as narrow": LlamaConfig(**dense.to_dict() | {"head_dim": 48}),  # one table
        "our module with per-head RoPE pairs": narrowed(dense, dense.num_key_value_heads, 48, dense.intermediate_size),
    }
    first, second = decoder(configs[numerator], device), decoder(configs[denominator], device)
    ratios = []

    def pair():
        ratios.append(seconds_of(first, device) / seconds_of(second, device))

    benchmark.pedantic(pair, rounds=15, warmup_rounds=2)
    ratio = statistics.median(ratios[2:])
    benchmark.extra_info |= {"ratio": ratio, "ratios": ratios[2:], "device": device.type, "dtype": fast_dtype("auto")}
    with capsys.disabled():
        print(f"\ndecode step, {numerator} / {denominator}: {ratio:.3f}", end=" ")
