"""What a model's widths cost: operations and bytes, the most that a device could do with them, what fits in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from transact.prune import features_of
from transact.timing import seconds_of
from transact.widths import Widths, kv_elements_per_token, linear_parameters, widths_of


@dataclass(frozen=True)
class Costs:
    """Of one step: floating-point operations (a multiplication and an addition are two) and bytes moved."""

    operations: float
    bytes: float


def weight_elements(config: PretrainedConfig, widths: Sequence[Widths]) -> int:
    """Elements that every step reads: the decoder's weights, biases and norms, and the language-model head."""
    features, hidden = features_of(config), config.hidden_size
    group = config.num_attention_heads // config.num_key_value_heads
    vectors = hidden  # the last norm
    for w in widths:
        heads = w.kv_heads * ((group + 1) * w.qk_head_dim + w.v_head_dim)
        vectors += features["attention_bias"] * heads + features["mlp_bias"] * 2 * w.mlp
        vectors += w.has_attention * hidden * (1 + features["attention_output_bias"])  # with the norm before it
        vectors += w.has_mlp * hidden * (1 + features["mlp_output_bias"])
        vectors += features["query_key_norm"] * 2 * w.qk_head_dim
    return linear_parameters(config, widths) + vectors + config.vocab_size * hidden


def decode_costs(config: PretrainedConfig, *, context: int, batch: int, element_size: int) -> Costs:
    """One token for each of `batch` sequences with `context` tokens cached: all weights once, all of the cache."""
    widths, group = widths_of(config), config.num_attention_heads // config.num_key_value_heads
    matrices = linear_parameters(config, widths) + config.vocab_size * config.hidden_size
    attention = group * kv_elements_per_token(widths) * context
    cache = kv_elements_per_token(widths) * context
    return Costs(
        operations=2.0 * batch * (matrices + attention),
        bytes=float(element_size) * (weight_elements(config, widths) + batch * cache),
    )


def prefill_costs(config: PretrainedConfig, *, length: int, batch: int, element_size: int) -> Costs:
    """A prompt of `length` tokens for each of `batch` sequences; logits of the last token only.

    Causal attention is half of the full square. Bytes are weights and the cache that is written: activations are not
    counted, since they can stay on the chip.
    """
    widths, group = widths_of(config), config.num_attention_heads // config.num_key_value_heads
    tokens = batch * length
    attention = group * kv_elements_per_token(widths) * length / 2
    head = config.vocab_size * config.hidden_size
    return Costs(
        operations=2.0 * (tokens * (linear_parameters(config, widths) + attention) + batch * head),
        bytes=float(element_size) * (weight_elements(config, widths) + tokens * kv_elements_per_token(widths)),
    )


@dataclass(frozen=True)
class Roofline:
    """What a device does at best, measured: bytes a second copied (read and written) and operations a second."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, costs: Costs) -> float:
        """The least time that a step can take: the slower of moving its bytes and doing its operations."""
        return max(costs.bytes / self.bytes_per_second, costs.operations / self.operations_per_second)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """The medians of nine large copies and nine large matrix products in this dtype, now, on this device."""
    is_gpu = device.type == "cuda"
    elements = 2**30 if is_gpu else 2**26
    source = torch.ones(elements // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy_seconds = _median_seconds(lambda: target.copy_(source), device)
    side = 8192 if is_gpu else 1536
    left = torch.ones(side, side, dtype=dtype, device=device)
    right, product = left.clone(), torch.empty_like(left)
    product_seconds = _median_seconds(lambda: torch.mm(left, right, out=product), device)
    return Roofline(2 * elements / copy_seconds, 2 * side**3 / product_seconds)


def _median_seconds(run, device: torch.device, rounds: int = 9) -> float:
    samples = []
    for _ in range(rounds + 2):
        samples.append(seconds_of(run, device))
    return sorted(samples[2:])[rounds // 2]  # the first two warm up


OVERHEAD = 0.08  # of the memory: allocator, activations and libraries


def memory_needed(config: PretrainedConfig, *, context: int, batch: int, element_size: int) -> int:
    """Bytes of weights (embeddings too, once where they are tied) and of a full cache."""
    widths = widths_of(config)
    embeddings = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    elements = weight_elements(config, widths) + embeddings + batch * context * kv_elements_per_token(widths)
    return elements * element_size


def longest_context(config: PretrainedConfig, memory: int, *, batch: int = 1, element_size: int) -> int:
    """Tokens of context for each of `batch` sequences that fit in `memory` bytes beside the weights; at least 0."""
    room = (1 - OVERHEAD) * memory - memory_needed(config, context=0, batch=batch, element_size=element_size)
    return max(0, int(room // (batch * kv_elements_per_token(widths_of(config)) * element_size)))


def largest_batch(config: PretrainedConfig, memory: int, *, context: int, element_size: int) -> int:
    """Sequences of `context` tokens that fit in `memory` bytes beside the weights; at least 0."""
    room = (1 - OVERHEAD) * memory - memory_needed(config, context=0, batch=1, element_size=element_size)
    return max(0, int(room // (context * kv_elements_per_token(widths_of(config)) * element_size)))
