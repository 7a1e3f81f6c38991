"""A model as an ExecuTorch program, which phones run by XNNPACK: dense or narrowed, each layer at its own widths.

A program is traced from the model itself: nothing has to be stated in another format's words, and nothing is padded.
Its one method takes and gives what ExecuTorch's own runners of language models expect; its KV cache is inside.
"""

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import eager_mask

from .._transformers import without_logs
from ..modeling_transact import CACHE
from ..whitelist import check_exportable, check_weights
from ..widths import widths_of

PROGRAM_TYPES = ("f32", "int8")
CONTEXT = 1024  # tokens that a program has room for, where neither the caller nor the model says less
ATTENTION = "transact_program"  # our name among transformers' attention functions


def context_of(config: PretrainedConfig, context: int | None = None, kind: str = "f32") -> int:
    """The tokens that a program of this model has room for: `context`, or as many as `CONTEXT` at most.

    Raises ValueError for a context or type that there is not, for a model that cannot be a program, and where
    executorch is not installed.
    """
    if kind not in PROGRAM_TYPES:
        raise ValueError(f"unknown type of a program {kind!r}, allowed: {', '.join(PROGRAM_TYPES)}")
    longest = config.max_position_embeddings
    if context is not None and not 2 <= context <= longest:
        raise ValueError(f"context must be from 2 to the model's {longest} tokens, got {context}")
    check_exportable(config, "executorch")
    if importlib.util.find_spec("executorch") is None:
        raise ValueError("a program is made by executorch, the extra [phone]: python -m pip install executorch==1.5.1")
    return min(CONTEXT, longest) if context is None else context


def attend_in_groups(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention without copies of the cache: the query heads of a key-value head are rows of one product.

    Keys and values may differ in width.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    split = (heads // kv_heads, length)
    query = (query * scaling).reshape(batch, kv_heads, split[0] * length, width)
    scores = torch.matmul(query, key.transpose(2, 3)).unflatten(2, split) + attention_mask.unsqueeze(2)
    output = torch.matmul(scores.softmax(dim=-1).flatten(2, 3), value).unflatten(2, split)
    return output.flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend_in_groups)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class PlacedLayer(StaticLayer):
    """The keys and values of a layer (1, heads, context, width), written where `places` (length) says."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.places, self.is_initialized = keys, values, places, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # ExecuTorch writes this in place where both have as many dimensions, and indexing would drop those of 1. By
        # index_copy_ every token would move the whole cache.
        for cache, states in ((self.keys, key_states), (self.values, value_states)):
            torch.ops.aten.index_put_(cache, [None, None, self.places], states)
        return self.keys, self.values

    def get_seq_length(self) -> torch.Tensor:
        return self.places[0]


class Decoder(nn.Module):
    """What a program computes, and the KV cache that it keeps: `context` tokens, each layer at its own widths."""

    def __init__(self, model: nn.Module, context: int):
        super().__init__()
        self.model = model
        cached = [one for one in widths_of(model.config) if one.has_attention]
        self.entries = len(cached)
        for index, of in enumerate(cached):
            for name, width in (("keys", of.qk_head_dim), ("values", of.v_head_dim)):
                cache = torch.zeros(1, of.kv_heads, context, width)
                self.register_buffer(f"{name}_{index}", cache, persistent=False)

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (1, 1, vocabulary) after the last of `tokens` (1, length), which stand at `places` (length)."""
        layers = [
            PlacedLayer(getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"), places)
            for index in range(self.entries)
        ]
        cache = Cache(layers=layers)
        return self.model(input_ids=tokens, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits


@torch.no_grad()
def traced(model: nn.Module, context: int, kind: str = "f32") -> torch.export.ExportedProgram:
    """A `Decoder` of a copy of the model as a graph, for any number of tokens from 1 to `context`.

    In float32; "int8" makes the linear weights, the head's too, 8-bit integers with a scale for each output, and their
    inputs 8-bit integers with a scale for each token.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    if kind == "int8":
        _quantise(model)
    length = torch.export.Dim("length", max=context)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.arange(2))
    shapes = {"tokens": {1: length}, "places": {0: length}}
    return torch.export.export(Decoder(model, context), example, dynamic_shapes=shapes, strict=False)


def _quantise(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    def is_quantised(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features > 1  # of one input torchao makes no scale

    weights = {"weight_dtype": torch.int8, "weight_granularity": PerAxis(0)}
    quantize_(model, Int8DynamicActivationIntxWeightConfig(**weights), filter_fn=is_quantised)


def write_program(path: Path, model: nn.Module, *, context: int | None = None, kind: str = "f32") -> None:
    """Write a dense or narrowed model as a program (.pte) that ExecuTorch runs on CPUs, phones' among them.

    It has room for `context` tokens (1024, or the model's context where that is shorter), and computes in float32;
    `kind` "int8" has 8-bit integers in its linear layers. Raises ValueError, before anything is done, as `context_of`
    does and where the weights are not those of the configuration.
    """
    context = context_of(model.config, context, kind)
    check_weights(model)
    with _quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(
            traced(model, context, kind),
            partitioner=[XnnpackPartitioner()],
            constant_methods=_stated(model, context),
        )
        in_place = ExecutorchBackendConfig(run_reinplace_pass=True)  # or each token would copy the cache
        program = edge.to_executorch(in_place)
        with path.open("wb") as file:
            program.write_to_file(file)


def _stated(model: nn.Module, context: int) -> dict[str, int | bool | list[int]]:
    """What ExecuTorch's runners of language models ask a program for, by their names."""
    settings = model.generation_config
    ends = settings.eos_token_id
    stated = {
        "get_max_seq_len": context, "get_max_context_len": context, "get_vocab_size": model.config.vocab_size,
        "use_kv_cache": True, "use_sdpa_with_kv_cache": False, "enable_dynamic_shape": True,
    }  # fmt: skip
    if settings.bos_token_id is not None:
        stated["get_bos_id"] = settings.bos_token_id
    if ends is not None:
        stated["get_eos_ids"] = ends if isinstance(ends, list) else [ends]
    return stated


@contextmanager
def _quiet() -> Iterator[None]:
    """What executorch and torch tell of their own insides meanwhile is not shown."""
    with without_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
