"""vLLM, where `nox -s vllm` has installed it, runs checkpoints as they lie and says what transformers says."""

from pathlib import Path

import pytest

import transact
from bench.efficiency.continuations import transformers_stream
from bench.efficiency.vllm_server import ENVIRONMENT, ask_together, vllm_server
from tests.tiny import random_plan, tiny_llama, tiny_relative
from transact.models import load_tokenizer

ROOT = Path(__file__).parents[1]
MODELS = {
    "llama": lambda: tiny_llama("gqa"), "tied": lambda: tiny_llama("tied"), "biases": lambda: tiny_llama("biases"),
    "llama3-rope": lambda: tiny_llama("llama3-rope"),
    **{family: lambda family=family: tiny_relative(family) for family in ("mistral", "qwen2", "qwen3")},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ENVIRONMENT).exists(), reason="`nox -s vllm` has not been run")
@pytest.mark.parametrize("name", MODELS)
def test_vllm_says_what_transformers_says(name, tiny_directory, tmp_path):
    dense = MODELS[name]()
    plan = random_plan(dense.config, drop_heads=True)
    narrowed = transact.apply_plan(dense, plan)
    directory = tmp_path / "out"
    transact.save_checkpoint(directory, narrowed, plan, {}, tokenizer=load_tokenizer(tiny_directory))
    prompts = [[(3 * i + j * j) % 90 + 1 for j in range(20)] for i in range(4)]
    streams = [transformers_stream(narrowed, prompt) for prompt in prompts]
    expected = [[next(stream) for _ in range(24)] for stream in streams]
    options = ["--enforce-eager", "--max-model-len", "64"]
    log = tmp_path / "log"
    with vllm_server(ROOT / ENVIRONMENT, directory, log, options=options) as server:
        answers, _ = ask_together(server, prompts, tokens=24)
    assert [answer.token_ids for answer in answers] == expected
