"""Other packages that prune, as they ship it, beside ours: the same model, calibration windows and texts.

They are imported in `nox -s rivals` alone, whose environment has them at these versions. Each is asked for what makes
its model lose the same share of the decoder layers' linear parameters; what it does remove is in its row.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

import transact
from transact.models import load_model
from transact.pipeline import check_task
from transact.texts import DEFAULT_CALIBRATION, calibration_sources, mixed, source_names
from transact.widths import check_ratio

from .perplexity import measure_perplexity
from .texts import load_evaluation_texts, windows_of

OURS = ("best", "wanda-sp")


@dataclass(frozen=True)
class Peer:
    """A package at a version, and its pruning of a model, which it may change, by a ratio, on windows (N, T)."""

    version: str
    prune: Callable[[nn.Module, torch.Tensor, float], nn.Module]


def mlp_share(model: nn.Module, ratio: float, package: str) -> float:
    """The share of the MLPs that is to go, where nothing else does. Raises ValueError where that is more than all."""
    share = linear_weights(layer.mlp for layer in model.model.layers) / linear_parameters(model)
    if ratio >= share:
        raise ValueError(f"ratio {ratio} is out of reach of {package}: MLPs are {share:.2f} of the linear parameters")
    return ratio / share


def by_optipfair(model: nn.Module, windows: torch.Tensor, ratio: float) -> nn.Module:
    """MLPs narrowed by peak-to-peak magnitude of weights and norms of activations; attention stays whole."""
    from optipfair import prune_model

    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in windows.split(4)]
    return prune_model(
        model, pruning_type="MLP_GLU", neuron_selection_method="MAW",
        pruning_percentage=100 * mlp_share(model, ratio, "optipfair"), dataloader=batches, show_progress=False,
    )  # fmt: skip


def by_torch_pruning(model: nn.Module, windows: torch.Tensor, ratio: float) -> nn.Module:
    """MLPs narrowed by norms of groups of weights; heads that share keys and values are beyond its tracer."""
    import torch_pruning

    model.config.use_cache = False  # the tracer knows outputs that are tensors
    whole = [layer.mlp.down_proj for layer in model.model.layers] + [model.lm_head]
    for layer in model.model.layers:
        whole += layer.self_attn.children()
    pruner = torch_pruning.pruner.BasePruner(
        model, windows[:1, :8], torch_pruning.importance.GroupMagnitudeImportance(p=2), ignored_layers=whole,
        pruning_ratio=mlp_share(model, ratio, "torch-pruning"),
    )  # fmt: skip
    pruner.step()
    return model


PEERS = {"optipfair": Peer("0.4.2", by_optipfair), "torch-pruning": Peer("1.6.1", by_torch_pruning)}


def check_peers(names: Sequence[str]) -> None:
    """Raise ValueError, in one line, for a package that is not installed or at another version."""
    for name in names:
        wanted = f"{name}=={PEERS[name].version}"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise ValueError(f"{wanted} is not installed: nox -s rivals has it") from error
        if found != PEERS[name].version:
            raise ValueError(f"{wanted} is wanted, {found} is installed: nox -s rivals has it")


def linear_parameters(model: nn.Module) -> int:
    """Weights of the linear modules of the decoder layers, whatever their shapes."""
    return linear_weights(model.model.layers)


def linear_weights(modules: Iterable[nn.Module]) -> int:
    """Weights of the linear modules within these."""
    linears = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
    return sum(linear.weight.numel() for linear in linears)


def peer_rows(
    base: str = "smollm2-135m",
    *,
    peers: Sequence[str] = tuple(PEERS),
    ratio: float = 0.3,
    samples: int = 24,
    length: int = 256,
    calibration: str = DEFAULT_CALIBRATION,
    evaluation: str = "embedded",
    count: int | None = 20,
    timed: Callable[[nn.Module, nn.Module], Mapping[str, float]] = lambda model, dense: {},
) -> Iterator[tuple[dict, dict]]:
    """Case and row of the dense model, of ours and of each peer, in float32 on the CPU.

    A row is `method` (a package with its version, or a preset of ours), `fraction_removed`, `parameters`, `prune_s`
    and, of every text that `evaluation` names, the perplexity of its first `count` windows and their `losses`, and what
    `timed` gives for a pruned model and the dense one. Raises ValueError, before anything is pruned, for what is not
    installed or asked for wrongly.
    """
    check_peers(peers)
    check_ratio("ratio", ratio)
    source_names(calibration)
    texts = load_evaluation_texts(evaluation)
    dense, tokenizer = load_model(base, dtype="float32", device="cpu")
    for name in OURS:
        check_task(dense, transact.recipe_by_name(name), ratio=ratio)
    for name in peers:
        mlp_share(dense, ratio, name)
    sources = calibration_sources(calibration, dense, tokenizer, count=samples, length=length, progress=True)
    windows = mixed(sources)
    evaluated = {
        text.name: windows_of(text, tokenizer, length=length, count=count, windowing="blocks", bos=False)
        for text in texts
    }
    methods = {"dense": lambda: dense}
    methods |= {name: lambda name=name: transact.prune(dense, windows, recipe=name, ratio=ratio, progress=True).model
                for name in OURS}  # fmt: skip
    methods |= {
        f"{name} {PEERS[name].version}": lambda name=name: PEERS[name].prune(copy.deepcopy(dense), windows, ratio)
        for name in peers
    }
    whole = linear_parameters(dense)
    for method, pruned in methods.items():
        start = time.perf_counter()
        model = pruned().eval()
        seconds = time.perf_counter() - start
        results = {name: measure_perplexity(model, one, progress=True) for name, one in evaluated.items()}
        case = {"base": base, "method": method, "ratio": 0.0 if model is dense else ratio,
                "calibration": " + ".join(source.name for source in sources),
                "samples": samples, "seq_len": length, "windows": count}  # fmt: skip
        row = {"method": method, "fraction_removed": 1 - linear_parameters(model) / whole,
               "parameters": sum(parameter.numel() for parameter in model.parameters()), "prune_s": round(seconds, 1),
               "perplexity": {name: result.perplexity for name, result in results.items()},
               "losses": {name: result.losses for name, result in results.items()},
               **({} if model is dense else timed(model, dense))}  # fmt: skip
        yield case, row
