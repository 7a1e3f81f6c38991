"""vLLM, where `nox -s vllm` has installed it, says what transformers says, by its own layers and by transformers'."""

import importlib
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import transact
from bench.efficiency.continuations import transformers_stream
from bench.efficiency.vllm_server import ENVIRONMENT, ask_together, vllm_server
from tests.tiny import random_plan, tiny_llama, tiny_relative
from transact.models import load_tokenizer

ROOT = Path(__file__).parents[1]
ALONE = """
import sys
sys.modules["transact"] = sys.modules["torch"] = None  # any import of them fails
import transact_vllm
"""


def test_the_plugin_is_found_and_names_a_class_without_importing_it(monkeypatch):
    subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, check=True)
    registered = {}
    registry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["transact"].partition(":")
    getattr(importlib.import_module(module), function)()
    [(architecture, place)] = registered.items()
    module, _, name = place.partition(":")
    assert architecture == transact.TransActForCausalLM.__name__
    assert f"class {name}(" in (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")


MODELS = {
    "llama": lambda: tiny_llama("gqa"), "tied": lambda: tiny_llama("tied"), "biases": lambda: tiny_llama("biases"),
    "llama3-rope": lambda: tiny_llama("llama3-rope"),
    **{family: lambda family=family: tiny_relative(family) for family in ("mistral", "qwen2", "qwen3")},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ENVIRONMENT).exists(), reason="`nox -s vllm` has not been run")
@pytest.mark.parametrize("implementation", ["auto", "transformers"])
@pytest.mark.parametrize("name", MODELS)
def test_vllm_says_what_transformers_says(name, implementation, tiny_directory, tmp_path):
    dense = MODELS[name]()
    plan = random_plan(dense.config, drop_heads=True)
    narrowed = transact.apply_plan(dense, plan)
    directory = tmp_path / "out"
    transact.save_checkpoint(directory, narrowed, plan, {}, tokenizer=load_tokenizer(tiny_directory))
    prompts = [[(3 * i + j * j) % 90 + 1 for j in range(20)] for i in range(4)]
    streams = [transformers_stream(narrowed, prompt) for prompt in prompts]
    expected = [[next(stream) for _ in range(24)] for stream in streams]
    options = ["--enforce-eager", "--model-impl", implementation, "--max-model-len", "64"]
    log = tmp_path / "log"
    with vllm_server(ROOT / ENVIRONMENT, directory, log, options=options) as server:
        answers, _ = ask_together(server, prompts, tokens=24)
    assert [answer.token_ids for answer in answers] == expected
    by_transformers = "Using Transformers modeling backend" in log.read_text(encoding="utf-8")
    assert by_transformers == (implementation == "transformers")
