"""What checkpoints say and how fast in vLLM's server, many requests at a time, beside each other and transformers."""

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transact.models import EMBEDDED_MODEL, embedded_model_directory, load_model, load_tokenizer, read_config

from .continuations import NEW_TOKENS, agreement, greedy, prompts_of, transformers_stream
from .vllm_server import Server, ask, ask_together, check_port, vllm_server, vllm_version


def served_rows(
    models: Sequence[str],
    python: str | os.PathLike,
    logs: Path,
    *,
    requests: Sequence[int] = (1, 4, 16),
    rounds: int = 3,
    dtype: str = "float32",
    port: int | None = None,
    start_seconds: float = 600,
    options: Sequence[str] = (),
) -> list[dict]:
    """A row for each model and number of requests at a time, the models asked in turn, in `rounds` of which the median
    counts.

    `tokens_per_s` counts all requests together, `first_token_ms` is the median of a request, `same_tokens` the
    agreement with transformers. Every server runs meanwhile. Raises ValueError, before anything long, where a model is
    not there or vLLM is not installed, and later where a server fails.
    """
    engine = vllm_version(python)
    for index, model in enumerate(models):
        read_config(model)
        if port:
            check_port(port + index)
    directories = [embedded_model_directory() if model == EMBEDDED_MODEL else Path(model) for model in models]
    if missing := [str(directory) for directory in directories if not directory.is_dir()]:
        raise ValueError(f"model {missing[0]!r} is no directory: vLLM's server reads one")
    prompts = prompts_of(load_tokenizer(models[0]))
    with ExitStack() as stack:
        servers = []
        for index, directory in enumerate(directories):
            server = vllm_server(
                python, directory, logs / f"served-{index}.log", dtype=dtype, port=port and port + index,
                start_seconds=start_seconds, options=options,
            )  # fmt: skip
            servers.append(stack.enter_context(server))
        said = [[ask(server, prompt, NEW_TOKENS).token_ids for prompt in prompts] for server in servers]
        speeds = speeds_in_turn(servers, prompts, requests, rounds)
    rows = []
    for index, model in enumerate(models):
        expected, _ = greedy(_stream_of(model, dtype), prompts)
        for count in requests:
            rate, first = (statistics.median(values) for values in zip(*speeds[index, count], strict=True))
            rows.append({
                "model": Path(model).name, "engine": engine, "dtype": dtype, "requests": count, "tokens_per_s": rate,
                "first_token_ms": 1000 * first, "same_tokens": agreement(expected, said[index]),
            })  # fmt: skip
    return rows


def speeds_in_turn(
    servers: Sequence[Server], prompts: Sequence[list[int]], requests: Sequence[int], rounds: int
) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """By server and number of requests: of each round the tokens per second and the median seconds to a first token.

    Servers take turns in every round, so that what else the machine does meanwhile meets all of them.
    """
    speeds = {(index, count): [] for index in range(len(servers)) for count in requests}
    for turn in range(rounds + 1):
        for count in requests:
            asked = [prompts[index % len(prompts)] for index in range(count)]
            for index, server in enumerate(servers):
                answers, seconds = ask_together(server, asked, NEW_TOKENS)
                if turn:  # the first round warms up
                    first = statistics.median(answer.first_s for answer in answers)
                    speeds[index, count].append((count * NEW_TOKENS / seconds, first))
    return speeds


def _stream_of(model: str, dtype: str) -> Callable[[list[int]], Iterator[int]]:
    return partial(transformers_stream, load_model(model, dtype=dtype, device="cpu")[0])
