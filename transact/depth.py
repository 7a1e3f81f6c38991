"""Whole layers dropped: which, and what makes up for them; the result is a stock model of the same class.

Legend: L layers, D hidden size. The stream s is what enters layer s, stream L what leaves the last layer.
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import accelerate
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .allocate import TOLERANCE
from .calibration import held_out_split
from .entry import has_own_head
from .least_squares import Fit, NormalEquations, fit_projection
from .plan import KEPT_LAYERS, kept_layers_of
from .walk import LayerWalk

# how layers to drop are found, and what may make up for them
DEPTHS = {"influence": ("none", "magnitude"), "run": ("none", "linear"), "clusters": ("none",)}
TOKENS_PER_BATCH = 2048


def layers_to_drop(config: PretrainedConfig, ratio: float) -> int:
    """How many layers are nearest to the fraction `ratio` of their parameters; of two as near the fewer.

    Raises ValueError where that would be none, or all of them.
    """
    layers = config.num_hidden_layers
    count = math.ceil(ratio * layers - 0.5 - 1e-9)
    if ratio and layers == 1:
        raise ValueError(f"ratio {ratio:g} asks for layers to go, and the model has one")
    if ratio and count < 1:
        raise ValueError(f"ratio {ratio:g} is less than half a layer of {layers}: the least is {1 / layers:.3g}")
    if count >= layers:
        raise ValueError(f"ratio {ratio:g} leaves no layer of {layers}: the most is {(layers - 1) / layers:.3g}")
    return count


def warn_of_whole_layers(config: PretrainedConfig, ratio: float) -> None:
    """Warn where the nearest number of layers removes another fraction than the ratio, and name the next one."""
    layers, count = config.num_hidden_layers, layers_to_drop(config, ratio)
    if abs(count / layers - ratio) <= TOLERANCE:
        return
    other = count + 1 if ratio * layers > count else count - 1
    also = f"; {other / layers:.3f} can be had as well" if 0 < other < layers else ""
    warnings.warn(
        f"ratio {ratio:g} is {ratio * layers:.3g} of {layers} layers: {count} of them removed, "
        f"{count / layers:.3f} of the linear parameters{also}",
        stacklevel=2,
    )


@torch.inference_mode(False)
@torch.no_grad()
def without_layers(model: nn.Module, kept: Sequence[int]) -> PreTrainedModel:
    """A stock model of the family that has the layers `kept` alone: new, its weights bit-identical copies.

    Its configuration says which they were, in words that nothing else reads. Raises ValueError unless these are some
    of the model's layers, in their order.
    """
    kept, layers = list(kept), model.config.num_hidden_layers
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
        raise ValueError(f"kept must name some of layers 0 to {layers - 1}, ascending, got {kept}")
    config, already = copy.deepcopy(model.config), kept_layers_of(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    config.tie_word_embeddings = not has_own_head(model)
    setattr(config, KEPT_LAYERS, [already[layer] for layer in kept] if already else kept)
    with torch.device("meta"):  # no memory and no random initialisation for weights that are replaced at once
        fewer = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)
    names = {name: _place_of(name, kept) for name in model.state_dict()}
    weights = {names[name]: tensor.clone() for name, tensor in model.state_dict().items() if names[name]}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    fewer.load_state_dict(weights, strict=True, assign=True)
    fewer.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its tables are not in the state dict
    fewer.tie_weights()
    fewer.generation_config = copy.deepcopy(model.generation_config)
    fewer.requires_grad_(True)
    device_map = getattr(model, "hf_device_map", None) or {}
    if len(set(device_map.values())) > 1:  # over several devices hidden states are handed on as in the model
        places = {_place_of(name, kept): device for name, device in device_map.items()}
        accelerate.dispatch_model(fewer, {name: device for name, device in places.items() if name is not None})
    return fewer.train(model.training)


def _place_of(name: str, kept: Sequence[int]) -> str | None:
    """What is called so in a model of the layers `kept` alone; None for a part of another layer."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 3:
        return name
    if int(parts[2]) not in kept:
        return None
    return ".".join((*parts[:2], str(kept.index(int(parts[2]))), *parts[3:]))


def _walk(model: nn.Module, windows: torch.Tensor, device: torch.device | None) -> LayerWalk:
    return LayerWalk(model, windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])), device=device)


def _check_finite(layer: int, value: torch.Tensor) -> None:
    if not value.isfinite().all():
        raise ValueError(f"layer {layer}: what it gives is not finite; check the model's weights")


