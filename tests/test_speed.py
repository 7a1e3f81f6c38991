"""Costs against counting, the grid against bad cells, and the report; nothing here depends on how fast a machine is."""

import contextlib
import json
import shutil

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import transact
from bench.__main__ import main
from bench.efficiency import speed
from bench.efficiency.costs import (
    Costs,
    Roofline,
    decode_costs,
    largest_batch,
    longest_context,
    memory_needed,
    prefill_costs,
    weight_elements,
)
from bench.efficiency.memory import kv_bytes_per_token
from bench.efficiency.report import read_speed, write_speed_report
from bench.efficiency.shapes import SHAPES, random_model, shape_by_name
from bench.efficiency.speed import SpeedCase, decode_step, fitting, generate_timed, run_grid
from tests.tiny import random_plan, tiny_llama
from transact.modeling_transact import CACHE
from transact.widths import kv_elements_per_token, widths_of


def narrow_model(variant: str = "gqa"):
    dense = tiny_llama(variant)
    return transact.apply_plan(dense, random_plan(dense.config, seed=3, drop_heads=True))


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied"])
def test_operations_are_what_a_counter_counts(variant):
    model, length = narrow_model(variant), 20
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)
    config, group = model.config, model.config.num_attention_heads // model.config.num_key_value_heads
    ours = prefill_costs(config, length=length, batch=2, element_size=4).operations
    # eager computes the full square, of which causal attention needs half; and rotary frequencies, length x pairs
    other_half = 2 * 2 * length * group * kv_elements_per_token(widths_of(config)) * length / 2
    assert ours + other_half == pytest.approx(counter.get_total_flops(), rel=0.01)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:, :1], **{CACHE: cache})
    decoded = decode_costs(config, context=length + 1, batch=2, element_size=4)
    assert decoded.operations == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied"])
def test_bytes_are_those_of_the_weights_and_the_cache(variant):
    model = narrow_model(variant)
    embeddings = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    assert weight_elements(model.config, widths_of(model.config)) == model.num_parameters() - embeddings
    one, two = (decode_costs(model.config, context=c, batch=3, element_size=4).bytes for c in (10, 11))
    assert two - one == 3 * kv_bytes_per_token(model)
    assert memory_needed(model.config, context=0, batch=1, element_size=4) == 4 * model.num_parameters()


@pytest.mark.parametrize("name", SHAPES)
def test_what_fits_fits_and_one_more_does_not(name):
    config, memory = SHAPES[name], 24 * 2**30
    context = longest_context(config, memory, element_size=2)
    assert memory_needed(config, context=context, batch=1, element_size=2) <= 0.92 * memory
    assert memory_needed(config, context=context + 1, batch=1, element_size=2) > 0.92 * memory
    batch = largest_batch(config, memory, context=2048, element_size=2)
    assert memory_needed(config, context=2048, batch=batch, element_size=2) <= 0.92 * memory
    assert memory_needed(config, context=2048, batch=batch + 1, element_size=2) > 0.92 * memory
    assert longest_context(config, 1, element_size=2) == 0


def test_the_paper_s_shapes_cache_what_it_says():
    kv = {name: kv_elements_per_token(widths_of(config)) for name, config in SHAPES.items()}
    assert kv["transact-1.3b"] == kv["transact-1.3b-dims"]
    assert kv["transact-1.3b"] / kv["llama2-7b"] == 0.1875
    assert kv["transact-1.3b"] / kv["sheared-llama-1.3b"] == 0.5
    with pytest.raises(ValueError, match="did you mean 'llama2-7b'"):
        shape_by_name("llama2-7")


