"""`transact export`: write a checkpoint for other tools, most of which know only plain Llamas."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig

from .. import __version__
from ..checkpoint import EXPORTED, all_or_nothing, check_export_destination, fraction_removed_of, save_model
from ..entry import counted
from ..export import (
    FORMATS,
    GGUF_TYPES,
    PROGRAM_TYPES,
    architecture_of,
    check_exportable,
    check_tokenizer,
    context_of,
    llama_by_layer,
    plain_llama,
    write_gguf,
    write_program,
)
from ..models import load_model, load_tokenizer, read_config
from ..sparsity import is_sparse
from ..widths import widths_of
from .parser import add_output_options, add_subcommand, tell

TYPES = {"gguf": tuple(GGUF_TYPES), "executorch": PROGRAM_TYPES}  # of numbers in the file, by format


def add_command(commands: argparse._SubParsersAction) -> None:
    description = "write a checkpoint for other tools: those that know only plain Llamas, and phones"
    parser = add_subcommand(commands, "export", run, description, "DIRECTORY OUT")
    parser.add_argument("directory", help="a pruned checkpoint directory; a dense one too for executorch")
    parser.add_argument("out", help="what to write: a directory (llama) or a file (gguf, executorch); must not exist")
    what = parser.add_argument_group("format")
    what.add_argument("--format", metavar="NAME", choices=FORMATS, default="llama",
                      help="llama: a checkpoint of LlamaForCausalLM; gguf: a file for llama.cpp; executorch: a program "
                      "for phones (llama)")  # fmt: skip
    what.add_argument("--type", metavar="NAME", choices=[*dict.fromkeys((*GGUF_TYPES, *PROGRAM_TYPES))],
                      help=f"of matrices in a GGUF file: {', '.join(GGUF_TYPES)} (f16); in a program: "
                      f"{', '.join(PROGRAM_TYPES)} (f32)")  # fmt: skip
    what.add_argument("--context", metavar="N", type=int,
                      help="tokens that a program has room for (1024, at most the model's context)")  # fmt: skip
    what.add_argument("--pad", action="store_true", help="pad with zeros up to the widest layer, whatever it costs")
    add_output_options(parser, "replace what was exported to OUT")


def _check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for an option that the format does not have."""
    if options.type is not None and options.format not in TYPES:
        raise ValueError(f"--type is for --format {' and '.join(TYPES)}: a checkpoint keeps the dtype of the model")
    if options.type is not None and options.type not in TYPES[options.format]:
        allowed = ", ".join(TYPES[options.format])
        raise ValueError(f"--type {options.type} is none of --format {options.format}, allowed: {allowed}")
    if options.context is not None and options.format != "executorch":
        raise ValueError("--context is for --format executorch: other formats keep the context of the model")
    if options.pad and options.format == "executorch":
        raise ValueError("--pad is for other formats: nothing is padded in --format executorch")


def run(options: argparse.Namespace) -> None:
    _check_options(options)
    out = check_export_destination(options.out, options.format, overwrite=options.overwrite)
    if options.format == "executorch":
        _export_program(options, out)
        return
    check_exportable(read_config(options.directory), options.format)
    model, tokenizer = load_model(options.directory, device="cpu")
    if options.format == "gguf":
        check_tokenizer(tokenizer, model)
    stated = (llama_by_layer if options.format == "gguf" else plain_llama)(model, pad=options.pad)
    pruned, size = fraction_removed_of(options.directory, model.config), stated.num_parameters()
    extra = size - model.num_parameters()
    uncut = []
    with all_or_nothing(out) as partial:
        if options.format == "gguf":
            uncut = write_gguf(partial, stated, tokenizer, kind=options.type or "f16")
        else:
            save_model(stated, partial)
            tokenizer.save_pretrained(partial)
            origin = {"from": options.directory, "transact": __version__, "zeros_added": max(0, extra)}
            (partial / EXPORTED).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    if is_sparse(model) and not is_sparse(stated):
        tell("the zeros that are added lie between those of 2:4 sparsity: the export is no longer 2:4")
    zeros = f", {counted(extra, 'zero')} added" if extra > 0 else ""
    print(
        f"{out}: {size:,} parameters ({pruned:.1%} of the linear ones removed"
        f"{zeros}), {heads_and_mlp_in_words(stated.config)}"
        f"{f', architecture {architecture_of(stated.config)!r}' if options.format == 'gguf' else ''}"
        f"{', f16 where rows are no multiple of 32' if uncut else ''}"
    )


def heads_and_mlp_in_words(config: PretrainedConfig) -> str:
    """Heads and MLP in words, from the narrowest layer to the widest."""

    def span(values: Iterable[int]) -> str:
        return " to ".join(map(str, sorted({min(values := [*values]), max(values)})))

    widths, group = widths_of(config), config.num_attention_heads // config.num_key_value_heads
    heads = span(group * of.kv_heads for of in widths)
    return (
        f"{heads} head{'s' * (heads != '1')} of {span(of.qk_head_dim for of in widths)}, "
        f"MLP {span(of.mlp for of in widths)}"
    )


def _export_program(options: argparse.Namespace, out: Path) -> None:
    """The program, and beside it the tokeniser, which ExecuTorch's runners read too: both or neither."""
    beside = out.with_name(f"{out.stem}.tokenizer.json")
    if beside.exists() and not out.exists():  # what stands beside a program was exported with it, and goes with it
        raise ValueError(f"output {str(beside)!r}, for the tokeniser, exists; name another")
    settings = {"context": options.context, "kind": options.type or "f32"}
    context = context_of(read_config(options.directory), **settings)
    fast = getattr(load_tokenizer(options.directory), "backend_tokenizer", None)
    if fast is None:
        raise ValueError(f"the tokeniser of {options.directory!r} has no tokenizer.json, which phones read: convert it")
    model, _ = load_model(options.directory, dtype="float32", device="cpu")
    pruned = fraction_removed_of(options.directory, model.config)
    with all_or_nothing(beside) as tokenizer_file, all_or_nothing(out) as partial:
        write_program(partial, model, **settings)
        fast.save(str(tokenizer_file))
        size = partial.stat().st_size
    print(
        f"{out}: {size / 2**20:,.1f} MiB, {model.num_parameters():,} parameters ({pruned:.1%} of the linear ones "
        f"removed), room for {context:,} tokens; tokeniser in {beside}"
    )
