"""`transact export`: write a pruned checkpoint for tools that know only plain Llamas."""

import argparse
import json
from collections.abc import Iterable

from transformers import PretrainedConfig

from .. import __version__
from ..checkpoint import EXPORTED, all_or_nothing, check_export_destination, save_model
from ..export import (
    FORMATS,
    GGUF_TYPES,
    architecture_of,
    check_exportable,
    check_tokenizer,
    llama_by_layer,
    plain_llama,
    write_gguf,
)
from ..models import load_model, read_config
from ..widths import fraction_removed, widths_of
from .parser import add_output_options, add_subcommand


def add_command(commands: argparse._SubParsersAction) -> None:
    description = "write a pruned checkpoint for tools that know only plain Llamas"
    parser = add_subcommand(commands, "export", run, description, "DIRECTORY OUT")
    parser.add_argument("directory", help="a pruned checkpoint directory")
    parser.add_argument("out", help="what to write: a directory (llama) or a file (gguf); must not exist")
    what = parser.add_argument_group("format")
    what.add_argument("--format", metavar="NAME", choices=FORMATS, default="llama",
                      help="llama: a checkpoint of LlamaForCausalLM; gguf: a file for llama.cpp (llama)")  # fmt: skip
    what.add_argument("--type", metavar="NAME", choices=[*GGUF_TYPES],
                      help=f"of matrices in a GGUF file: {', '.join(GGUF_TYPES)} (f16)")  # fmt: skip
    what.add_argument("--pad", action="store_true", help="pad with zeros up to the widest layer, whatever it costs")
    add_output_options(parser, "replace what was exported to OUT")


def run(options: argparse.Namespace) -> None:
    if options.type is not None and options.format != "gguf":
        raise ValueError("--type is for --format gguf: a checkpoint keeps the dtype of the model")
    out = check_export_destination(options.out, options.format, overwrite=options.overwrite)
    check_exportable(read_config(options.directory), options.format)
    model, tokenizer = load_model(options.directory, device="cpu")
    if options.format == "gguf":
        check_tokenizer(tokenizer, model)
    stated = (llama_by_layer if options.format == "gguf" else plain_llama)(model, pad=options.pad)
    pruned, size = fraction_removed(model.config, widths_of(model.config)), stated.num_parameters()
    extra = size - model.num_parameters()
    with all_or_nothing(out) as partial:
        if options.format == "gguf":
            write_gguf(partial, stated, tokenizer, kind=options.type or "f16")
        else:
            save_model(stated, partial)
            tokenizer.save_pretrained(partial)
            origin = {"from": options.directory, "transact": __version__, "zeros_added": max(0, extra)}
            (partial / EXPORTED).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    print(
        f"{out}: {size:,} parameters ({pruned:.1%} of the linear ones removed"
        f"{f', {extra:,} zeros added' if extra > 0 else ''}), {_widths(stated.config)}"
        f"{f', architecture {architecture_of(stated.config)!r}' if options.format == 'gguf' else ''}"
    )


def _widths(config: PretrainedConfig) -> str:
    """Heads and MLP in words, from the narrowest layer to the widest."""

    def span(values: Iterable[int]) -> str:
        return " to ".join(map(str, sorted({min(values := [*values]), max(values)})))

    widths, group = widths_of(config), config.num_attention_heads // config.num_key_value_heads
    return (
        f"{span(group * of.kv_heads for of in widths)} heads of {span(of.qk_head_dim for of in widths)}, "
        f"MLP {span(of.mlp for of in widths)}"
    )
