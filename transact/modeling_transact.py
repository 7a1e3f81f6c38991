"""Llama with narrowed heads and MLPs; everything that is not narrower is inherited from transformers.

Keeping whole RoPE pairs at their own frequencies and the dense softmax scale makes this model equal the dense one with
the dropped dimensions set to zero. Decoding one token is little more than calls of operators: it takes few, large ones.
This file travels beside a saved checkpoint and imports only its configuration.

Legend: B batch, L length, D hidden size, K key-value heads, H query heads, Q and V width of query-key and value heads.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial

import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
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

# What transformers calls the KV cache that it hands to layers and gives back: `cache` from 5.24 on. Before, continuous
# batching alone had one of that name, which attention functions update.
_outputs = BaseModelOutputWithPast.__dataclass_fields__
CACHE = next((name for name in ("cache", "past_key_values") if name in _outputs), None)
if CACHE is None:  # layers would never see it, and what they decode would be nonsense
    raise ImportError(f"transformers {transformers.__version__} has another name for the KV cache: take an older one")


def joined_product(token: torch.Tensor, *linears: nn.Linear, may_leave_16_bits: bool = False) -> torch.Tensor | None:
    """What linear modules make of one token (B, 1, D), side by side (B, sum of widths), in one product.

    None where they have to be called one by one: for more tokens, in training, compiled code and autocast, for as many
    sequences of 16 bits as are multiplied in float32, and where one is more than linear (hooks, adapters, quantised or
    offloaded weights). The weights are looked at in every step, which costs less than a product, so that nothing is out
    of date whatever was done to the model since the last one.
    """
    if torch.compiler.is_compiling():
        return None
    if token.is_cuda and torch.cuda.is_current_stream_capturing():
        for linear in linears:
            linear.weight.is_recorded = True  # a CUDA graph goes on reading this memory
    if token.ndim != 3 or token.shape[1] != 1 or torch.is_grad_enabled() or token.is_meta:
        return None
    if may_leave_16_bits and len(token) >= MANY and token.is_cpu and token.dtype.itemsize == 2:
        return None
    weights, rows, end, in_a_row = [], 0, None, True
    for linear in linears:
        if not is_linear_alone(linear):
            return None
        weight = linear._parameters["weight"]
        place = weight.data_ptr()
        in_a_row = in_a_row and (end is None or place == end) and weight.is_contiguous()
        end = place + weight.nbytes
        rows += linear.out_features
        weights.append(weight)
    first = weights[0]
    memory = first.untyped_storage()  # weights in memories of their own may be neighbours too
    in_a_row = in_a_row and memory.data_ptr() + memory.nbytes() >= end
    if torch.is_autocast_enabled(token.device.type) or not (in_a_row or put_in_a_row(weights)):
        return None
    width = token.shape[2]
    joined = first.as_strided((width, rows), (1, width))
    biases = [bias for linear in linears if (bias := linear._parameters["bias"]) is not None]
    if 0 < len(biases) < len(linears):
        return None
    return product_of_few(token.squeeze(1), joined, torch.cat(biases) if biases else None)


def is_linear_alone(module: nn.Module) -> bool:
    """Whether calling the module does nothing but a linear map: no hook, adapter, quantised or offloaded weight."""
    return (
        type(module) is nn.Linear
        and type(module._parameters.get("weight")) is nn.Parameter  # `module.weight` takes longer than all of this
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks or _global_forward_hooks)
        and not _global_forward_pre_hooks
    )


FEW = 3  # rows that MKL multiplies one by one
HAS_MKL = torch.backends.mkl.is_available()


def product_of_few(inputs: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`inputs` (B, D) times a `matrix` (D, outputs) that is the transpose of a contiguous weight, and the bias.

    MKL has one thread multiply so few rows, but all of them a batch of products: there the outputs are divided into as
    many parts as there are threads, which takes half the time with two of them.
    """
    is_divided = len(inputs) <= FEW and matrix.dtype == torch.float32 and matrix.device.type == "cpu"
    is_divided = is_divided and type(inputs) is torch.Tensor  # not that of a mode that computes without numbers
    parts, each = parts_of_outputs(matrix.shape[1], torch.get_num_threads()) if is_divided else (1, 0)
    if parts == 1:
        return torch.mm(inputs, matrix) if bias is None else torch.addmm(bias, inputs, matrix)
    product = product_in_parts(inputs, matrix, parts, each)
    return product if bias is None else product + bias


