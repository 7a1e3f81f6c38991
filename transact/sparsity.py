"""2:4 sparsity: of every four consecutive inputs of each output of a linear layer, two weights are zero.

Weights stay where and as large as they are: only kernels that know of the zeros (of CUDA devices) are faster by them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from .entry import undisturbed
from .walk import LayerWalk
from .widths import Widths

SPARSITIES = ("none", "wanda-2:4", "magnitude-2:4")
GROUP, KEPT = 4, 2


def linears_of(layer: nn.Module) -> list[nn.Linear]:
    """The linear modules of a decoder layer."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def check_sparse_widths(sparsity: str, config: PretrainedConfig, widths: Sequence[Widths]) -> None:
    """Raise ValueError, with the multiple to prune with, where inputs of a linear module do not come in fours."""
    group = config.num_attention_heads // config.num_key_value_heads
    for one in widths:
        for name, inputs, advice in (
            ("hidden states", config.hidden_size, "it cannot be had of this model"),
            ("o_proj", one.kv_heads * group * one.v_head_dim,
             f"name --mha-dim, a multiple of {GROUP}, or in the library widths with head_multiple={GROUP}"),
            ("down_proj", one.mlp,
             f"name --mlp-dim, a multiple of {GROUP}, or in the library widths with mlp_multiple={GROUP}"),
        ):  # fmt: skip
            if inputs % GROUP:
                raise ValueError(
                    f"sparsity {sparsity!r} keeps {KEPT} of every {GROUP} inputs, which {inputs} of {name} do not "
                    f"divide into: {advice}"
                )


def make_sparse(
    model: nn.Module,
    sparsity: str,
    windows: torch.Tensor | None = None,
    *,
    device: torch.device | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = False,
) -> None:
    """Set two of every four weights of the decoder's linear modules to zero, in place; the others stay as they are.

    Kept are the largest |weight| ("magnitude-2:4"), or the largest |weight| x L2 norm of its input over the tokens of
    `windows` ("wanda-2:4"; Sun et al., ICLR 2024), taken layer by layer behind layers that are sparse already. A
    `device` computes one block at a time there. Raises ValueError where an input is not finite.
    """
    if sparsity == "magnitude-2:4":
        for layer in model.model.layers:
            for linear in linears_of(layer):
                _keep_largest(linear, torch.ones(linear.in_features, device=linear.weight.device))
        return
    with undisturbed(model), torch.no_grad():
        walk = LayerWalk(model, windows.split(max(1, tokens_per_batch // windows.shape[1])), device=device)
        for index, layer in walk.blocks(changes=True, desc="sparsify", disable=None if progress else True):
            for linear, norms in zip(linears_of(layer), _input_norms(walk, index, layer), strict=True):
                _keep_largest(linear, norms)
            for batch in range(len(walk.hidden)):
                walk.advance(index, layer, batch)


def _input_norms(walk: LayerWalk, index: int, layer: nn.Module) -> list[torch.Tensor]:
    """The L2 norm of each input of every linear module of a block over all tokens, float32."""
    squares = dict.fromkeys(linears_of(layer), 0.0)

    def add(linear: nn.Linear, inputs: tuple[torch.Tensor]) -> None:
        squares[linear] = squares[linear] + inputs[0].flatten(0, -2).float().square().sum(dim=0).double()

    handles = [linear.register_forward_pre_hook(add) for linear in squares]
    try:
        for batch in range(len(walk.hidden)):
            walk.run(index, layer, batch)
    finally:
        for handle in handles:
            handle.remove()
    norms = [total.sqrt().float() for total in squares.values()]
    if not all(one.isfinite().all() for one in norms):
        raise ValueError(f"layer {index}: the activations are not finite; check the model's weights")
    return norms


@torch.no_grad()
def _keep_largest(linear: nn.Linear, norms: torch.Tensor) -> None:
    """Zero the weights that do not have one of the two largest |weight| x norm of their group."""
    scores = (linear.weight.abs().float() * norms).unflatten(1, (-1, GROUP))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(KEPT, dim=-1).indices, True)
    linear.weight.masked_fill_(~kept.flatten(1), 0)


def is_sparse(model: nn.Module) -> bool:
    """Whether at least two of every four weights of all linear modules of the decoder are zero."""
    return all(
        linear.in_features % GROUP == 0
        and ((linear.weight == 0).unflatten(1, (-1, GROUP)).sum(dim=-1) >= GROUP - KEPT).all()
        for linear in _linears(model)
    )


def zero_fraction(model: nn.Module) -> float:
    """The fraction of the decoder layers' linear weights that are zero."""
    counts = [((linear.weight == 0).sum().item(), linear.weight.numel()) for linear in _linears(model)]
    return sum(zeros for zeros, _ in counts) / sum(weights for _, weights in counts)


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    return (linear for layer in model.model.layers for linear in linears_of(layer))
