"""Devices: whose random state, which one is trained and timed on, and what is left on it afterwards.

What needs two devices is tested on the CPU with another kind ("meta", which holds no numbers) or a made-up CUDA.
"""

import gc
import math
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import ablations.conftest as ablations
import transact
from bench import environment
from bench.efficiency import costs, speed
from bench.quality.zero_shot import evaluate_tasks
from bench.suite.cluster import measured
from tests.test_records import record
from tests.tiny import NARROWING, random_plan, scores_of, tiny_llama
from transact import timing
from transact.__main__ import main
from transact.calibration import Moments
from transact.devices import resolve_device
from transact.gradients import free_memory
from transact.recovery import WAYS, trainer

DENSE = tiny_llama("gqa")
WINDOWS = torch.randint(1, 97, (16, 16), generator=torch.Generator().manual_seed(0))
TRAINING = transact.Training(tokens=8 * 16, way="full", learning_rate=1e-2, batch=4)


def narrowed() -> torch.nn.Module:
    return transact.apply_plan(DENSE, random_plan(DENSE.config))


@pytest.fixture
def two_gpus(monkeypatch):
    """A CUDA that says it has two devices and lets `torch.cuda.device` choose one; it holds no tensors."""
    current = [0]

    @contextmanager
    def device(chosen):
        before, current[0] = current[0], torch.device(chosen).index or 0
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: current.__setitem__(0, torch.device(chosen).index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    return current


def test_the_random_state_of_every_gpu_is_put_back(monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put_back.append((device, state)))
    transact.recover(narrowed(), WINDOWS, TRAINING)
    assert put_back == [(0, "state of 0"), (1, "state of 1")]


@pytest.mark.parametrize(("rank", "index"), [("0", 0), ("1", 1), ("3", 1)])
def test_a_process_under_a_launcher_has_a_device_of_its_own(two_gpus, monkeypatch, rank, index):
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", index)
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_model_is_trained_where_it_lies(two_gpus, monkeypatch, tmp_path):
    model = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # transformers would ask it more than it can say
    arguments = trainer._arguments(model, replace(TRAINING, bf16=False), tmp_path, saves=False)
    assert arguments.device == Accelerator().device == torch.device("cuda:1")
    assert two_gpus == [1]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_teacher_is_never_moved(monkeypatch):
    teacher = tiny_llama("gqa")

    def moved(*arguments, **options):
        raise AssertionError("the teacher was moved")

    monkeypatch.setattr(teacher, "to", moved)
    transact.recover(narrowed(), WINDOWS, replace(TRAINING, way="distillation"), teacher=teacher)


@pytest.mark.gpu
@pytest.mark.parametrize("layer_weight", [0.0, 1.0])
def test_a_teacher_on_the_host_teaches_a_model_on_a_gpu(layer_weight):
    changes = {"way": "distillation", "layer_weight": layer_weight, "bf16": False}
    training = replace(TRAINING, **changes)
    expected = transact.recover(narrowed(), WINDOWS, training, teacher=tiny_llama("gqa")).model
    teacher = tiny_llama("gqa")
    model = transact.recover(narrowed().to("cuda"), WINDOWS, training, teacher=teacher).model
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    for name, tensor in model.cpu().state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_seconds_are_those_of_the_device_that_is_asked_for(two_gpus, monkeypatch):
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            recorded.append(two_gpus[0])

        def elapsed_time(self, end):
            return 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timing.seconds_of(lambda: None, torch.device("cuda:1")) == 2
    assert recorded == [1, 1]
    assert two_gpus == [0]


def moved(value, device: str):
    """Statistics or gradients with all their tensors on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    if isinstance(value, dict):
        return {name: moved(one, device) for name, one in value.items()}
    if isinstance(value, Moments | transact.LayerStatistics | transact.LayerGradients):
        return type(value)(**{name: moved(one, device) for name, one in vars(value).items()})
    return value


def statistics_of(model, criterion: str, device: torch.device | None = None) -> transact.Statistics:
    gradients = next((of for of in ("outputs", "weights") if of in transact.CRITERIA[criterion].needs), None)
    return transact.calibrate(model, WINDOWS, second_moments=True, gradients=gradients, device=device)


@pytest.mark.parametrize("criterion", sorted(set(transact.CRITERIA) - {"random", "magnitude"}))
def test_statistics_may_lie_on_another_device_than_the_weights(criterion, monkeypatch):
    # it looks at numbers, which "meta" has none of: what it is given must be on one device
    monkeypatch.setattr("transact.obs.greedy_losses", lambda readers, moments, tokens: (
        moments[..., 0, :] + readers.sum(dim=-2)
    ))  # fmt: skip
    one, statistics = transact.CRITERIA[criterion], statistics_of(DENSE, criterion).layers[0]
    expected = one.score(DENSE.model.layers[0], 0, statistics)
    scores = one.score(DENSE.model.layers[0], 0, moved(statistics, "meta"))
    for name in ("rope_pairs", "value_dims", "mlp_dims"):
        assert getattr(scores, name).device.type == "meta"
        assert getattr(scores, name).shape == getattr(expected, name).shape


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "block by block"])
@pytest.mark.parametrize("criterion", sorted(transact.CRITERIA))
def test_scores_of_a_device_are_those_of_the_cpu(criterion, is_whole, device):
    one = transact.CRITERIA[criterion]
    model = tiny_llama("gqa").to(device) if is_whole else DENSE
    statistics = statistics_of(model, criterion, None if is_whole else device)
    assert statistics.layers[0].mlp.device.type == device.type
    expected = statistics_of(DENSE, criterion)
    for index in range(2):
        scores = one.score(model.model.layers[index], index, statistics.layers[index])
        wanted = one.score(DENSE.model.layers[index], index, expected.layers[index])
        for name in ("rope_pairs", "value_dims", "mlp_dims", "kv_heads"):
            found, right = getattr(scores, name).cpu(), getattr(wanted, name)
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning", "ignore:ratio .* of 2 layers")
@pytest.mark.parametrize("preset", sorted(transact.PRESETS))
def test_every_preset_prunes_on_the_device(preset, device):
    pruned = transact.prune(tiny_llama("gqa").to(device), WINDOWS.to(device), recipe=preset, ratio=0.3)
    assert {parameter.device.type for parameter in pruned.model.parameters()} == {device.type}
    expected = transact.prune(DENSE, WINDOWS, recipe=preset, ratio=0.3)
    found, wanted = (transact.fraction_removed(DENSE.config, one.plan.widths) for one in (pruned, expected))
    assert found == pytest.approx(wanted, abs=0.02)
    with torch.no_grad():
        logits = pruned.model(input_ids=WINDOWS.to(device)).logits
        torch.testing.assert_close(pruned.model.cpu()(input_ids=WINDOWS).logits, logits.cpu(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_on_the_device(way, device):
    training = replace(TRAINING, tokens=3 * 16 * 16, way=way, rank=4 if way.startswith("lo") else None)
    recovered = transact.recover(narrowed().to(device), WINDOWS, training, teacher=tiny_llama("gqa"))
    losses = [row["loss"] for row in recovered.history if "loss" in row]
    if training.is_zeroth_order():  # a few steps along a few directions show nothing in the loss
        assert all(map(math.isfinite, losses))
        assert not torch.equal(recovered.model.lm_head.weight.cpu(), narrowed().lm_head.weight)
    else:
        assert min(losses[len(losses) // 2 :]) < losses[0]
    assert {(parameter.device.type, parameter.dtype) for parameter in recovered.model.parameters()} == {
        (device.type, torch.float32)
    }


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
@pytest.mark.parametrize("recipe", [*NARROWING, transact.Recipe("obs", compensation="dense"),
                                    replace(transact.PRESETS["best"], engine="plain")], ids=str)  # fmt: skip
def test_statistics_of_a_gpu_prune_a_model_on_the_host(recipe):
    recipe = transact.PRESETS.get(recipe, recipe)
    options = {"second_moments": True, "gradients": recipe.gradients()}
    statistics = transact.calibrate(DENSE, WINDOWS, device=torch.device("cuda"), **options)
    assert statistics.layers[0].mlp.is_cuda
    pruned = transact.prune(DENSE, WINDOWS, recipe=recipe, ratio=0.3, statistics=statistics)
    expected = transact.prune(DENSE, WINDOWS, recipe=recipe, ratio=0.3)
    assert pruned.plan.widths == expected.plan.widths
    layers = [layer if index else moved(layer, "cpu") for index, layer in enumerate(statistics.layers)]
    assert transact.prune(DENSE, WINDOWS, recipe=recipe, ratio=0.3,
                          statistics=transact.Statistics(tuple(layers), statistics.tokens)).plan.widths  # fmt: skip


def test_a_model_that_is_spread_over_devices_takes_no_device():
    dense = tiny_llama("gqa")
    dense.hf_device_map = {"model": 0, "lm_head": 1}
    device = torch.device("cpu")
    for work in (
        lambda: transact.prune(dense, WINDOWS, device=device),
        lambda: transact.calibrate(dense, WINDOWS, device=device),
        lambda: transact.loss_gradients(dense, WINDOWS, device=device),
    ):
        with pytest.raises(ValueError, match="device 'cpu' is for a model in one place, this one is spread over 0, 1"):
            work()


def trainers() -> list:
    return [one for one in gc.get_objects() if type(one).__name__ == "_RecoveryTrainer"]


def test_nothing_of_a_training_is_left():
    gc.collect()
    gc.disable()
    try:
        transact.recover(narrowed(), WINDOWS, TRAINING)
        assert not trainers()
    finally:
        gc.enable()


def test_the_moments_of_a_training_that_fails_are_not_kept_by_its_error():
    def stop(model):
        if stop.calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        stop.calls += 1
        return {}

    stop.calls = 0
    with pytest.raises(torch.OutOfMemoryError):
        transact.recover(narrowed(), WINDOWS, TRAINING, evaluate=stop)
    assert all(not one.optimizer.state for one in trainers())
    gc.collect()


class Tensors:
    """Stands for what fills a device; part of a reference cycle."""

    def __init__(self):
        self.own = self


class FullBench:
    """A workbench whose cell fills the device."""

    dense = SimpleNamespace(device=torch.device("cpu"))

    def measure(self, case):
        tensors = Tensors()
        self.kept = weakref.ref(tensors)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def environment(self):
        return {}


def test_a_cell_that_ran_out_of_memory_leaves_none_of_its_tensors(monkeypatch):
    bench, case, written = FullBench(), record().case, []
    outcome = measured(bench, case)
    assert outcome.error == "OutOfMemoryError: CUDA out of memory"
    assert bench.kept() is None
    monkeypatch.setattr(ablations, "append", lambda run, outcome: written.append(outcome.status))
    capture = SimpleNamespace(global_and_fixture_disabled=warnings.catch_warnings)
    config = SimpleNamespace(stash={ablations.RUN: SimpleNamespace(workbench=bench)},
                             pluginmanager=SimpleNamespace(getplugin=lambda name: capture))  # fmt: skip
    with pytest.raises(pytest.fail.Exception, match="out of memory") as failure:
        ablations.measure_here(config, {})(case)
    assert failure.value.__context__ is None
    assert bench.kept() is None
    assert written == ["failed"]


def test_memory_that_torch_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_memory(torch.device("cuda")) == 140


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_model_trained_in_bfloat16_computes_as_its_weights_loaded_again(way, tmp_path):
    model = narrowed()
    for _ in range(2):  # the second training is in bfloat16 as well
        recovered = transact.recover(model, WINDOWS, replace(TRAINING, way=way, bf16=True))
        model = recovered.model
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys()
    model.save_pretrained(tmp_path)
    again = transact.TransActForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(input_ids=WINDOWS).logits, again.eval()(input_ids=WINDOWS).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_every_cell_is_compiled_with_the_sizes_that_it_has(tmp_path, tiny_directory, monkeypatch):
    sizes, compile = [], torch.compile

    def backend(graph, inputs):
        sizes.extend(type(size) for one in inputs if isinstance(one, torch.Tensor) for size in one.shape)
        sizes.extend(type(one) for one in inputs if not isinstance(one, torch.Tensor))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, mode, **options: compile(step, backend=backend, **options))
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: costs.Roofline(1e9, 1e9))
    options = {"lengths": ((8, 2),), "batches": (1, 2), "modes": ("graphs",), "dtype": "float32", "device": "cpu"}
    records = list(speed.run_grid([str(tiny_directory)], repeats=1, **options))
    assert [one.get("error") for one in records] == [None] * 2
    assert set(sizes) == {int}


def test_a_grid_without_graphs_resets_no_compiler(tiny_directory, monkeypatch):
    def warned():
        raise DeprecationWarning("inductor's own")

    monkeypatch.setattr(torch.compiler, "reset", warned)
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: costs.Roofline(1e9, 1e9))
    options = {"lengths": ((8, 2),), "dtype": "float32", "device": "cpu", "repeats": 1}
    assert [one["status"] for one in speed.run_grid([str(tiny_directory)], **options)] == ["success"]


def test_a_roofline_that_finds_no_memory_is_recorded(tiny_directory, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(speed, "measure_roofline", full)
    options = {"lengths": ((8, 2), (16, 2)), "dtype": "float32", "device": "cpu", "repeats": 1}
    assert [one["status"] for one in speed.run_grid([str(tiny_directory)], **options)] == ["out of memory"] * 2


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        ([], "--layerwise keeps one block at a time on the device"),
        (["--layerwise"], "fewer --samples and a smaller --seq-len need less"),
        (
            ["--speedup", "1.3"],
            "a smaller --speed-batch and --speed-context need less, and --ratio instead of --speedup",
        ),
        (["--tokens", "100"], "a smaller --device-batch, --gradient-checkpointing and --way lora or lozo need less"),
    ],
)
def test_a_command_out_of_memory_names_its_own_options(more, advice, tiny_directory, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr("transact.commands.prune.load_model", full)
    monkeypatch.setattr("bench.__main__.load_model", full)
    assert main(["prune", str(tiny_directory), str(tmp_path / "out"), *more]) == 1
    assert capsys.readouterr().err == f"transact: error: CUDA out of memory.; {advice}\n"
    from bench.__main__ import main as bench_main

    assert bench_main(["memory", str(tiny_directory)]) == 1
    assert capsys.readouterr().err == "bench: error: CUDA out of memory.\n"


def test_tasks_out_of_memory_are_no_mistake_of_the_user(tiny_directory, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bench.quality.zero_shot._evaluate", full)
    model, tokenizer = transact.load_model(tiny_directory, device="cpu")
    with pytest.raises(torch.OutOfMemoryError):
        list(evaluate_tasks(model, tokenizer, {"task": None}))


def test_a_card_that_emulates_bfloat16_computes_in_float32(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.warns(UserWarning, match="Tesla T4 is too old for bfloat16: float32 is used instead"):
        assert environment.fast_dtype("auto") == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: two_gpus[0] == 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.fast_dtype("auto") == "bfloat16"  # the device that is used is asked
    assert math.isfinite(scores_of(DENSE, "magnitude")[0].mlp_dims.sum())
