"""Llama with narrowed heads and MLPs; everything that is not narrower is inherited from transformers.

Keeping whole RoPE pairs at their own frequencies and the dense softmax scale makes this model equal the dense one with
the dropped dimensions set to zero. This file travels beside a saved checkpoint and imports only its configuration.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import MistralModel

from .configuration_transact import TransActConfig


class TransActAttention(nn.Module):
    """Attention whose query-key and value heads keep only some dimensions of the dense heads.

    The KV cache holds keys (batch, kv_heads, length, qk_head_dim) and values (batch, kv_heads, length, v_head_dim).
    """

    def __init__(self, config: TransActConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.kv_heads = config.kv_head_counts[layer_idx]
        self.qk_head_dim = config.qk_head_dims[layer_idx]
        self.v_head_dim = config.v_head_dims[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5  # of the dense head: dropping dimensions must not flatten the softmax
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        hidden, bias = config.hidden_size, config.attention_bias
        heads = self.kv_heads * self.num_key_value_groups
        self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.qk_head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.attention_output_bias)
        if config.query_key_norm:
            self.q_norm = LlamaRMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
        # (kv_heads, qk_head_dim / 2): the dense RoPE pair behind each kept pair
        self.register_buffer("rope_pairs", self.first_rope_pairs())

    def first_rope_pairs(self) -> torch.Tensor:
        return torch.arange(self.qk_head_dim // 2).repeat(self.kv_heads, 1)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        batch_and_length = hidden_states.shape[:-1]

        def heads(projection: nn.Linear, width: int) -> torch.Tensor:
            return projection(hidden_states).view(*batch_and_length, -1, width).transpose(1, 2)

        query = heads(self.q_proj, self.qk_head_dim)
        key = heads(self.k_proj, self.qk_head_dim)
        value = heads(self.v_proj, self.v_head_dim)
        if self.config.query_key_norm:
            query, key = self.q_norm(query), self.k_norm(key)

        # The dense tables (batch, length, head_dim) hold each pair's angle twice, once in either half.
        if self.qk_head_dim == self.config.head_dim:  # every pair is there, in the dense order
            cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        else:
            pairs = self.rope_pairs.repeat(1, 2)
            cos, sin = (table[..., pairs].transpose(1, 2) for table in position_embeddings)
        key = key * cos + rotate_half(key) * sin
        query = query.unflatten(1, (self.kv_heads, self.num_key_value_groups))
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        query = (query * cos + rotate_half(query) * sin).flatten(1, 2)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        # transformers looks for the literal below before it allows `set_attn_implementation`
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        window = self.config.sliding_window
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*batch_and_length, -1).contiguous()), weights


class TransActMLP(LlamaMLP):
    """Llama's gated MLP at this layer's width."""

    def __init__(self, config: TransActConfig, layer_idx: int):
        nn.Module.__init__(self)
        hidden, width, bias = config.hidden_size, config.intermediate_sizes[layer_idx], config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=config.mlp_output_bias)
        self.act_fn = ACT2FN[config.hidden_act]


class TransActDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around the narrowed modules; the residual stream keeps its width."""

    def __init__(self, config: TransActConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = TransActAttention(config, layer_idx)
        self.mlp = TransActMLP(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class TransActPreTrainedModel(LlamaPreTrainedModel):
    config: TransActConfig
    _no_split_modules = ["TransActDecoderLayer"]
    _can_record_outputs = {"hidden_states": TransActDecoderLayer, "attentions": TransActAttention}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TransActAttention):
            init.copy_(module.rope_pairs, module.first_rope_pairs())


class TransActModel(TransActPreTrainedModel, MistralModel):
    """The decoder stack without the language-model head. Mistral's forward is Llama's with an optional window."""

    def __init__(self, config: TransActConfig):
        LlamaPreTrainedModel.__init__(self, config)  # not MistralModel's, which would build the dense layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(TransActDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class TransActForCausalLM(TransActPreTrainedModel, LlamaForCausalLM):
    """Causal language model with narrowed modules: loads, saves, generates and trains as a stock Llama does."""

    _tp_plan = _pp_plan = _fsdp_plan = None

    def __init__(self, config: TransActConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = TransActModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


TransActConfig.register_for_auto_class()
TransActForCausalLM.register_for_auto_class("AutoModelForCausalLM")
