"""What is handed to `prune` and `recover` is checked before the long work, and the caller's own settings stay."""

import copy
import random

import numpy as np
import pytest
import torch

import transact
from tests.tiny import tiny_llama
from transact.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(3))
TRAINING = transact.Training(tokens=96, batch=2, learning_rate=1e-3, bf16=False, way="full")
WHOLE = transact.dense_widths(tiny_llama().config)
MAGNITUDE = transact.Recipe(criterion="magnitude")


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr("transact.pipeline._in_shots", lambda *_: pytest.fail("the work has begun"))


def widths(**changes) -> list[transact.Widths]:
    return [WHOLE[0], transact.Widths(**vars(WHOLE[1]) | changes)]


REFUSED = {
    "too few widths": ({"widths": WHOLE[:1]}, r"widths must be one Widths a layer, 2 of them"),
    "no widths": ({"widths": []}, r"widths must be one Widths a layer, 2 of them"),
    "numbers": ({"widths": [3, 4]}, r"widths must be one Widths a layer, 2 of them"),
    "too many heads": ({"widths": widths(kv_heads=3)}, r"layer 1: kv_heads must lie between 1 and 2, got 3"),
    "no heads": ({"widths": widths(kv_heads=0)}, r"layer 1: kv_heads must lie between 1 and 2, got 0"),
    "half a dimension": ({"widths": widths(mlp=3.5)}, r"layer 1: mlp must lie between 1 and 40, got 3\.5"),
    "a wide MLP": ({"widths": widths(mlp=41)}, r"layer 1: mlp must lie between 1 and 40, got 41"),
    "half a pair": ({"widths": widths(qk_head_dim=7)}, r"layer 1: qk_head_dim must be even, got 7"),
    "widths that differ": ({"widths": widths(v_head_dim=8), "recipe": "transact-released"}, "same head width in every"),
    "text": ({"ratio": "0.2"}, r"ratio is the fraction removed and must lie in \[0, 1\), got '0\.2'"),
    "no recipe": ({"recipe": None}, r"recipe must be a Recipe or one of best, transact, .*, got None"),
    "a class": ({"recipe": transact.Recipe}, r"recipe must be a Recipe or one of"),
    "a seed between": ({"seed": 1.5}, r"seed must be a whole number .*, got 1\.5"),
    "a huge seed": ({"seed": 2**70}, "seed must be a whole number"),
    "no device": ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
    "statistics of another model": (
        {"statistics": transact.calibrate(tiny_llama("mha"), WINDOWS), "recipe": "transact"}, "are not of this model",
    ),
    "statistics of fewer layers": (
        {"statistics": transact.calibrate(tiny_llama(layers=1), WINDOWS), "recipe": "transact"},
        "are not of this model",
    ),
    "statistics without moments": (
        {"statistics": transact.calibrate(tiny_llama(), WINDOWS)}, "statistics hold no second moments",
    ),
    "statistics without gradients": (
        {"statistics": transact.calibrate(tiny_llama(), WINDOWS, second_moments=True)}, "statistics hold no gradients",
    ),
    "windows that hold nothing": ({"windows": WINDOWS.to("meta")}, "windows hold no numbers"),
    "sparse windows": ({"windows": WINDOWS.to_sparse()}, "windows hold no numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("no_work")
def test_arguments_that_do_not_fit_are_refused_before_work(case):
    arguments, named = REFUSED[case]
    with pytest.raises(ValueError, match=named):
        transact.prune(tiny_llama(), **{"windows": WINDOWS} | arguments)


def test_widths_of_query_key_norms_are_refused_before_work(no_work):
    from tests.tiny import tiny_relative

    with pytest.raises(ValueError, match="normalised head by head"):
        transact.prune(tiny_relative("qwen3"), WINDOWS, widths=widths(qk_head_dim=8))


def test_widths_may_come_one_by_one_and_a_device_by_name():
    chosen = [transact.Widths(2, 8, 8, 16)] * 2
    for recipe in ("transact", MAGNITUDE):
        pruned = transact.prune(tiny_llama(), WINDOWS, recipe=recipe, widths=iter(chosen), device="cpu")
        assert pruned.plan.widths == tuple(chosen)


@pytest.fixture(scope="module")
def narrowed():
    return transact.prune(tiny_llama(), recipe=MAGNITUDE, ratio=0.3).model


def test_recovery_keeps_frozen_weights_and_says_where_all_are(narrowed):
    model = copy.deepcopy(narrowed)
    model.model.embed_tokens.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    trained = transact.recover(model, WINDOWS, TRAINING).model
    assert torch.equal(trained.model.embed_tokens.weight, before)
    assert not torch.equal(trained.lm_head.weight, narrowed.lm_head.weight)
    assert [name for name, one in trained.named_parameters() if not one.requires_grad] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"all weights are frozen \(requires_grad\)"):
        transact.recover(copy.deepcopy(narrowed).requires_grad_(False), WINDOWS, TRAINING)


def test_recovery_leaves_random_numbers_as_they_were(narrowed):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    transact.recover(copy.deepcopy(narrowed), WINDOWS, TRAINING)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("seed", [2**32, 2**70])
def test_seeds_that_no_generator_takes_are_refused_before_work(seed, tiny_directory, tiny_text, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"seed must be a whole number between 0 and 4294967295, got"):
        transact.Training(tokens=96, seed=seed).check()
    command = ["prune", str(tiny_directory), str(tmp_path / "out"), "--calibration", str(tiny_text)]
    assert main([*command, "--seed", str(seed)]) == 2
    assert "seed must be a whole number between 0 and 4294967295" in capsys.readouterr().err


def test_a_torn_plan_is_refused_in_one_line(tmp_path, narrowed):
    (tmp_path / "plan.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match=r"plan\.safetensors' cannot be read"):
        transact.load_plan(tmp_path)


def test_a_type_is_for_gguf(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--type", "q8_0"]) == 2
    assert "--type is for --format gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ratio", "0.99"], "out of reach"), (["--kv-ratio", "0.99"], "out of reach"),
        (["--modules", "qk,nonsense"], "modules must name some of"),
        (["--granularity", "heads", "--modules", "qk,mlp"], "name both modules or neither"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_windows_are_sampled(
    options, named, tiny_directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("transact.commands.prune.calibration_sources", lambda *_, **__: pytest.fail("samples"))
    assert main(["prune", str(tiny_directory), str(tmp_path / "out"), "--device", "cpu", *options]) == 2
    assert named in capsys.readouterr().err