def block_influences(
    walk: LayerWalk, indices: Iterable[int], factors: Mapping[int, float], *, progress: bool = False
) -> Iterator[tuple[int, float, float, list[torch.Tensor]]]:
    """Walk through layers: of each its index, its block influence, how much it makes the stream grow, and what entered.

    The influence is one less the cosine between what enters and what leaves the layer, the mean over tokens (Men et
    al., "ShortGPT", 2403.03853). The growth is the mean over channels of the ratio of mean absolute values (Chen et
    al., "Prune&Comp", 2507.18212, as their code has it). Instead of a layer in `factors` the stream is multiplied by
    its factor. Raises ValueError where hidden states are not finite.
    """
    for index, layer in walk.blocks(indices, desc="influence", disable=None if progress else True):
        if index in factors:
            for hidden in walk.hidden:
                hidden.mul_(factors[index])
            continue
        entered, cosines, sizes = [hidden.clone() for hidden in walk.hidden], [], []
        for batch, hidden in enumerate(entered):
            walk.advance(index, layer, batch)
            before, after = hidden.float(), walk.hidden[batch].float()
            cosines.append(cosine_similarity(before, after, dim=-1).sum(dtype=torch.float64))
            sizes.append(torch.stack([stream.abs().sum(dim=(0, 1), dtype=torch.float64) for stream in (before, after)]))
        before, after = torch.stack(sizes).sum(dim=0)
        _check_finite(index, after)
        growth = (after / before)[before > 0]  # a channel that holds nothing has no ratio
        influence = 1 - torch.stack(cosines).sum().item() / sum(hidden.shape[:2].numel() for hidden in entered)
        yield index, influence, growth.mean().item() if len(growth) else 1.0, entered


