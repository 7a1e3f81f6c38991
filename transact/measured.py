"""Measured sensitivity: what the model pruned so far says of each module corrects the losses that were predicted.

Legend: L layers, T tokens, D hidden size.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from .allocate import dropping_losses, removal_losses
from .calibration import LayerStatistics, Moments, held_out_split
from .compensate import compensate_on_dense_inputs
from .plan import select
from .prune import apply_plan
from .scores import LayerScores, scaled
from .walk import LayerWalk, in_pieces, on_device, sent
from .widths import Widths

TOKENS = TOKENS_PER_BATCH = 1024
RIDGE = 0.01  # of the closed-form refit that the measured models have
STEP = 0.7  # of the way, in logarithms, that each round takes the factors to what it measures
TRUST = 0.75  # of the way that the widths follow them: a thousand tokens say it with noise
FLOOR, MOST = 0.02, 10.0  # losses below this part of the mean are not told from nothing; factors of a round


def measured_scores(
    model: nn.Module,
    scores: Sequence[LayerScores],
    statistics: Sequence[LayerStatistics],
    windows: torch.Tensor,
    widths_by: Callable[[Sequence[LayerScores]], tuple[Widths, ...]],
    *,
    rounds: int,
    home: torch.device | None = None,
    progress: bool = False,
) -> list[LayerScores]:
    """Cumulative scores by which `widths_by` finds widths, once the pruned model's own sensitivity has corrected them.

    Losses are predicted for each module alone, from the dense model's gradients; errors of several modules add up
    otherwise. In each round the model is pruned to the widths found so far and refitted in closed form, and on windows
    held out of that refit one backward pass of its KL divergence to `model` gives for every module d KL / d (its share
    of its own error). For a quadratic loss of independent errors that is twice the module's loss; the quotient of half
    of it and the predicted loss becomes the factor of the module's scores. The pruned models lie with `model`, or at
    `home`, from where one block at a time comes to it. Raises ValueError where gradients are not finite.
    """
    held_out = held_out_split(windows)[1]
    held_out = (held_out if len(held_out) else windows)[: max(1, TOKENS // windows.shape[1])]
    fitted = [fitted_alone(layer) for layer in statistics]
    final = final_states(model, held_out)
    factors = torch.ones(len(scores), 3, dtype=torch.float64)
    for _ in tqdm(range(rounds), desc="measure", unit="round", disable=None if progress else True):
        current = _scaled(scores, factors)
        widths = widths_by(current)
        plan = select(current, widths)
        narrowed = apply_plan(model, plan, home=home).requires_grad_(False)
        if home is None:
            for mine, its in (
                (narrowed.model.embed_tokens, model.model.embed_tokens),
                (narrowed.lm_head, model.lm_head),
            ):
                mine.weight.data = its.weight.data  # nothing narrows or refits them, and this model does not last
        with warnings.catch_warnings(action="ignore"):  # of few tokens: the refit that comes after says it once
            compensate_on_dense_inputs(narrowed, model, plan, fitted, ridge=RIDGE)
        measured = error_slopes(narrowed, model, held_out, final, device=home and model.device).clamp(min=0) / 2
        if not measured.isfinite().all():
            raise ValueError("gradients of the pruned model are not finite; load the model in bfloat16 or float32")
        del narrowed  # before the next is made
        factors = _next_factors(factors, measured, _predicted(scores, widths))
    return _scaled(scores, factors**TRUST)


def fitted_alone(layer: LayerStatistics) -> LayerStatistics:
    """The statistics without gradients and without moments of held-out tokens: what measuring needs of every layer."""

    def alone(moments: tuple[Moments, Moments]) -> tuple[Moments, Moments]:
        return moments[0], Moments.empty(0, moments[0].sum.device)

    return replace(
        layer, attention_moments=alone(layer.attention_moments), mlp_moments=alone(layer.mlp_moments), gradients=None
    )  # fmt: skip


def _scaled(scores: Sequence[LayerScores], factors: torch.Tensor) -> list[LayerScores]:
    return [scaled(layer, *row) for layer, row in zip(scores, factors.tolist(), strict=True)]


def _predicted(scores: Sequence[LayerScores], widths: Sequence[Widths]) -> torch.Tensor:
    """Predicted losses at these widths, nats a token: (L, 3), of query-key pairs, values and MLPs."""
    rows = []
    for layer, width in zip(scores, widths, strict=True):
        pairs, (values, mlp) = 0.0, dropping_losses(layer)  # of dropped attention all is values'
        if width.has_attention:
            pairs = removal_losses(layer.rope_pairs)[width.qk_head_dim // 2]
            values = removal_losses(layer.value_dims)[width.v_head_dim]
        rows.append((pairs, values, removal_losses(layer.mlp_dims)[width.mlp] if width.has_mlp else mlp))
    return torch.tensor(rows, dtype=torch.float64)


def _next_factors(factors: torch.Tensor, measured: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Part of the way from `factors` to measured over predicted; modules that lose nothing keep theirs."""
    floor = FLOOR * predicted.mean()
    quotients = ((measured + floor * factors) / (predicted + floor)).clamp(1 / MOST, MOST)
    return torch.where(predicted > 0, factors ** (1 - STEP) * quotients**STEP, factors)


@torch.no_grad()
def final_states(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """What enters the language-model head, for all windows: (samples, length, D)."""
    walk = LayerWalk(model, windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])))
    for index, layer in walk.blocks(disable=True):
        for batch in range(len(walk.hidden)):
            walk.advance(index, layer, batch)
    return torch.cat([model.model.norm(hidden.to(model.model.norm.weight.device)) for hidden in walk.hidden])


