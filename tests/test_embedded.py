"""The embedded model and text: what they are, and that pruning by activations is worth it."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

import transact
from bench.quality.perplexity import Windows, measure_perplexity
from tests.test_measures import independent_loss


def test_embedded_text_is_disjoint_and_the_same_every_time():
    calibration = transact.load_text("embedded", split="calibration")
    evaluation = transact.load_text("embedded", split="evaluation")
    assert calibration.sha256 == transact.load_text("embedded", split="calibration").sha256
    assert len(calibration.content) > 2_000_000
    assert len(evaluation.content) > 500_000
    paragraphs = {piece for piece in calibration.content.split("\n\n") if len(piece) > 200}
    shared = [piece for piece in evaluation.content.split("\n\n") if len(piece) > 200 and piece in paragraphs]
    assert shared == []


def test_windows_are_chosen_by_the_seed():
    tokens = torch.arange(1000)
    first, again, other = (transact.cut_windows(tokens, length=10, count=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.diff(dim=1) == 1).all()
    assert len(first[:, 0].unique()) == 20
    assert torch.equal(transact.cut_windows(tokens, length=10, count=20), tokens[:200].view(20, 10))


@pytest.fixture(scope="module")
def windows(embedded):
    tokens = transact.tokenise(transact.load_text("embedded", split="evaluation"), embedded[1])
    return transact.cut_windows(tokens, length=128, count=16)


@pytest.mark.slow
def test_dense_perplexity_is_what_a_loop_gives(embedded, windows):
    model, _ = embedded
    few = windows[:2].to(model.device)
    result = measure_perplexity(model, Windows.of_blocks(few))
    assert result.loss == pytest.approx(independent_loss(model, few), rel=1e-5)
    assert math.isclose(result.perplexity, math.exp(result.loss))


@pytest.mark.slow
def test_activation_beats_magnitude_and_random_by_far(embedded, windows):
    model, tokenizer = embedded
    text = transact.tokenise(transact.load_text("embedded"), tokenizer)
    calibration = transact.cut_windows(text, length=128, count=64, seed=0)
    evaluation = Windows.of_blocks(windows)
    dense = measure_perplexity(model, evaluation).perplexity
    times_dense = {}
    for criterion in ("activation", "magnitude", "random"):
        recipe = transact.Recipe(criterion=criterion)
        narrowed = transact.prune(model, calibration, ratio=0.2, recipe=recipe).model
        times_dense[criterion] = measure_perplexity(narrowed, evaluation).perplexity / dense
    assert times_dense["activation"] < 2
    assert min(times_dense["magnitude"], times_dense["random"]) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_the_readme_example_runs(embedded, tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert "count=64, length=256" in example
    fewer = example.replace("count=64, length=256", "count=8, length=64")  # sampling takes minutes on a CPU
    (tmp_path / "example.py").write_text(fewer)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("example.py")
    assert isinstance(names["pruned"].model, transact.TransActForCausalLM)
