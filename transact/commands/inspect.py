"""`transact inspect`: print widths, parameters and KV bytes per token of a checkpoint."""

import argparse
from pathlib import Path

import torch
import transformers

from ..checkpoint import read_pruning
from ..models import read_config
from ..widths import fraction_removed, kv_elements_per_token, widths_of
from .parser import add_subcommand


def add_command(commands: argparse._SubParsersAction) -> None:
    description = "print widths, parameters and KV bytes per token of a checkpoint"
    parser = add_subcommand(commands, "inspect", run, description, "DIRECTORY")
    parser.add_argument("directory", help="a checkpoint directory, pruned or dense")


def run(options: argparse.Namespace) -> None:
    config = read_config(options.directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    widths = widths_of(config)
    size = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    columns = ("layer", "kv heads", "qk head dim", "v head dim", "mlp", "parameters", "kv bytes/token")
    rows = [
        (index, w.kv_heads, w.qk_head_dim, w.v_head_dim, w.mlp, _parameters(layer), kv_elements_per_token([w]) * size)
        for index, (w, layer) in enumerate(zip(widths, model.model.layers, strict=True))
    ]
    rows.append(("all", "", "", "", "", _parameters(model), kv_elements_per_token(widths) * size))
    column_widths = [max(len(str(row[i])) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, column_widths, strict=True)))
    print(
        f"{_fraction_removed(options.directory, config):.1%} of the linear parameters of {len(widths)} decoder layers "
        f"removed; 'all' counts embeddings and norms too; bytes at {str(config.dtype).removeprefix('torch.')}"
    )


def _fraction_removed(directory: str, config: transformers.PretrainedConfig) -> float:
    """As `pruning.json` says, which knows the dense model; else as the configuration does."""
    if (Path(directory) / "pruning.json").is_file():
        return read_pruning(directory)["fraction_removed"]
    return fraction_removed(config, widths_of(config))


def _parameters(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