def error_slopes(
    narrowed: nn.Module,
    dense: nn.Module,
    windows: torch.Tensor,
    final: torch.Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> torch.Tensor:
    """d KL(dense || narrowed) / d share, nats a token, of each module's own error: (L, 3), float64.

    The errors are what pruning pairs, values and MLP dimensions adds to a module's output for the narrowed model's
    own inputs; a share of 1 is the narrowed model. Columns: query-key pairs, values, MLPs (all of dropped attention is
    values'). Both models have the dense one's head, which pruning leaves alone. `final` are the dense model's
    `final_states` of the windows, where they are at hand. A narrowed model that lies elsewhere than the dense one is
    computed block by block on that one's `device`.
    """
    final = final_states(dense, windows) if final is None else final
    batches = windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
    walk = LayerWalk(narrowed, batches, device=device)
    inputs, above = walk.inputs(disable=True), []
    norm, head = narrowed.model.norm, dense.lm_head
    with on_device(norm, device), on_device(head, device):
        for entering, wanted in zip(walk.hidden, final.split([len(batch) for batch in batches]), strict=True):
            above.append(_gradient_of_the_head(norm, head, entering, wanted))
    slopes = torch.zeros(len(inputs), 3, dtype=torch.float64)
    for index, (layer, before) in reversed([*enumerate(zip(narrowed.model.layers, dense.model.layers, strict=True))]):
        walk.hidden = inputs.pop()
        with on_device(layer, device), on_device(before, device), _stood_in(layer, before):
            for batch in range(len(batches)):
                with _seen(layer) as seen:
                    walk.back(index, layer, above, batch)
                with torch.no_grad():
                    slopes[index] += _slopes_of_layer(layer, before, seen)
    return slopes / windows.numel()


def _gradient_of_the_head(
    norm: nn.Module, head: nn.Module, entering: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """The gradient of the summed KL(dense || narrowed) at `entering`, the narrowed model's last hidden states.

    `norm` is the narrowed model's, `wanted` what enters the head in the dense one.
    """
    hidden = sent(entering.detach(), norm.weight.device).requires_grad_()
    given = norm(hidden)
    given.backward(_divergence_gradient(head, given.detach(), wanted))
    return hidden.grad.to(entering)


def _divergence_gradient(head: nn.Module, given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The gradient of the summed KL(dense || narrowed) at `given`, which enters the head as `wanted` does densely."""
    gradient = torch.empty_like(given)
    for mine, theirs, into in zip(*(in_pieces(one, head) for one in (given, wanted, gradient)), strict=True):
        mine = mine.detach().requires_grad_()
        logits = head(mine)
        with torch.no_grad():
            theirs = head(sent(theirs, head.weight.device))
            surplus = logits.float().softmax(dim=-1).sub_(theirs.float().softmax(dim=-1))
        into.copy_(torch.autograd.grad(logits, mine, surplus.to(logits.dtype))[0])
    return gradient


class _Silent(nn.Module):
    """Gives nothing, at which there is a gradient nevertheless."""

    def forward(self, hidden_states: torch.Tensor, **arguments):
        nothing = 0 * hidden_states
        return (nothing, None) if arguments else nothing  # as attention, or as an MLP


@contextmanager
def _stood_in(layer: nn.Module, before: nn.Module) -> Iterator[None]:
    """The layer has meanwhile silent modules behind the dense layer's norms in the place of dropped ones."""
    pairs = (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))
    dropped = [(name, norm) for name, norm in pairs if getattr(layer, name) is None]
    for name, norm in dropped:
        setattr(layer, name, _Silent())
        setattr(layer, norm, getattr(before, norm))
    try:
        yield
    finally:
        for pair in dropped:
            for name in pair:
                setattr(layer, name, None)


@contextmanager
def _seen(layer: nn.Module) -> Iterator[dict]:
    """Of a layer's attention and MLP what it is called with and its output, whose gradient is kept."""
    seen = {}

    def keep(module: nn.Module, inputs: tuple, keywords: dict, output):
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        seen[module] = inputs, keywords, output

    handles = [
        module.register_forward_hook(keep, with_kwargs=True) for module in (layer.self_attn, layer.mlp)
    ]  # fmt: skip
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _slopes_of_layer(layer: nn.Module, before: nn.Module, seen: dict) -> torch.Tensor:
    def along(error: torch.Tensor, output: torch.Tensor) -> float:
        return (error.float() * output.grad.float()).sum().item()

    inputs, keywords, output = seen[layer.self_attn]
    whole = before.self_attn(*inputs, **keywords)[0]
    pairs_gone = whole
    if not isinstance(layer.self_attn, _Silent):
        pairs_gone = _with_values_of(layer.self_attn, before.self_attn)(*inputs, **keywords)[0]
    pairs, values = along(pairs_gone - whole, output), along(output - pairs_gone, output)
    inputs, _, output = seen[layer.mlp]
    return torch.tensor([pairs, values, along(output - before.mlp(*inputs), output)], dtype=torch.float64)


def _with_values_of(narrowed: nn.Module, dense: nn.Module) -> nn.Module:
    """The narrowed attention with the dense one's values: its queries and keys alone are pruned."""
    mixed = copy.copy(narrowed)
    mixed._modules = narrowed._modules | {"v_proj": dense.v_proj, "o_proj": dense.o_proj}
    mixed.v_head_dim = dense.v_proj.out_features // narrowed.kv_heads
    return mixed
