"""Models by shape alone: random weights, made on the device. Speed and memory do not depend on their values."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from transact import TransActForCausalLM
from transact.criteria import lookup
from transact.models import DTYPES
from transact.prune import narrowed_config
from transact.widths import Widths

LLAMA2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096,
)  # fmt: skip
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)  # fmt: skip


def llama3(layers: int, hidden: int, heads: int, mlp: int, *, tied: bool) -> LlamaConfig:
    """A shape of the Llama 3 family: 8 key-value heads and 128,256 tokens, whatever the size."""
    return LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip


def narrowed(dense: LlamaConfig, kv_heads: int, head_dim: int, mlp: int) -> PretrainedConfig:
    """The dense shape with these widths in every layer."""
    return narrowed_config(dense, [Widths(kv_heads, head_dim, head_dim, mlp)] * dense.num_hidden_layers)


# the paper's models: A is heads x head width, M the MLP width; the same A as whole heads and inside all heads
SHAPES: Mapping[str, PretrainedConfig] = {
    "llama2-7b": LLAMA2_7B,
    "transact-1.3b": narrowed(LLAMA2_7B, 6, 128, 1536),  # A 768, M 1536
    "transact-1.3b-dims": narrowed(LLAMA2_7B, 32, 24, 1536),
    "transact-2.5b": narrowed(LLAMA2_7B, 16, 128, 3072),  # A 2048, M 3072
    "transact-2.5b-dims": narrowed(LLAMA2_7B, 32, 64, 3072),
    "sheared-llama-1.3b": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        max_position_embeddings=4096,
    ),
    "llama3-1b": llama3(16, 2048, 32, 8192, tied=True),
    "llama3-3b": llama3(28, 3072, 24, 8192, tied=True),
    "llama3-8b": llama3(32, 4096, 32, 14336, tied=False),
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-135m-pruned": narrowed(SMOLLM2_135M, 3, 48, 1056),  # 30 % of the decoder's linear parameters removed
    "smollm2-135m-odd": narrowed(SMOLLM2_135M, 3, 46, 1070),  # about the same, aligned to nothing
}  # fmt: skip


def shape_by_name(name: str) -> PretrainedConfig:
    """Raises ValueError with the allowed names for any other name."""
    return lookup(SHAPES, name, "shape")


def random_model(config: PretrainedConfig, *, dtype: str, device: torch.device) -> nn.Module:
    """A model of this shape with random weights, in evaluation mode; nothing is written to disk."""
    kind = TransActForCausalLM if config.model_type == "transact_llama" else LlamaForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with device:
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
