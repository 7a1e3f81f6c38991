"""Checkpoints that other tools load, one file a format. What a format cannot state is refused first."""

from ..whitelist import FORMATS, check_exportable
from .executorch import PROGRAM_TYPES, context_of, write_program
from .gguf import GGUF_TYPES, architecture_of, write_gguf
from .gguf_tokenizer import check_tokenizer
from .llama import llama_by_layer, plain_llama

__all__ = ["FORMATS", "GGUF_TYPES", "PROGRAM_TYPES", "architecture_of", "check_exportable", "check_tokenizer",
           "context_of", "llama_by_layer", "plain_llama", "write_gguf", "write_program"]  # fmt: skip
