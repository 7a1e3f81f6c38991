"""`python -m bench`: measure a model; the last line printed is one JSON object."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from transact.__main__ import OneLineParser, add_model_options, run_command
from transact.inputs import TEXTS, cut_windows, load_model, load_text, tokenise

from .memory import kv_bytes_per_token, peak_memory_mib, weight_bytes
from .perplexity import measure_perplexity


def perplexity_command(options: argparse.Namespace) -> None:
    text = load_text(options.text, split="evaluation")
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    windows = cut_windows(tokenise(text, tokenizer), length=options.seq_len, count=options.windows)
    result = dataclasses.asdict(measure_perplexity(model, tokenizer, windows, progress=True))
    del result["losses"]
    print(json.dumps({
        "model": options.model, "text": text.name, "sha256": text.sha256, "windows": len(windows),
        "seq_len": options.seq_len, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        **result,
    }))  # fmt: skip


def memory_command(options: argparse.Namespace) -> None:
    model, _ = load_model(options.model, dtype=options.dtype, device=options.device)
    print(json.dumps({
        "model": options.model, "parameters": model.num_parameters(), "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": kv_bytes_per_token(model), "peak_memory_mib": round(peak_memory_mib(model.device), 1),
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
    }))  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    perplexity = commands.add_parser("perplexity", help="perplexity and bits per byte on a text")
    perplexity.set_defaults(run=perplexity_command)
    perplexity.add_argument("--text", default="embedded", help=f"{', '.join(TEXTS)} or a text file (embedded)")
    perplexity.add_argument("--seq-len", type=int, default=256, help="tokens of a window (256)")
    perplexity.add_argument("--windows", type=int, help="the first N windows (all of the text)")
    memory = commands.add_parser("memory", help="parameters, weight bytes, KV bytes per token, peak memory")
    memory.set_defaults(run=memory_command)
    for command in (perplexity, memory):
        command.add_argument("model", help="smollm2-135m (embedded), a checkpoint directory or a Hugging Face id")
        add_model_options(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 2 for a mistake of the user's."""
    return run_command(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
