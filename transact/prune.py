"""Surgery: cut a dense Llama down to a plan, by exact slices. No data, no randomness."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .calibration import Statistics, calibrate
from .configuration_transact import TransActConfig
from .criteria import LayerScores, criterion_by_name
from .modeling_transact import TransActForCausalLM
from .plan import LayerPlan, Plan, Widths, select, uniform_widths


def check_prunable(model: nn.Module) -> None:
    """Raise ValueError unless `model` is a dense `LlamaForCausalLM` whose weights are all finite."""
    if not isinstance(model, LlamaForCausalLM) or isinstance(model, TransActForCausalLM):
        raise ValueError(f"only a dense LlamaForCausalLM can be pruned, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        # a sum is non-finite where any element is, and needs no mask as large as the weight
        if not parameter.detach().sum(dtype=torch.float64).isfinite():
            raise ValueError(f"the model's weights are not finite: {name} holds NaN or infinity")


def narrowed_config(dense: LlamaConfig, widths: Sequence[Widths]) -> TransActConfig:
    """The dense configuration with the widths of every layer added."""
    settings = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        settings.pop(key, None)
    return TransActConfig(
        **settings,
        kv_head_counts=[w.kv_heads for w in widths],
        qk_head_dims=[w.qk_head_dim for w in widths],
        v_head_dims=[w.v_head_dim for w in widths],
        intermediate_sizes=[w.mlp for w in widths],
    )


def projection_indices(plan: LayerPlan, config: LlamaConfig) -> dict[str, tuple[int, torch.Tensor]]:
    """For each linear module of a layer, the dimension to slice (0 rows, 1 columns) and the dense indices to keep.

    Rows of q and k stay in Hugging Face's order: first halves of all kept RoPE pairs, then second halves.
    """
    head_dim, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    kv_heads = plan.kv_heads[:, None]
    query_heads = (kv_heads * group + torch.arange(group)).reshape(-1, 1)  # (kept heads * group, 1)
    pair_dims = torch.cat((plan.rope_pairs, plan.rope_pairs + head_dim // 2), dim=1)  # (kept heads, qk_head_dim)

    def per_query_head(dims: torch.Tensor) -> torch.Tensor:
        return (query_heads * head_dim + dims.repeat_interleave(group, dim=0)).flatten()

    return {
        "self_attn.q_proj": (0, per_query_head(pair_dims)),
        "self_attn.k_proj": (0, (kv_heads * head_dim + pair_dims).flatten()),
        "self_attn.v_proj": (0, (kv_heads * head_dim + plan.value_dims).flatten()),
        "self_attn.o_proj": (1, per_query_head(plan.value_dims)),
        "mlp.gate_proj": (0, plan.mlp_dims),
        "mlp.up_proj": (0, plan.mlp_dims),
        "mlp.down_proj": (1, plan.mlp_dims),
    }


@torch.no_grad()
def apply_plan(dense: LlamaForCausalLM, plan: Plan) -> TransActForCausalLM:
    """The narrowed model: a new one whose weights are bit-identical slices of the dense model's, same device and dtype.

    The dense model is left as it was and shares no memory with the result. Raises ValueError where the plan does not
    fit the model.
    """
    plan.check(dense.config)
    config = narrowed_config(dense.config, plan.widths)
    config._attn_implementation = dense.config._attn_implementation
    with torch.device("meta"):  # no memory and no random initialisation for weights that are replaced at once
        narrowed = TransActForCausalLM(config)

    dense_weights = dense.state_dict()
    weights = {}
    for index, layer in enumerate(plan.layers):
        prefix = f"model.layers.{index}.self_attn"
        weights[f"{prefix}.rope_pairs"] = layer.rope_pairs.to(dense_weights[f"{prefix}.k_proj.weight"].device)
        for module, (dim, kept) in projection_indices(layer, dense.config).items():
            name = f"model.layers.{index}.{module}"
            kept = kept.to(dense_weights[f"{name}.weight"].device)
            weights[f"{name}.weight"] = dense_weights[f"{name}.weight"].index_select(dim, kept)
            if dim == 0 and f"{name}.bias" in dense_weights:  # o's and down's belong to the residual stream: whole
                weights[f"{name}.bias"] = dense_weights[f"{name}.bias"][kept]
    for name in dense_weights.keys() - weights.keys():
        weights[name] = dense_weights[name].clone()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    narrowed.load_state_dict(weights, strict=True, assign=True)
    narrowed.model.rotary_emb = copy.deepcopy(dense.model.rotary_emb)  # its tables are not in the state dict
    narrowed.tie_weights()
    narrowed.generation_config = copy.deepcopy(dense.generation_config)
    narrowed.requires_grad_(True)
    return narrowed.train(dense.training)


def score(dense: LlamaForCausalLM, criterion: object, statistics: Statistics | None = None) -> list[LayerScores]:
    """Scores of every layer by `criterion` (see `CRITERIA`).

    Raises ValueError where the criterion needs statistics and there are none, or where a score is not finite.
    """
    if criterion.needs_statistics and statistics is None:
        raise ValueError(f"criterion {type(criterion).__name__} needs statistics: run calibrate(model, windows) first")
    layers = dense.model.layers
    per_layer = statistics.layers if statistics else [None] * len(layers)
    return [criterion.score(layer, index, per_layer[index]) for index, layer in enumerate(layers)]


def prune(
    dense: LlamaForCausalLM,
    windows: torch.Tensor | None = None,
    *,
    ratio: float = 0.2,
    widths: Sequence[Widths] | None = None,
    criterion: str | object = "activation",
    seed: int = 0,
    progress: bool = False,
) -> tuple[TransActForCausalLM, Plan]:
    """The narrowed model and its plan, calibrated on `windows` (samples, length) of token ids.

    `ratio` is the fraction removed of the decoder layers' linear parameters; `widths` names them instead. `criterion`
    is a name of `CRITERIA` or an instance. `windows` may be left out where the criterion needs no text.
    """
    check_prunable(dense)
    if isinstance(criterion, str):
        criterion = criterion_by_name(criterion, seed=seed)
    widths = uniform_widths(dense.config, ratio) if widths is None else widths
    if criterion.needs_statistics and windows is None:
        raise ValueError(f"criterion {type(criterion).__name__} needs calibration windows, got none")
    statistics = calibrate(dense, windows, progress=progress) if criterion.needs_statistics else None
    plan = select(score(dense, criterion, statistics), widths)
    return apply_plan(dense, plan), plan
