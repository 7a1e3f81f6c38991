"""Configuration of a Llama whose attention heads and MLPs differ in width from layer to layer.

This file and `modeling_transact.py` travel beside a saved checkpoint (`trust_remote_code=True`), so they import
nothing of the package.
"""

import copy

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

# `save_pretrained` would name the class of the saved model only, and leave users of the others without
AUTO_MAP = {
    "AutoConfig": "configuration_transact.TransActConfig",
    "AutoModel": "modeling_transact.TransActModel",
    "AutoModelForCausalLM": "modeling_transact.TransActForCausalLM",
    "AutoModelForSequenceClassification": "modeling_transact.TransActForSequenceClassification",
}
ENGINE_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # that attention kernels of vLLM have on any device


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
        self.auto_map = AUTO_MAP | (getattr(self, "auto_map", None) or {})

    @property
    def qk_head_dim(self) -> int:
        """Widest query-key head. Its presence tells `generate` that keys and values differ in width."""
        return max(self.qk_head_dims)

    def engine_head_dim(self, layer_idx: int) -> int:
        """The one width of a layer's queries, keys and values in an engine: the next that attention kernels have."""
        widest = max(self.qk_head_dims[layer_idx], self.v_head_dims[layer_idx])
        return next((width for width in ENGINE_HEAD_DIMS if width >= widest), widest)

    @property
    def is_heterogeneous(self) -> bool:
        """Whether any layer has other heads in an engine than the dense model: vLLM then reads `per_layer_config`."""
        dense = (self.num_key_value_heads, self.head_dim)
        counts = self.kv_head_counts or []  # None until `__post_init__` is through
        return any((count, self.engine_head_dim(layer)) != dense for layer, count in enumerate(counts))

    @property
    def per_layer_config(self) -> list["TransActConfig"]:
        """A configuration for each layer, with the number and width of its heads where the dense model's stand."""
        if not self.is_heterogeneous:
            return [self] * self.num_hidden_layers
        group = self.num_attention_heads // self.num_key_value_heads
        layers = []
        for layer_idx, kv_heads in enumerate(self.kv_head_counts):
            heads = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads}
            layers.append(copy.copy(self))
            # not as attributes, each of which is checked anew: transformers asks whenever it makes a cache
            vars(layers[-1]).update(heads, head_dim=self.engine_head_dim(layer_idx))
        return layers

    per_layer_attributes = frozenset()  # that may not be read of the whole: the dense model's stand there

    def _update_heterogeneous_to_dict_output(self, output: dict) -> None:
        """Nothing of it is saved: the lists of widths say it all."""

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