def product_in_parts(inputs: torch.Tensor, matrix: torch.Tensor, parts: int, each: int) -> torch.Tensor:
    """The product as a batch of `parts` with `each` outputs, and of the outputs that remain at once."""
    width, outputs = matrix.shape
    batch = matrix.as_strided((parts, width, each), (each * width, 1, width))
    product = torch.bmm(inputs.expand(parts, -1, -1), batch)
    product = product.view(1, -1) if len(inputs) == 1 else product.transpose(0, 1).reshape(len(inputs), -1)
    if parts * each == outputs:
        return product
    return torch.cat((product, torch.mm(inputs, matrix[:, parts * each :])), dim=1)


@cache
def parts_of_outputs(outputs: int, threads: int) -> tuple[int, int]:
    """How many parts the outputs are divided into, and how many are in each of them; (1, 0) where they are not divided.

    A multiple of 16, so that all are summed as they are in the whole product, bit for bit.
    """
    parts = min(threads, outputs // 16)
    if parts < 2 or not HAS_MKL or not is_exact_in_parts(parts):
        return 1, 0
    each = outputs // (16 * parts) * 16
    if 0 < outputs - parts * each < 16:  # so few would be summed otherwise
        each -= 16
    return (parts, each) if each else (1, 0)


@cache
def is_exact_in_parts(parts: int) -> bool:
    """Whether this machine's library gives the same bits in parts; tried, since no documentation promises it."""
    with torch.inference_mode(), torch.device("cpu"):
        inputs = torch.arange(2.0 * 576).sin().view(2, 576)
        matrix = torch.arange(576.0 * (48 * parts + 40)).cos().view(-1, 576).t()
        return all(
            torch.equal(product_in_parts(x, matrix, parts, 48), torch.mm(x, matrix)) for x in (inputs, inputs[:1])
        )


@torch.library.custom_op("transact::product_of_one", mutates_args=())
def product_of_one(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`product_of_few` of one row (1, D) as an operator that compilers call as it is.

    Of the batch of products itself they make a kernel for each width: SmolLM2's step takes 80 to 100 s to compile so.
    """
    return product_of_few(inputs, weight.t(), bias)


@product_of_one.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty(1, len(weight))


def compiled_product(linear: nn.Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """`quick_product` in compiled code: of one row alone, so that nothing is asked about a length that varies."""
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
        return None
    if inputs.device.type != "cpu" or not HAS_MKL or type(weight) is not nn.Parameter or not weight.is_contiguous():
        return None
    if weight.dtype != torch.float32 or inputs.dtype != weight.dtype or inputs.shape[:-1].numel() != 1:
        return None
    return product_of_one(inputs.reshape(1, -1), weight, bias).view(*inputs.shape[:-1], -1)


MANY = 32  # rows from which a product in float32 takes less time, the weights' conversion included
PART = 2**24  # weights that are converted at a time


@cache
def has_products_of_16_bits() -> bool:
    """Whether torch has more for products of 16 bits on this processor than one row after another: 24 ms instead of 4.6
    in float32, of 256 rows and 576 x 1,536 weights (two cores with AVX2)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def leaves_16_bits(config: TransActConfig) -> bool:
    """Whether a CPU may compute in float32 what is stored in 16 bits.

    Not for a model that keeps everything, which has the dense model's bits.
    """
    return config.is_narrowed and not has_products_of_16_bits()


def product_in_float32(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `functional.linear`, of 16 bits; only a part of the weights is in float32 at a time."""
    wide, parts = inputs.float(), weight.split(max(1, PART // weight.shape[1]))
    product = torch.cat([functional.linear(wide, part.float()) for part in parts], dim=-1)
    return (product if bias is None else product.add_(bias)).to(inputs.dtype)


def quick_product(linear: nn.Linear, inputs: torch.Tensor, may_leave_16_bits: bool) -> torch.Tensor | None:
    """What the linear map makes of the inputs, where its own product is slow on a CPU: None elsewhere.

    Of few rows it is made in parts, of many rows of 16 bits in float32.
    """
    if torch.compiler.is_compiling():  # first: what else is asked would become a guard
        return compiled_product(linear, inputs)
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    rows = inputs.shape[:-1].numel()
    if FEW < rows < (MANY if may_leave_16_bits else math.inf) or not rows or torch.is_grad_enabled():
        return None
    if type(weight) is not nn.Parameter or not weight.is_contiguous() or inputs.shape[-1] != weight.shape[1]:
        return None
    if inputs.is_meta or torch.is_autocast_enabled(inputs.device.type):
        return None
    if rows <= FEW:
        return product_of_few(inputs.reshape(rows, -1), weight.t(), bias).view(*inputs.shape[:-1], -1)
    if inputs.is_cpu and inputs.dtype.itemsize == 2 and inputs.dtype == weight.dtype:
        return product_in_float32(inputs, weight, bias)
    return None


def product(linear: nn.Module, inputs: torch.Tensor, may_leave_16_bits: bool) -> torch.Tensor:
    """What the linear module makes of the inputs, quickly where it does nothing else.

    Modules stay `nn.Linear` themselves, since tools that quantise look for just that.
    """
    quick = quick_product(linear, inputs, may_leave_16_bits) if is_linear_alone(linear) else None
    return linear(inputs) if quick is None else quick


class Head(nn.Linear):
    """The language-model head, which transformers calls itself."""

    def __init__(self, config: TransActConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.may_leave_16_bits = leaves_16_bits(config)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        quick = quick_product(self, inputs, self.may_leave_16_bits)
        return super().forward(inputs) if quick is None else quick


def put_in_a_row(weights: Sequence[torch.Tensor]) -> bool:
    """Move weights into one memory of which they become views, names and values as before; say whether that was done.

    Not to weights that are views already, of whatever keeps them so (sharding, offloading), nor to those that other
    processes share or that a CUDA graph reads where they are.
    """
    if any(hasattr(weight, "is_recorded") for weight in weights):
        return False
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return False
    if any(weight.is_meta or weight.is_inference() or not weight.is_contiguous() for weight in weights):
        return False
    if any(weight.untyped_storage().nbytes() != weight.nbytes for weight in weights):
        return False
    if any(weight.device.type == "cpu" and weight.is_shared() for weight in weights):
        return False
    with torch.inference_mode(False):  # or nothing could be trained afterwards
        joined = torch.cat([weight.detach() for weight in weights])
        if type(joined) is not torch.Tensor:  # of a mode that computes without numbers
            return False
        for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
            weight.data, weight.is_in_a_row = part, True
    return True


def put_apart(module: nn.Module, *_) -> None:
    """Give weights of a module that `put_in_a_row` moved memories of their own again; called before its state is taken.

    Some that save a state (accelerate) keep one of all tensors in the same memory, and lose the others.
    """
    rows = defaultdict(list)
    for weight in module.parameters():
        if hasattr(weight, "is_in_a_row") and not hasattr(weight, "is_recorded"):
            rows[weight.untyped_storage().data_ptr()].append(weight)
    for weights in rows.values():
        if weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights):  # and not moved since
            with torch.inference_mode(False):
                for weight in weights:
                    weight.data = weight.detach().clone()


@cache
def places_of_pairs(kv_heads: int, group: int, pairs: int, device: torch.device) -> torch.Tensor:
    """Which of a layer's kept pairs, counted through all its key-value heads, turns each dimension of its query heads
    and then of its key heads: ((H + K) x Q,)."""
    with torch.inference_mode(False), torch.device(device):
        of_heads = torch.arange(kv_heads * pairs).view(kv_heads, 1, pairs).repeat(1, 1, 2)
        return torch.cat((of_heads.repeat(1, group, 1).flatten(), of_heads.flatten()))


@cache
def signs_of_halves(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The sign of the sine in the first and in the second half of a head: (2, 1)."""
    with torch.inference_mode(False):
        return torch.tensor([[-1], [1]], dtype=dtype, device=device)


def attend_with_one_query(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As transformers' sdpa where nothing is masked, by the same kernel."""
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] > key.shape[1]}
    return functional.scaled_dot_product_attention(query, key, value, **options), None


def as_wide(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """The three with zeros up to the wider of keys and values."""
    wider = max(key.shape[3], value.shape[3])
    return [
        heads if heads.shape[3] == wider else functional.pad(heads, (0, wider - heads.shape[3]))
        for heads in (query, key, value)
    ]


def in_float32(query, key, value, attention_mask):
    """What attention is given, in float32; a mask of booleans stays."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    return query.float(), key.float(), value.float(), attention_mask


def attend_in_groups(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As transformers' sdpa of one query and nothing masked, in 16 bits: the query heads of one key-value head go as so
    many queries of one head, which are multiplied as a matrix, not row by row.

    With AVX2, 512 tokens and nine heads of 64 over three take .08 ms for .38. In float32, which copies keys and values
    with all threads, it is as fast only while no other work wants these.
    """
    width = value.shape[3]
    query = query.reshape(len(query), key.shape[1], -1, key.shape[3])
    query, key, value = as_wide(query, key, value)
    output = functional.scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
    return output[..., :width], None


def attend_unequal(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As transformers' sdpa where keys and values differ in width, which its kernels answer with copies of both.

    One query takes two products. More are padded to the wider, which costs less than all scores at once.
    """
    length, kv_heads, width = query.shape[2], key.shape[1], value.shape[3]
    if length > 1 or dropout or (attention_mask is not None and attention_mask.shape[1] > 1):
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        output, _ = sdpa_attention_forward(module, *as_wide(query, key, value), attention_mask, **options)
        return output[..., :width], None
    query = (query * scaling).reshape(len(query) * kv_heads, -1, key.shape[3])
    scores = torch.bmm(query, key.flatten(0, 1).mT)  # (B x K, query heads for each, length of keys)
    if attention_mask is not None:
        scores = scores.unflatten(0, (-1, kv_heads))
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
        scores = scores.flatten(0, 1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value.flatten(0, 1)), None


class TransActAttention(nn.Module):
    """Attention whose query-key and value heads keep only some dimensions of the dense heads.

    The KV cache holds keys (batch, kv_heads, length, qk_head_dim) and values (batch, kv_heads, length, v_head_dim).
    """

    def __init__(self, config: TransActConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = config.attention_layers.index(layer_idx)  # in the cache, which knows no other layers
        self.kv_heads = config.kv_head_counts[layer_idx]
        self.qk_head_dim = config.qk_head_dims[layer_idx]
        self.v_head_dim = config.v_head_dims[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5  # of the dense head: dropping dimensions must not flatten the softmax
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.head_dim, self.query_key_norm = config.head_dim, config.query_key_norm
        self.sliding_window = config.sliding_window
        self.engine_head_dim = config.engine_head_dim(layer_idx)
        self.may_leave_16_bits = leaves_16_bits(config)

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
        self.register_state_dict_pre_hook(put_apart)

    def first_rope_pairs(self) -> torch.Tensor:
        return torch.arange(self.qk_head_dim // 2).repeat(self.kv_heads, 1)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        batch_and_length = hidden_states.shape[:-1]
        projections = self.q_proj, self.k_proj, self.v_proj
        joined = joined_product(hidden_states, *projections, may_leave_16_bits=self.may_leave_16_bits)
        if joined is None:
            query, key, value = self.heads(hidden_states, position_embeddings)
        else:
            query, key, value = self.heads_of_token(joined, position_embeddings)

        dtype = query.dtype
        said = {}
        if CACHE == "cache":
            past_key_values = kwargs.pop("cache", past_key_values)
            said = {"kwargs": kwargs}  # there continuous batching's says what its attention has to know
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, **said)

        # transformers looks for the literal below before it allows `set_attn_implementation`
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if attend is sdpa_attention_forward and kwargs.get("cache") is None:  # that of continuous batching
            is_slow = self.may_leave_16_bits and query.is_cpu and dtype.itemsize == 2
            is_slow = is_slow and not torch.compiler.is_exporting()  # for other processors
            if is_slow and query.shape[2] == 1 and attention_mask is None and self.num_key_value_groups > 1:
                attend = attend_in_groups
            else:
                if is_slow:
                    query, key, value, attention_mask = in_float32(query, key, value, attention_mask)
                if self.qk_head_dim != self.v_head_dim:
                    attend = attend_unequal
                elif joined is not None and attention_mask is None:
                    attend = attend_with_one_query
        elif self.config._attn_implementation == "vllm":  # which widens values itself, to the width of the keys
            missing = self.engine_head_dim - self.qk_head_dim
            query, key = functional.pad(query, (0, missing)), functional.pad(key, (0, missing))
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output.reshape(*batch_and_length, -1).to(dtype).contiguous()
        return product(self.o_proj, output, self.may_leave_16_bits), weights

    def heads(self, hidden_states, position_embeddings):
        """Queries (B, H, L, Q), turned as keys are, keys (B, K, L, Q) and values (B, K, L, V)."""
        batch_and_length = hidden_states.shape[:-1]

        def heads(projection: nn.Linear, width: int) -> torch.Tensor:
            made = product(projection, hidden_states, self.may_leave_16_bits)
            return made.view(*batch_and_length, -1, width).transpose(1, 2)

        query = heads(self.q_proj, self.qk_head_dim)
        key = heads(self.k_proj, self.qk_head_dim)
        value = heads(self.v_proj, self.v_head_dim)
        if self.query_key_norm:
            query, key = self.q_norm(query), self.k_norm(key)

        # The dense tables (batch, length, head_dim) hold each pair's angle twice, once in either half.
        if self.qk_head_dim == self.head_dim:  # every pair is there, in the dense order
            cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        else:
            pairs = torch.cat((self.rope_pairs, self.rope_pairs), dim=1).view(-1)
            shape = (-1, batch_and_length[1], self.kv_heads, self.qk_head_dim)
            cos, sin = (table.index_select(2, pairs).view(shape).transpose(1, 2) for table in position_embeddings)
        key = key * cos + rotate_half(key) * sin
        query = query.unflatten(1, (self.kv_heads, self.num_key_value_groups))
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        query = (query * cos + rotate_half(query) * sin).flatten(1, 2)
        return query, key, value

    def heads_of_token(self, joined: torch.Tensor, position_embeddings):
        """As `heads`, bit for bit, of one token's queries, keys and values side by side, which are turned together."""
        batch, kv_heads, group, width = joined.shape[0], self.kv_heads, self.num_key_value_groups, self.qk_head_dim
        query_heads, heads = kv_heads * group, kv_heads * (group + 1)
        cos, sin = position_embeddings
        if width < self.head_dim:
            places = places_of_pairs(kv_heads, group, width // 2, cos.device)
            pairs = self.rope_pairs.view(-1).index_select(0, places)
            cos, sin = cos.index_select(2, pairs), sin.index_select(2, pairs)
        cos, sin = cos.view(cos.shape[0], -1, 2, width // 2), sin.view(sin.shape[0], -1, 2, width // 2)
        turned = joined[:, : heads * width].view(batch, heads, 2, width // 2)
        if self.query_key_norm:
            query, key = turned.flatten(2).split([query_heads, kv_heads], dim=1)
            turned = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1).view_as(turned)
        turned = (turned * cos).add_(turned.flip(2).mul_(sin * signs_of_halves(sin.dtype, sin.device)))
        turned = turned.view(batch, heads, 1, width)
        value = joined[:, heads * width :].view(batch, kv_heads, 1, -1)
        return turned[:, :query_heads], turned[:, query_heads:], value


class TransActMLP(LlamaMLP):
    """Llama's gated MLP at this layer's width."""

    def __init__(self, config: TransActConfig, layer_idx: int):
        nn.Module.__init__(self)
        hidden, width, bias = config.hidden_size, config.intermediate_sizes[layer_idx], config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=config.mlp_output_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.may_leave_16_bits = leaves_16_bits(config)
        self.register_state_dict_pre_hook(put_apart)

    def forward(self, x):
        joined = joined_product(x, self.gate_proj, self.up_proj, may_leave_16_bits=self.may_leave_16_bits)
        if joined is None:
            gate, up = (product(linear, x, self.may_leave_16_bits) for linear in (self.gate_proj, self.up_proj))
        else:
            gate, up = joined.unsqueeze(1).chunk(2, dim=2)
            # an activation rounds the ends of rows otherwise than their middles: these end where the dense model's do
            gate = gate.contiguous()
        return product(self.down_proj, self.act_fn(gate) * up, self.may_leave_16_bits)


class TransActDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around the narrowed modules; the residual stream keeps its width.

    A module of width 0 and the norm before it are not there (None), and the stream passes by.
    """

    def __init__(self, config: TransActConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        has_attention, has_mlp = config.v_head_dims[layer_idx] > 0, config.intermediate_sizes[layer_idx] > 0
        norm = partial(LlamaRMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TransActAttention(config, layer_idx) if has_attention else None
        self.mlp = TransActMLP(config, layer_idx) if has_mlp else None
        self.input_layernorm = norm() if has_attention else None
        self.post_attention_layernorm = norm() if has_mlp else None

    def forward(self, hidden_states, **arguments):
        if self.self_attn is not None:
            output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
            hidden_states = hidden_states + output
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


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
        self.lm_head = Head(config)
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """As transformers', whose paged cache has the dense model's heads: raises ValueError where there are others."""
        if not self.config.has_dense_heads:
            raise ValueError(
                "transformers' continuous batching has the dense model's heads in every layer, this model has others: "
                "generate() takes sequences together, and vLLM serves the checkpoint"
            )
        return super().init_continuous_batching(*args, **kwargs)


class TransActForSequenceClassification(GenericForSequenceClassification, TransActPreTrainedModel):
    """Sequence classifier on the last token's hidden state, as stock Llama's."""

    def __init__(self, config: TransActConfig):
        LlamaPreTrainedModel.__init__(self, config)  # not the generic one's, which asks whether our code is trusted
        self.num_labels = config.num_labels
        self.model = TransActModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


TransActConfig.register_for_auto_class()
TransActModel.register_for_auto_class("AutoModel")
TransActForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
TransActForCausalLM.register_for_auto_class("AutoModelForCausalLM")