def test_random_models_have_the_shape():
    config = SHAPES["smollm2-135m-pruned"]
    model = random_model(config, dtype="bfloat16", device=torch.device("cpu"))
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert kv_bytes_per_token(model) == 2 * kv_elements_per_token(widths_of(config))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("mode", ["eager", "static", "captured"])
def test_timed_generation_is_greedy_generation(mode, device):
    model, ids = narrow_model().to(device), torch.arange(1, 13, device=device)[None]
    tokens = []
    step = decode_step(model, mode)

    def spying(token, cache):
        tokens.append(token.item())
        return step(token, cache)

    cache = speed.DynamicCache() if mode == "eager" else speed.StaticCache(config=model.config, max_cache_len=30)
    prefill_s, decode_s = generate_timed(model, ids, 9, spying, cache)
    expected = model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=None)[0, 12:]
    assert tokens == expected.tolist()
    assert min(prefill_s, decode_s) > 0


@pytest.mark.parametrize("narrow", [False, True])
def test_what_a_graph_would_record_of_a_step_holds_for_all_steps(narrow):
    """A CUDA graph replays the recorded kernels on the recorded memory: nothing may hang on Python's numbers."""
    model, ids = narrow_model() if narrow else tiny_llama("gqa"), torch.arange(1, 13)[None]
    cache, step = speed.StaticCache(config=model.config, max_cache_len=30), decode_step(model, "static")

    @torch.no_grad()
    def tokens_by(step) -> list[int]:
        cache.reset()
        token = model(input_ids=ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)
        return [(token := step(token)).item() for _ in range(9)]

    wanted = tokens_by(lambda token: step(token, cache))
    with torch.no_grad():
        recorded = make_fx(lambda token: step(token, cache))(torch.tensor([[5]]))
    assert tokens_by(recorded) == wanted


def test_a_captured_step_is_recorded_once(monkeypatch):
    recorded = []

    class Graph:
        def replay(self):
            recorded[0]()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

    def step(token, total):
        result = torch.empty_like(token)

        def kernels():
            torch.add(token, total.add_(1), out=result)

        recorded[:] = [kernels]
        return result

    captured, total = speed.CapturedStep(lambda token, total: token + total.add_(1)), torch.zeros(1)
    assert captured(torch.ones(1), total) == 2
    captured.step = step
    assert [captured(torch.full((1,), value), total).item() for value in (1.0, 5.0, 2.0)] == [3, 8, 6]


def test_the_roof_is_the_slower_of_two():
    roof = Roofline(bytes_per_second=10.0, operations_per_second=100.0)
    assert roof.seconds(Costs(operations=1000, bytes=10)) == 10
    assert roof.seconds(Costs(operations=10, bytes=50)) == 5


@pytest.fixture
def checkpoint(tmp_path, tiny_directory):
    model, tokenizer = transact.load_model(tiny_directory, device="cpu")
    plan = random_plan(model.config)
    transact.save_checkpoint(tmp_path / "pruned", transact.apply_plan(model, plan), plan, {}, tokenizer=tokenizer)
    return tmp_path / "pruned"


def test_a_grid_goes_on_after_what_does_not_fit(checkpoint, tiny_directory, monkeypatch, tmp_path):
    measure, memory = speed.measure_speed, speed.memory_of

    def out_of_memory(model, case: SpeedCase, *arguments, **options):
        if case.batch == 2 and case.prefix == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return measure(model, case, *arguments, **options)

    monkeypatch.setattr(speed, "measure_speed", out_of_memory)
    options = {"lengths": ((8, 2), (16, 2), (127, 2)), "batches": (1, 2, 4), "dtype": "float32", "device": "cpu"}
    records = list(run_grid([str(tiny_directory), str(checkpoint)], repeats=2, **options))
    status = [(r["case"]["prefix"], r["case"]["batch"], r["status"]) for r in records[:9]]
    assert status == [
        (8, 1, "success"), (8, 2, "out of memory"), (8, 4, "skipped"), (16, 1, "success"), (16, 2, "success"),
        (16, 4, "success"), (127, 1, "skipped"), (127, 2, "skipped"), (127, 4, "skipped"),
    ]  # fmt: skip
    assert records[1]["error"] == "CUDA out of memory. Tried to allocate 1 GiB"
    assert records[2]["error"] == "a smaller batch ran out of memory"
    assert records[6]["error"] == "129 tokens are more than its context"
    assert len(records) == 18
    assert len(records[0]["samples"]["decode_s"]) == 2
    monkeypatch.setattr(speed, "memory_of", lambda device: 1000)
    assert {r["status"] for r in run_grid([str(tiny_directory)], **options)} == {"skipped"}
    assert memory(torch.device("cpu")) > 2**20


