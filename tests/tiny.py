"""Tiny seeded Llamas, and the oracle that narrowed models are held against: the dense model with zeroed dimensions."""

import copy

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from transact import CRITERIA, PRESETS, LayerPlan, LayerScores, Plan, Widths, calibrate
from transact.allocate import removal_losses
from transact.widths import has_query_key_norm, head_dim_of

VARIANTS = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "llama3-rope": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0],
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": YARN,
    "yarn with its own attention factor": {**YARN, "attention_factor": 1.5, "beta_fast": 16, "truncate": False},
    "longrope": LONGROPE,
    "longrope with its own attention factor": {**LONGROPE, "attention_factor": 0.7},
}  # fmt: skip


NARROWING = [name for name, recipe in PRESETS.items() if recipe.depth == "none"]  # presets; others drop whole layers
FAMILIES = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def tiny_relative(family: str, *, seed: int = 0, layers: int = 2) -> torch.nn.Module:
    """A tiny GQA model of a family that is pruned as Llama is."""
    torch.manual_seed(seed)
    config_class, model_class, settings = FAMILIES[family]
    config = config_class(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        **settings,
    )
    return _unsettled(model_class(config).eval())


def tiny_llama(variant: str = "gqa", *, seed: int = 0, layers: int = 2, head_dim: int = 16) -> LlamaForCausalLM:
    """A Llama of hidden size 48 with `head_dim` dimensions a head; biases and norms are random too, not 0 and 1."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"tie_word_embeddings": False, **VARIANTS[variant]},
        vocab_size=97,
        hidden_size=48,
        head_dim=head_dim,
        intermediate_size=40,
        num_hidden_layers=layers,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return _unsettled(LlamaForCausalLM(config).eval())


def llama_with(**settings) -> LlamaForCausalLM:
    """The tiny GQA Llama with another configuration that has the same weights."""
    dense = tiny_llama("gqa")
    model = LlamaForCausalLM(LlamaConfig(**{**dense.config.to_dict(), **settings})).eval()
    model.load_state_dict(dense.state_dict())
    return model


@torch.no_grad()
def _unsettled(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.mul_(8)  # attention far from uniform, or errors in it would not show
    return model


def random_plan(config: LlamaConfig, *, seed: int = 0, drop_heads: bool = False) -> Plan:
    """A plan of random widths and random kept indices, different in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def subset(of: int, size: int) -> torch.Tensor:
        return torch.randperm(of, generator=generator)[:size].sort().values

    def layer() -> LayerPlan:
        kv_heads = config.num_key_value_heads
        kept = subset(kv_heads, integer(1, kv_heads)) if drop_heads else torch.arange(kv_heads)
        head_dim = head_dim_of(config)
        pairs, dims = integer(1, head_dim // 2), integer(1, head_dim)
        if has_query_key_norm(config):
            pairs = head_dim // 2
        return LayerPlan(
            kv_heads=kept,
            rope_pairs=torch.stack([subset(head_dim // 2, pairs) for _ in kept]),
            value_dims=torch.stack([subset(head_dim, dims) for _ in kept]),
            mlp_dims=subset(config.intermediate_size, integer(1, config.intermediate_size)),
        )

    return Plan(tuple(layer() for _ in range(config.num_hidden_layers)))


def plain_plan(config: LlamaConfig, *, head_dim: int, mlp: int = 24) -> Plan:
    """A plan that a plain Llama holds without padding: the same RoPE pairs and widths in all heads and layers."""
    kv_heads = config.num_key_value_heads
    return Plan(
        tuple(
            LayerPlan(
                kv_heads=torch.arange(kv_heads),
                rope_pairs=torch.arange(head_dim_of(config) // 2)[-head_dim // 2 :].repeat(kv_heads, 1),
                value_dims=torch.arange(head_dim).repeat(kv_heads, 1),
                mlp_dims=torch.arange(mlp),
            )
            for _ in range(config.num_hidden_layers)
        )
    )


def scores_of(model: LlamaForCausalLM, criterion: str, windows: torch.Tensor | None = None) -> list[LayerScores]:
    """Scores of all layers by a criterion of the table, from `windows` of token ids where it needs them."""
    one = CRITERIA[criterion]
    statistics = [None] * len(model.model.layers)
    if one.needs:
        gradients = next((of for of in ("outputs", "weights") if of in one.needs), None)
        statistics = calibrate(model, windows, second_moments="moments" in one.needs, gradients=gradients).layers
    return [one.score(layer, index, statistics[index]) for index, layer in enumerate(model.model.layers)]


def searched_loss(scores: list[LayerScores], widths: tuple[Widths, ...]) -> float:
    """What a search goes by: predicted losses. All of dropped attention is values'."""
    return sum(
        ((removal_losses(layer.rope_pairs)[one.qk_head_dim // 2] if one.v_head_dim else 0)
         + removal_losses(layer.value_dims)[one.v_head_dim] + removal_losses(layer.mlp_dims)[one.mlp]).item()
        for layer, one in zip(scores, widths, strict=True)
    )  # fmt: skip


@torch.no_grad()
def zeroed(dense: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    """The dense model with the rows and columns of everything dropped set to zero: written with loops, on purpose."""
    model = copy.deepcopy(dense)
    config = model.config
    width, group = head_dim_of(config), config.num_attention_heads // config.num_key_value_heads
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        keep_query, keep_value, keep_key, keep_output = set(), set(), set(), set()
        for position, kv_head in enumerate(kept.kv_heads.tolist()):
            for pair in kept.rope_pairs[position].tolist():
                for dim in (pair, pair + width // 2):
                    keep_key.add(kv_head * width + dim)
                    keep_query |= {(kv_head * group + member) * width + dim for member in range(group)}
            for dim in kept.value_dims[position].tolist():
                keep_value.add(kv_head * width + dim)
                keep_output |= {(kv_head * group + member) * width + dim for member in range(group)}
        keep_mlp = set(kept.mlp_dims.tolist())
        rows = {attention.q_proj: keep_query, attention.k_proj: keep_key, attention.v_proj: keep_value}
        for linear, keep in (rows | {mlp.gate_proj: keep_mlp, mlp.up_proj: keep_mlp}).items():
            for row in set(range(linear.out_features)) - keep:
                linear.weight[row] = 0
                if linear.bias is not None:
                    linear.bias[row] = 0
        for linear, keep in ((attention.o_proj, keep_output), (mlp.down_proj, keep_mlp)):
            for column in set(range(linear.in_features)) - keep:
                linear.weight[:, column] = 0
    return model
