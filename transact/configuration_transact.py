"""Configuration of a Llama whose attention heads and MLPs differ in width from layer to layer.

This file and `modeling_transact.py` travel beside a saved checkpoint (`trust_remote_code=True`), so they import
nothing of the package.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class TransActConfig(LlamaConfig):
    """Llama configuration plus the kept widths of every layer.

    The inherited `head_dim`, `num_key_value_heads` and `intermediate_size` stay those of the dense model: `head_dim`
    still sets the RoPE frequencies and the softmax scale, and heads / key-value heads is still the group size. A list
    left out means "as wide as the dense model in every layer".

    Fields (one entry per layer): `kv_head_counts` key-value heads, `qk_head_dims` dimensions of a query or key head
    (two per RoPE pair, hence even), `v_head_dims` dimensions of a value head, `intermediate_sizes` MLP dimensions.

    What Llama's relatives and the compensation add: `attention_output_bias` and `mlp_output_bias` (biases of `o_proj`
    and `down_proj`; left out, they follow `attention_bias` and `mlp_bias`), `sliding_window` (Mistral) and
    `query_key_norm` (Qwen3).
    """

    model_type = "transact_llama"
    base_model_tp_plan = None  # heads of a layer keep different RoPE pairs: they cannot be sharded as Llama's are

    kv_head_counts: list[int] | None = None
    qk_head_dims: list[int] | None = None
    v_head_dims: list[int] | None = None
    intermediate_sizes: list[int] | None = None
    attention_output_bias: bool | None = None
    mlp_output_bias: bool | None = None
    sliding_window: int | None = None
    query_key_norm: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layers = self.num_hidden_layers
        self.kv_head_counts = self.kv_head_counts or [self.num_key_value_heads] * layers
        self.qk_head_dims = self.qk_head_dims or [self.head_dim] * layers
        self.v_head_dims = self.v_head_dims or [self.head_dim] * layers
        self.intermediate_sizes = self.intermediate_sizes or [self.intermediate_size] * layers
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.mlp_output_bias is None:
            self.mlp_output_bias = self.mlp_bias

    @property
    def qk_head_dim(self) -> int:
        """Widest query-key head. Its presence tells `generate` that keys and values differ in width."""
        return max(self.qk_head_dims)

    def validate_architecture(self):
        """Llama's own check that heads divide the hidden size, which `head_dim` makes needless: nothing to check."""

    def validate_widths(self):
        """Part of `@strict`: one width per layer, none wider than the dense model's, and whole RoPE pairs."""
        dense_widths = {
            "kv_head_counts": self.num_key_value_heads,
            "qk_head_dims": self.head_dim,
            "v_head_dims": self.head_dim,
            "intermediate_sizes": self.intermediate_size,
        }
        for name, dense in dense_widths.items():
            widths = getattr(self, name)
            if len(widths) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(widths)} entries for {self.num_hidden_layers} layers")
            if not all(1 <= width <= dense for width in widths):
                raise ValueError(f"{name} must lie between 1 and the dense model's {dense}: {widths}")
        if any(width % 2 for width in self.qk_head_dims):
            raise ValueError(f"qk_head_dims must be even, RoPE rotates pairs: {self.qk_head_dims}")
        if self.query_key_norm and any(width != self.head_dim for width in self.qk_head_dims):
            raise ValueError(f"qk_head_dims must stay {self.head_dim}: the norms of queries and keys see whole heads")
