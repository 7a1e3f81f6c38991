"""The narrowed Llama in vLLM's layers: queries, keys and values in one product, gates and what they open in another.

Legend: T tokens of all requests, K key-value heads, H query heads, Q width of query-key heads.
"""

from itertools import islice

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors


class TransActAttention(nn.Module):
    """Attention at a layer's widths; where the kernels have only a wider head, zeros fill it up."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        group = config.num_attention_heads // config.num_key_value_heads
        self.kv_heads, self.heads = config.kv_head_counts[layer_idx], config.kv_head_counts[layer_idx] * group
        self.qk_head_dim, self.v_head_dim = config.qk_head_dims[layer_idx], config.v_head_dims[layer_idx]
        self.engine_head_dim = config.engine_head_dim(layer_idx)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.qk_head_dim, self.heads, self.kv_heads, bias=config.attention_bias,
            quant_config=quant_config, prefix=f"{prefix}.qkv_proj", v_head_size=self.v_head_dim,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            self.heads * self.v_head_dim, config.hidden_size, bias=config.attention_output_bias,
            quant_config=quant_config, prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self.query_key_norm = config.query_key_norm
        if config.query_key_norm:
            self.q_norm = RMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
        self.register_buffer("rope_pairs", torch.zeros(self.kv_heads, self.qk_head_dim // 2, dtype=torch.int64))
        places = torch.zeros((self.heads + self.kv_heads) * self.qk_head_dim // 2, dtype=torch.int64)
        self.register_buffer("pairs_of_heads", places, persistent=False)
        self.attn = Attention(
            self.heads, self.engine_head_dim, config.head_dim**-0.5, num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config, quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def place_pairs(self) -> None:
        """Write down, once the pairs are loaded, those of all query heads and then of the key heads."""
        group = self.heads // self.kv_heads
        of_queries = self.rope_pairs.repeat_interleave(group, dim=0)
        self.pairs_of_heads.copy_(torch.cat((of_queries, self.rope_pairs)).flatten())

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = self.heads + self.kv_heads
        joined, _ = self.qkv_proj(hidden_states)
        turned, value = joined.split([heads * self.qk_head_dim, self.kv_heads * self.v_head_dim], dim=-1)
        turned = turned.unflatten(-1, (heads, self.qk_head_dim))
        if self.query_key_norm:
            query, key = turned.split([self.heads, self.kv_heads], dim=1)
            turned = torch.cat((self.q_norm(query.contiguous()), self.k_norm(key.contiguous())), dim=1)
        cos, sin = (
            table.index_select(1, self.pairs_of_heads).view(-1, heads, self.qk_head_dim // 2) for table in (cos, sin)
        )
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        value = value.unflatten(-1, (self.kv_heads, self.v_head_dim))
        if self.qk_head_dim < self.engine_head_dim:
            turned = functional.pad(turned, (0, self.engine_head_dim - self.qk_head_dim))
        if self.v_head_dim < self.engine_head_dim:
            value = functional.pad(value, (0, self.engine_head_dim - self.v_head_dim))
        query, key = turned.split([self.heads, self.kv_heads], dim=1)
        output = self.attn(query.flatten(1), key.flatten(1), value.flatten(1))
        if self.v_head_dim < self.engine_head_dim:
            output = output.unflatten(-1, (self.heads, self.engine_head_dim))[..., : self.v_head_dim].flatten(1)
        return self.o_proj(output)[0]


class TransActMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        width = config.intermediate_sizes[layer_idx]
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width, width], bias=config.mlp_bias, quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            width, config.hidden_size, bias=config.mlp_output_bias, quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )  # fmt: skip
        self.act_fn = get_act_and_mul_fn(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden_states)[0]))[0]


class TransActDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config, layer_idx = vllm_config.model_config.hf_config, extract_layer_index(prefix)
        self.self_attn = TransActAttention(vllm_config, layer_idx, f"{prefix}.self_attn")
        self.mlp = TransActMLP(vllm_config, layer_idx, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, residual, cos, sin):
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, cos, sin)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


def has_fixed_rope(vllm_config: VllmConfig) -> bool:
    """Whether frequencies are the same at every length: only then can the model be compiled as a whole."""
    return vllm_config.model_config.hf_config.rope_parameters["rope_type"] not in ("dynamic", "longrope")


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0},
    enable_if=has_fixed_rope,
)
class TransActModel(LlamaModel):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module]):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.rotary_emb = LlamaRotaryEmbedding(vllm_config.model_config.hf_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        # tables (T, head_dim) hold each pair's angle twice, once in either half
        cos, sin = (table[0].chunk(2, dim=-1)[0] for table in self.rotary_emb(hidden_states, positions[None]))
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(hidden_states, residual, cos, sin)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        return self.norm(hidden_states, residual)[0]

    def load_weights(self, weights):
        loaded = super().load_weights(weights)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            layer.self_attn.place_pairs()
        return loaded


class TransActForCausalLM(LlamaForCausalLM):
    """What vLLM loads for a narrowed Llama, on one GPU or, by layers, on several."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if (size := get_tensor_model_parallel_world_size()) > 1:
            raise ValueError(f"tensor_parallel_size must be 1 for a narrowed Llama, got {size}")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=TransActDecoderLayer)

    def _init_model(self, vllm_config: VllmConfig, prefix: str, layer_type: type[nn.Module]) -> TransActModel:
        return TransActModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
