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
    A layer without attention has heads of 0 dimensions, one without an MLP an MLP of 0.

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
    def is_narrowed(self) -> bool:
        """Whether anything is narrower than the dense model."""
        return not self.has_dense_heads or set(self.intermediate_sizes) != {self.intermediate_size}

    @property
    def has_dense_heads(self) -> bool:
        """Whether every layer has as many heads as the dense model, as wide as there."""
        heads = zip(self.kv_head_counts, self.qk_head_dims, self.v_head_dims, strict=True)
        return set(heads) == {(self.num_key_value_heads, self.head_dim, self.head_dim)}

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have attention: the KV cache has an entry for each of these, in their order."""
        return [layer_idx for layer_idx, width in enumerate(self.v_head_dims) if width]

    @property
    def num_kv_shared_layers(self) -> int:
        """How many entries fewer than layers the KV cache has: earlier versions of transformers ask for it."""
        return self.num_hidden_layers - len(self.attention_layers)

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
        """A configuration for each attention, with the number and width of its heads where the dense model's stand.

        Caches are made by it, entry by entry.
        """
        if not self.is_heterogeneous:
            return [self] * len(self.attention_layers)
        group = self.num_attention_heads // self.num_key_value_heads
        layers = []
        for layer_idx in self.attention_layers:
            kv_heads = self.kv_head_counts[layer_idx]
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
            "kv_head_counts": (1, self.num_key_value_heads),
            "qk_head_dims": (0, self.head_dim),
            "v_head_dims": (0, self.head_dim),
            "intermediate_sizes": (0, self.intermediate_size),
        }
        for name, (least, dense) in dense_widths.items():
            widths = getattr(self, name)
            if len(widths) != self.num_hidden_layers:
                raise ValueError(f"{name} must be one width a layer, {self.num_hidden_layers} of them, got {widths}")
            if not all(least <= width <= dense for width in widths):
                raise ValueError(f"{name} must lie between {least} and the dense model's {dense}: {widths}")
        if any(width % 2 for width in self.qk_head_dims):
            raise ValueError(f"qk_head_dims must be even, RoPE rotates pairs: {self.qk_head_dims}")
        if any(bool(qk) != bool(v) for qk, v in zip(self.qk_head_dims, self.v_head_dims, strict=True)):
            raise ValueError("a layer without attention has 0 in qk_head_dims and in v_head_dims, others in neither")
        if not any(self.v_head_dims):
            raise ValueError("v_head_dims are 0 in all layers: at least one layer must have attention")
        if self.query_key_norm and any(width not in (0, self.head_dim) for width in self.qk_head_dims):
            raise ValueError(f"qk_head_dims must stay {self.head_dim}: the norms of queries and keys see whole heads")