def test_speed_command_draws_and_appends(checkpoint, tmp_path, capsys):
    arguments = ["speed", str(checkpoint), "--batches", "1,2", "--device", "cpu", "--repeats", "1"]
    assert main([*arguments, "--results", str(tmp_path / "r")]) == 0  # 256 and 960 tokens are beyond its context
    captured = capsys.readouterr()
    assert "no GPU is used" in captured.err
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"speed.jsonl", "speed.md", "latency.png", "memory.svg", "roofline.png", "throughput.png"} <= names
    with (tmp_path / "r" / "speed.jsonl").open("a") as file:
        file.write('{"torn')
        file.write("\n" + json.dumps({"schema": 99}) + "\n")
    frame, complaints = read_speed(tmp_path / "r" / "speed.jsonl")
    assert len(frame) == 6
    assert [("torn" in complaint, "schema 99" in complaint) for complaint in complaints] == [(True, False),
                                                                                           (False, True)]  # fmt: skip
    table, _ = write_speed_report(frame[frame["status"] == "skipped"].reset_index(), tmp_path / "s")
    assert "skipped" in (tmp_path / "s" / "speed.md").read_text()
    assert "pruned" in table


def test_what_fits_is_computed_without_measuring(capsys):
    assert main(["speed", "llama2-7b", "transact-1.3b", "--memory-gib", "16"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["kv_bytes_per_token"] == 2 * 32 * 2 * 4096
    assert rows == fitting(["llama2-7b", "transact-1.3b"], 16)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["llama3-7b"], "unknown shape 'llama3-7b', allowed: llama2-7b"),
        (["llama2-7b", "--batches", "0"], "at least 1"),
        (["llama2-7b", "--modes", "warp"], "unknown mode 'warp', allowed: eager, static, captured, graphs"),
        (["llama2-7b", "--grid", "huge"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(arguments, named, capsys):
    try:
        code = main(["speed", *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert named in error[-1]


@pytest.mark.parametrize("gib", ["nan", "inf", "1e300", "0", "-1"])
def test_memory_without_a_number_is_refused(gib, capsys):
    assert main(["speed", "llama2-7b", "--memory-gib", gib]) == 2
    assert "memory must be" in capsys.readouterr().err


def test_later_models_run_in_turn_with_the_first_and_a_verdict_is_recorded(checkpoint, tiny_directory, monkeypatch):
    """A made-up clock: the dense model's prefill and decoding take 3 and 8 seconds, the pruned one's 3 and 4, or so."""
    turns = []

    def generated(model, ids, decode, step, cache):
        is_pruned = model.config.model_type == "transact_llama"
        turns.append("pruned" if is_pruned else "dense")
        off = 1 + 0.01 * (len(turns) % 5)
        return 3 * off, (4 if is_pruned else 8) * off

    monkeypatch.setattr(speed, "generate_timed", generated)
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: Roofline(1e9, 1e9))
    options = {"lengths": ((8, 2), (16, 2)), "dtype": "float32", "device": "cpu"}
    records = list(run_grid([str(tiny_directory), str(checkpoint)], **options))
    assert [record["reference"] for record in records] == [None, None, "tiny", "tiny"]
    assert [record["verdicts"] for record in records[:2]] == [{}, {}]
    for record in records[2:]:
        assert record["verdicts"] == {"prefill": "inconclusive", "decode": "faster"}
        metrics = record["metrics"]
        assert 1.9 < metrics["decode_speedup_low"] < metrics["decode_speedup"] < metrics["decode_speedup_high"] < 2.1
        assert metrics["prefill_speedup_low"] <= 1 <= metrics["prefill_speedup_high"]
        assert len(record["samples"]["decode_s"]) == speed.REPEATS
    assert turns[16:] == ["pruned", "dense", *["pruned", "dense", "dense", "pruned"] * 3, "pruned", "dense"] * 2


def test_a_model_that_does_not_fit_beside_the_first_is_measured_alone(checkpoint, tiny_directory, monkeypatch):
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: Roofline(1e9, 1e9))
    options = {"lengths": ((8, 2),), "dtype": "float32", "device": "cpu", "repeats": 1}
    models = [str(tiny_directory), str(checkpoint)]
    needed = [memory_needed(speed.config_of(name), context=10, batch=1, element_size=4) for name in models]
    with monkeypatch.context() as patch:
        patch.setattr(speed, "memory_of", lambda device: sum(needed) - 1)
        assert [record["verdicts"] for record in run_grid(models, **options)] == [{}, {}]
    assert [record["verdicts"] for record in run_grid(models, **options)] == [
        {}, {"prefill": "inconclusive", "decode": "inconclusive"},
    ]  # fmt: skip
    measure = speed.measure_speed

    def full(model, case, *arguments, reference=None, **options):
        if reference is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(model, case, *arguments, **options)

    monkeypatch.setattr(speed, "measure_speed", full)
    records = list(run_grid(models, **options))
    assert [(record["status"], record["verdicts"]) for record in records] == [("success", {}), ("success", {})]


def test_verdicts_stand_in_the_table(tmp_path):
    case = {"prefix": 8, "decode": 2, "batch": 1, "mode": "eager", "dtype": "float32", "device": "cpu"}
    metrics = {"weight_bytes": 1, "latency_s": 1.0, "prefill_s": 0.5, "decode_s": 0.5, "kv_bytes_per_token": 1,
               "decode_speedup": 1.25, "decode_speedup_low": 1.2, "decode_speedup_high": 1.3}  # fmt: skip
    shared = {"schema": 1, "environment": {"device": "d", "torch": "t"}, "status": "failed", "metrics": metrics}
    lines = [
        {**shared, "case": {"model": "dense", **case}},  # as written before there were verdicts
        {**shared, "case": {"model": "pruned", **case}, "reference": "dense", "verdicts": {"decode": "faster"}},
    ]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    frame, complaints = read_speed(tmp_path / "speed.jsonl")
    table, _ = write_speed_report(frame, tmp_path)
    assert not complaints
    assert "faster" in table
    assert "decode_verdict" in (tmp_path / "speed.csv").read_text()


def test_a_decoding_rate_beside_the_dense_model_s(monkeypatch):
    seconds = {"llama": (1.5, 2.0), "transact_llama": (2.0, 1.0)}
    monkeypatch.setattr(speed, "generate_timed", lambda model, *rest: seconds[model.config.model_type])
    rate, error, ratios = speed.decode_rate(narrow_model(), 10, reference=tiny_llama())
    assert (rate, error) == (10, 0)
    assert (ratios["decode"].median, ratios["decode"].verdict) == (2, "faster")
    assert (ratios["prefill"].median, ratios["prefill"].verdict) == (0.75, "slower")
    assert speed.decode_rate(narrow_model(), 10) == (10, 0, {})


def test_a_decoding_rate_is_taken_on_the_device(device):
    rate, _, ratios = speed.decode_rate(narrow_model().to(device), 4, reference=tiny_llama().to(device))
    assert rate > 0
    assert all(ratio.low <= ratio.median <= ratio.high for ratio in ratios.values())


COSTS = {"prefill_operations": 9.0, "prefill_bytes": 9.0, "decode_operations_per_token": 9.0, "latency_s": 0.6,
         "decode_bytes_per_token": 9.0, "copy_bytes_per_s": 1e9, "matrix_operations_per_s": 1e9, "prefill_s": 0.1,
         "decode_s": 0.5, "decode_tokens_per_s": 9.0, "weight_bytes": 9, "kv_bytes_per_token": 9}  # fmt: skip


def line(model: str = "dense", *, dtype: str = "float32", where: dict | None = None, **changes) -> dict:
    """A line of `speed.jsonl`."""
    case = {"model": model, "prefix": 8, "decode": 2, "batch": 1, "mode": "eager", "dtype": dtype, "device": "cpu"}
    where = {"device": "EPYC", "threads": 2, "torch": "2"} | (where or {})
    return {"schema": 1, "environment": where, "case": case, "status": "success", "metrics": COSTS} | changes


def read_back(tmp_path, *lines: dict):
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return read_speed(tmp_path / "speed.jsonl")


def test_two_dtypes_are_two_models(tmp_path):
    frame, complaints = read_back(tmp_path, line(), line(dtype="bfloat16"), line("other"))
    table, files = write_speed_report(frame, tmp_path)
    assert not complaints
    assert all(name in table for name in ("| dense, float32 ", "| dense, bfloat16 ", "| other, float32 "))
    assert {"latency.png", "memory.png", "roofline.png"} <= {file.name for file in files}
    assert read_back(tmp_path, line())[0]["model"].tolist() == ["dense"]


@pytest.mark.parametrize("other", [{"device": "Xeon"}, {"threads": 1}])
def test_speeds_of_two_machines_are_not_shown_together(other, tmp_path):
    frame, complaints = read_back(tmp_path, line(where=other), line("narrow", where=other), line())
    assert frame["model"].tolist() == ["dense"]
    name = f"{other.get('device', 'EPYC')}, {other.get('threads', 2)} threads"
    assert complaints == [
        f"{tmp_path / 'speed.jsonl'}: 2 records of {name} left out, the last is of EPYC, 2 threads"
    ]  # fmt: skip


BROKEN = {
    "no decoding": {"metrics": {name: value for name, value in COSTS.items() if name != "decode_s"}},
    "nan": {"metrics": COSTS | {"decode_s": None}},
    "zero": {"metrics": COSTS | {"decode_s": 0.0}},
    "words": {"metrics": COSTS | {"prefill_s": "fast"}},
    "a list of metrics": {"metrics": [1]},
    "verdicts in a list": {"verdicts": ["faster"]},
    "no device": {"environment": {"device": None, "torch": "2"}},
    "an error in parts": {"status": "failed", "metrics": {}, "error": ["a"]},
    "a model in parts": {"case": line()["case"] | {"model": ["dense"]}},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_lines_that_tell_no_speed_are_passed_over_by_number(broken, tmp_path):
    frame, complaints = read_back(tmp_path, line("broken", **BROKEN[broken]), line())
    assert frame["model"].tolist() == ["dense"]
    assert complaints == [f"{tmp_path / 'speed.jsonl'}:1: not a record (torn line?), passed over"]
    write_speed_report(frame, tmp_path)


def test_a_cell_that_failed_has_no_figures_and_is_shown(tmp_path):
    failed = line("failed", status="failed", error="no compiler", metrics={"weight_bytes": None})
    for lines in ([failed], [failed, line()]):
        frame, complaints = read_back(tmp_path, *lines)
        assert not complaints
        assert "failed" in write_speed_report(frame, tmp_path)[0]


def test_a_model_that_cannot_be_read_takes_no_other_with_it(checkpoint, tiny_directory, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: Roofline(1e9, 1e9))
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    options = {"lengths": ((8, 2),), "dtype": "float32", "device": "cpu", "repeats": 1}
    records = list(run_grid([str(tiny_directory), str(broken), str(checkpoint)], **options))
    assert [record["status"] for record in records] == ["success", "failed", "success"]
    assert "cannot be read" in records[1]["error"]
    with pytest.raises(ValueError, match="cannot be read"):
        list(run_grid([str(broken), str(tiny_directory)], **options))


def test_a_cell_that_is_named_twice_is_measured_once(tiny_directory, monkeypatch):
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: Roofline(1e9, 1e9))
    options = {"lengths": ((8, 2),), "dtype": "float32", "device": "cpu", "repeats": 1}
    assert len(list(run_grid([str(tiny_directory)], batches=(1, 1), modes=("eager", "eager"), **options))) == 1
