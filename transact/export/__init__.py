"""Checkpoints that other tools load, one file a format. What a format cannot state is refused first."""

from ..whitelist import FORMATS, check_exportable
from .gguf import GGUF_TYPES, write_gguf
from .gguf_tokenizer import check_tokenizer
from .llama import plain_llama

__all__ = ["FORMATS", "GGUF_TYPES", "check_exportable", "check_tokenizer", "plain_llama", "write_gguf"]