@torch.no_grad()
def least_influential(
    model: nn.Module,
    windows: torch.Tensor,
    count: int,
    *,
    repair: bool,
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[int, float]:
    """The layers to drop, in the order in which they go, each with the factor that takes its place.

    The one of least influence goes, and influences are measured again without it (ShortGPT's authors measure once),
    from there on: layers before it see no difference. With `repair` its factor is how much it made the stream grow,
    else 1. Up to three streams of all windows are kept.
    """
    factors: dict[int, float] = {}
    influences, growths = {}, {}
    start, entered = 0, None
    while len(factors) < count:
        walk = _walk(model, windows, device)
        if entered:  # what enters the layer that went last: all before it is as it was
            for hidden, kept in zip(walk.hidden, entered, strict=True):
                hidden.copy_(kept)
        influences, entered = {layer: influences[layer] for layer in influences if layer < start}, None
        rest = range(start, model.config.num_hidden_layers)
        for index, influence, growth, stream in block_influences(walk, rest, factors, progress=progress):
            influences[index], growths[index] = influence, growth
            if min(influences, key=influences.get) == index:
                entered = stream
        least = min(influences, key=influences.get)
        factors[least] = growths[least] if repair else 1.0
        del influences[least]
        start = least if entered else 0
    return factors


@torch.inference_mode(False)
@torch.no_grad()
def fold_factors(model: nn.Module, kept: Sequence[int], factors: Mapping[int, float]) -> None:
    """Multiply what the model of the layers `kept` writes into the stream by the factors of layers dropped after it.

    Its normalisations see no difference, so that it computes what it would with each factor in its layer's place. A
    head that is the embedding as well is made up for in the last norm.
    """

    def after(layer: int) -> float:
        return math.prod(factor for dropped, factor in factors.items() if dropped > layer)

    _multiply(model.model.embed_tokens, after(-1))
    if not has_own_head(model):
        _multiply(model.model.norm, 1 / after(-1))
    for index, layer in zip(kept, model.model.layers, strict=True):
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _multiply(module, after(index))


def _multiply(module: nn.Module, factor: float) -> None:
    """Multiply weight and bias; rounded once, from float64."""
    for parameter in module.parameters():
        parameter.copy_(parameter.double() * factor)


@torch.no_grad()
def nearest_run(
    model: nn.Module,
    windows: torch.Tensor,
    count: int,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> range:
    """The `count` layers in a row before which, and after which, the stream is most alike by its cosine over tokens.

    Layer 0 is in none, since what replaces them is folded into an MLP before them (Shopkhoev et al., "ReplaceMe",
    2505.02819). One walk; of every window one in `count` + 1 tokens is compared, the last among them, so that the
    streams which are kept take no more memory than one of all tokens.
    """
    kept, distances = deque(maxlen=count + 1), {}
    for index, stream in _thinned_streams(model, windows, count + 1, device, progress):
        kept.append(stream)
        if len(kept) == count + 1:
            cosine = cosine_similarity(kept[0].float(), kept[-1].float(), dim=-1).mean()
            distances[index + 1 - count] = 1 - cosine.item()
    start = min(distances, key=distances.get)
    return range(start, start + count)


def _thinned_streams(
    model: nn.Module, windows: torch.Tensor, step: int, device: torch.device | None, progress: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each layer's index and what leaves it, (tokens, D): of every window one token in `step`, the last among them."""
    walk = _walk(model, windows, device)
    some = slice((windows.shape[1] - 1) % step, None, step)
    for index, layer in walk.blocks(desc="streams", disable=None if progress else True):
        for batch in range(len(walk.hidden)):
            walk.advance(index, layer, batch)
        stream = torch.cat([hidden[:, some].flatten(0, 1) for hidden in walk.hidden])
        _check_finite(index, stream)
        yield index, stream


@torch.no_grad()
def clustered_layers(
    model: nn.Module,
    windows: torch.Tensor,
    count: int,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> list[int]:
    """The layers that stay where `count` go: the middle one of each cluster of layers in a row (the lower of two).

    Every layer begins as a cluster, and the neighbours whose layers are most alike on average become one until enough
    are left (Zhang et al., "CRaSh", 2310.15477, without the sharing: a stock model has no layers that share weights).
    Alike are layers whose outputs have a high CKA with a linear kernel. One walk; of every window one token for
    each layer there is is compared, so that all outputs take no more memory than one stream of all tokens.
    """
    layers = model.config.num_hidden_layers
    streams = [stream.float() for _, stream in _thinned_streams(model, windows, layers, device, progress)]
    alike = linear_cka(streams)
    clusters = [range(layer, layer + 1) for layer in range(layers)]
    while len(clusters) > layers - count:
        joint = [alike[one.start : one.stop, other.start : other.stop].mean() for one, other in pairwise(clusters)]
        place = max(range(len(joint)), key=joint.__getitem__)
        clusters[place : place + 2] = [range(clusters[place].start, clusters[place + 1].stop)]
    return [(cluster.start + cluster.stop - 1) // 2 for cluster in clusters]


def linear_cka(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """How alike every two of L streams (tokens, D) are, (L, L): centred kernel alignment with a linear kernel.

    |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred X and Y (Kornblith et al., 1905.00414); 1 are rotations of each other.
    """
    centred = [stream - stream.mean(dim=0) for stream in streams]
    centred = [stream / stream.norm().clamp(min=torch.finfo(stream.dtype).tiny) for stream in centred]
    shared = torch.tensor([[(one.mT @ other).square().sum().item() for other in centred] for one in centred])
    own = shared.diagonal().sqrt()
    return shared / torch.outer(own, own).clamp(min=torch.finfo(shared.dtype).tiny)


@torch.no_grad()
def linear_map(
    model: nn.Module,
    windows: torch.Tensor,
    run: range,
    *,
    ridge: float | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> Fit:
    """The map (D, D) of the output of the MLP before the `run` that gives best the stream after it.

    What the MLP's output is added to stays as it is (ReplaceMe's least squares). The map is fitted near the identity,
    with a ridge as `fit_projection` has it, where the authors have none. Up to three streams of all windows are kept.
    """
    parts = held_out_split(windows)
    per_batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
    batches = [(part, batch) for part, some in enumerate(parts) if len(some) for batch in some.split(per_batch)]
    walk = LayerWalk(model, [batch for _, batch in batches], device=device)
    home, outputs, starts = walk.hidden[0].device, [], []
    mlp = model.model.layers[run.start - 1].mlp
    handle = mlp.register_forward_hook(lambda module, inputs, output: outputs.append(output.to(home)))
    try:
        for index, layer in walk.blocks(range(run.stop), desc="linear map", disable=None if progress else True):
            if index == run.start:
                starts = [hidden.clone() for hidden in walk.hidden]  # what blocks give takes the place of these
            for batch in range(len(batches)):
                walk.advance(index, layer, batch)
    finally:
        handle.remove()
    size, where = model.config.hidden_size, device or home
    equations = [NormalEquations.empty(size, size, where) for _ in parts]
    for (part, _), output, start, end in zip(batches, outputs, starts, walk.hidden, strict=True):
        output, start, end = (stream.flatten(0, 1).to(where).float() for stream in (output, start, end))
        equations[part].add(output, end - (start - output))
    for sums in equations:
        _check_finite(run[-1], sums.target_sum)
    return fit_projection(torch.eye(size, device=where), *equations, ridge=ridge)


@torch.inference_mode(False)
@torch.no_grad()
def fold_map(linear: nn.Linear, weight: torch.Tensor) -> None:
    """Let the linear module give what `weight` (D, D) makes of what it gave."""
    weight = weight.to(linear.weight.device)
    for parameter in linear.parameters():
        parameter.copy_(weight @ parameter.double())
