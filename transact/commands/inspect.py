"""`transact inspect`: print widths, parameters and KV bytes per token of a checkpoint, and which engines hold it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from .. import configuration_transact, modeling_transact
from ..checkpoint import fraction_removed_of, pruned_from
from ..configuration_transact import TransActConfig
from ..engines import ENGINES, check_held
from ..entry import counted, in_one_line
from ..export import check_exportable, check_tokenizer
from ..models import load_tokenizer, read_config
from ..plan import kept_layers_of
from ..widths import kv_elements_per_token, widths_of
from .parser import add_subcommand


def add_command(commands: argparse._SubParsersAction) -> None:
    description = "print widths, parameters and KV bytes per token of a checkpoint, and which engines hold it"
    parser = add_subcommand(commands, "inspect", run, description, "DIRECTORY")
    parser.add_argument("directory", help="a checkpoint directory, pruned or dense")


def run(options: argparse.Namespace) -> None:
    config = read_config(options.directory)
    removed = fraction_removed_of(options.directory, config)
    pairs, widths = _rope_pairs(options.directory), widths_of(config)
    attentions = sum(one.has_attention for one in widths)
    if config.model_type == TransActConfig.model_type and len(pairs) < attentions:
        raise ValueError(
            f"{options.directory!r} has the RoPE pairs of {len(pairs)} of {counted(attentions, 'layer')}: its "
            "*.safetensors are not all there"
        )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
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
    for module, is_there in (("attention", "has_attention"), ("an MLP", "has_mlp")):
        if dropped := [layer for layer, one in enumerate(widths) if not getattr(one, is_there)]:
            print(f"without {module}, which was dropped: {layers_in_words(dropped)}")
    kept = kept_layers_of(config)
    if kept is not None:
        print(f"{layers_in_words(kept)} of the dense model")
    of = counted(len(widths), "decoder layer")
    if kept:  # of a model that may have lost layers before
        of = f"the decoder layers of {pruned_from(options.directory) or 'the dense model'}"
    print(
        f"{removed:.1%} of the linear parameters of {of} "
        f"removed; 'all' counts embeddings and norms too; bytes at {str(config.dtype).removeprefix('torch.')}"
    )
    against = {name: _against(name, options.directory, model, pairs) for name in ENGINES}
    print(f"held by {', '.join(name for name, reason in against.items() if reason is None)}")
    for name, reason in against.items():
        if reason is not None:
            print(f"not by {name}: {reason}")
    for module in (configuration_transact, modeling_transact):
        ours = Path(module.__file__)
        theirs = Path(options.directory, ours.name)
        if theirs.exists() and theirs.read_text(encoding="utf-8") != ours.read_text(encoding="utf-8"):
            print(f"{ours.name} is not this version's and serves where TransAct is not installed: replace it by {ours}")


def layers_in_words(layers: Sequence[int]) -> str:
    """ "layer 3", or of several, in ascending order, those in a row by their ends: "layers 0 to 9, 12"."""
    rows = []
    for layer in layers:
        if rows and layer == rows[-1][1] + 1:
            rows[-1][1] = layer
        else:
            rows.append([layer, layer])
    numbers = ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in rows)
    return f"layer{'s' * (len(layers) > 1)} {numbers}"


def _rope_pairs(directory: str) -> list[torch.Tensor]:
    """The RoPE pairs that each layer of a pruned checkpoint keeps; none of a dense one, which keeps all."""
    pairs = []
    for path in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as weights:
                names = [name for name in weights.keys() if name.endswith("self_attn.rope_pairs")]  # noqa: SIM118
                pairs += [weights.get_tensor(name) for name in names]
        except Exception as error:  # safetensors has an error of its own
            raise ValueError(f"{str(path)!r} cannot be read: {in_one_line(error)}") from error
    return pairs


def _against(engine: str, directory: str, model: torch.nn.Module, pairs: list[torch.Tensor]) -> str | None:
    """Why an engine cannot hold a checkpoint, in one line; None where it can."""
    try:
        if (format := ENGINES[engine].format) is not None:
            check_exportable(model.config, format)
        check_held(engine, widths_of(model.config), pairs)
        if format == "gguf":
            check_tokenizer(load_tokenizer(directory), model)
    except ValueError as error:
        return str(error)
    return None


def _parameters(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
