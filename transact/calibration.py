"""One pass over calibration text: how strong is every transitional activation, and how do they go together?

Legend: T tokens, H query heads, K key-value heads, G = H / K query heads a group, Q dimensions of a query or key head,
V of a value head, A = H V, M MLP dimensions, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from .entry import check_in_one_place, check_model, check_nothing_dropped, checked_windows, undisturbed
from .gradients import LayerGradients, loss_gradients
from .products import Half, add_products, mirror
from .walk import LayerWalk, is_slow, kv_heads_of

HELD_OUT_EVERY = 8  # of so many windows one is kept aside, to choose the ridge of the least squares on


@dataclass
class Moments:
    """Sums over tokens of an activation x of width n: x x^T (n, n), or half of it, and x (n,), float32; the tokens."""

    products: torch.Tensor | Half
    sum: torch.Tensor
    tokens: int

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "Moments":
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device), 0)

    def add(self, rows: torch.Tensor, total: torch.Tensor) -> None:
        """Add tokens, rows (T, n) with the sum `total` (n,); of the products as `add_products` does."""
        add_products(self.products, rows)
        self.sum += total
        self.tokens += len(rows)

    def mirrored(self) -> "Moments":
        """Itself, with the products below the diagonal filled in."""
        mirror(self.products)
        return self


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over calibration tokens of one layer, float64; `tokens` says over how many.

    Squares: `query` (H, Q) and `key` (K, Q) before RoPE, `attention_output` (H, V) at the input of `o_proj`, `mlp`
    (M,) at the input of `down_proj`. `attention_output_sum` and `mlp_sum` are plain sums of the latter two. Where they
    were asked for: `attention_moments` (A, A) and `mlp_moments` (M, M) of the same inputs, each of the tokens that are
    fitted on and of those held out, and `gradients`.
    """

    tokens: int
    query: torch.Tensor
    key: torch.Tensor
    attention_output: torch.Tensor
    attention_output_sum: torch.Tensor
    mlp: torch.Tensor
    mlp_sum: torch.Tensor
    attention_moments: tuple[Moments, Moments] | None = None
    mlp_moments: tuple[Moments, Moments] | None = None
    gradients: LayerGradients | None = None

    @property
    def query_pairs(self) -> torch.Tensor:
        """Squared norms of each RoPE pair of the queries, (H, Q / 2); rotation does not change them."""
        return self.query.unflatten(1, (2, -1)).sum(dim=1)

    @property
    def key_pairs(self) -> torch.Tensor:
        """Squared norms of each RoPE pair of the keys, (K, Q / 2)."""
        return self.key.unflatten(1, (2, -1)).sum(dim=1)

    @property
    def values(self) -> torch.Tensor:
        """Squares of the attention output summed over the query heads that read a value dimension: (K, V)."""
        return self.attention_output.unflatten(0, (len(self.key), -1)).sum(dim=1)


def set_aside(layer: LayerStatistics, parts: int) -> LayerStatistics:
    """The statistics without gradients, and of the moments the first `parts` alone, half of each, in host memory.

    2: of tokens that are fitted on and of those held out; 1: of the former; 0: none. What it is made of can be freed.
    """

    def halved(moments: tuple[Moments, Moments] | None) -> tuple[Moments, Moments] | None:
        if moments is None or not parts:
            return None
        kept = [replace(one, products=Half.of(one.products)) for one in moments[:parts]]
        return kept[0], kept[1] if parts == 2 else Moments.empty(0, moments[1].sum.device)

    return replace(
        layer, attention_moments=halved(layer.attention_moments), mlp_moments=halved(layer.mlp_moments), gradients=None
    )  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """Statistics of every layer and the number of tokens that they were summed over."""

    layers: tuple[LayerStatistics, ...]
    tokens: int


def sum_of_squares(activation: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of (batch, length, width) squared: (width,), float64.

    Each batch is squared and summed in float32, as the paper does, and batches add up in float64. (Squaring first is
    several times faster on a CPU than a norm along the token dimension.)
    """
    rows = activation.reshape(-1, activation.shape[-1])
    return rows.float().square().sum(dim=0).double()


class _Collector:
    """What flows through the projections of one layer, summed while `watching`."""

    def __init__(self, layer: nn.Module, second_moments: bool):
        self.layer = layer
        self.second_moments = second_moments
        self.held_out = 0  # which of the moments the next batch adds to: 0 fitted, 1 held out
        self.sums: dict[str, torch.Tensor] = {}
        self.moments: dict[str, list[Moments | None]] = {"attention": [None, None], "mlp": [None, None]}

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_input(self, name: str, activation: torch.Tensor) -> None:
        rows = activation.reshape(-1, activation.shape[-1])
        if not self.second_moments:
            self._add(name, sum_of_squares(rows))
        total = rows.sum(dim=0, dtype=torch.float32)
        self._add(f"{name} sum", total.double())
        if self.second_moments:
            if self.moments[name][self.held_out] is None:
                self.moments[name][self.held_out] = Moments.empty(rows.shape[1], rows.device)
            self.moments[name][self.held_out].add(rows, total)

    @contextmanager
    def watching(self) -> Iterator[None]:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        handles = [
            attention.q_proj.register_forward_hook(lambda m, i, output: self._add("query", sum_of_squares(output))),
            attention.k_proj.register_forward_hook(lambda m, i, output: self._add("key", sum_of_squares(output))),
            attention.o_proj.register_forward_pre_hook(lambda m, inputs: self._add_input("attention", inputs[0])),
            mlp.down_proj.register_forward_pre_hook(lambda m, inputs: self._add_input("mlp", inputs[0])),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def statistics(self, index: int, tokens: int, group: int, gradients: LayerGradients | None) -> LayerStatistics:
        """Everything summed so far. Raises ValueError where an activation or a gradient was not finite."""
        moments = {}
        for name, (fitted, held_out) in self.moments.items():
            if fitted is not None:
                held_out = held_out or Moments.empty(len(fitted.sum), fitted.sum.device)
                moments[name] = fitted.mirrored(), held_out.mirrored()
                self.sums[name] = sum(part.products.diagonal().double() for part in moments[name])
        for name, value in self.sums.items():
            if not value.isfinite().all():
                raise ValueError(f"layer {index}: the {name} activations are not finite; check the model's weights")
        if gradients is not None and not gradients.are_finite():
            raise ValueError(f"layer {index}: the gradients are not finite; load the model in bfloat16 or float32")
        kv_heads = kv_heads_of(self.layer)
        return LayerStatistics(
            tokens=tokens,
            query=self.sums["query"].view(kv_heads * group, -1),
            key=self.sums["key"].view(kv_heads, -1),
            attention_output=self.sums["attention"].view(kv_heads * group, -1),
            attention_output_sum=self.sums["attention sum"].view(kv_heads * group, -1),
            mlp=self.sums["mlp"],
            mlp_sum=self.sums["mlp sum"],
            attention_moments=moments.get("attention"),
            mlp_moments=moments.get("mlp"),
            gradients=gradients,
        )


def held_out_split(
    windows: torch.Tensor, every: int = HELD_OUT_EVERY, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to fit on and those held out: every eighth, or the last of two to seven; one alone is fitted on.

    Another number than eight is `every`; of all that it gives, the first `most` are held out.
    """
    step = min(every, len(windows))
    is_held_out = torch.arange(len(windows)) % step == step - 1
    if most is not None:
        is_held_out &= is_held_out.cumsum(dim=0) <= most
    if len(windows) == 1:
        is_held_out[0] = False
    return windows[~is_held_out], windows[is_held_out]


def iterate_statistics(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    second_moments: bool = False,
    gradients: Iterable[LayerGradients] | None = None,
    device: torch.device | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = False,
) -> Iterator[LayerStatistics]:
    """The statistics of layer after layer; see `calibrate`, which collects them and sees to the model's mode.

    With `second_moments`, which are large, the model is computed block by block, so that each layer's can be used and
    dropped before the next layer's exist; hidden states of all windows are kept meanwhile. With a `device` it is so
    too: the model stays where it lies, one block at a time is computed on the device, hidden states in host memory.
    And on processors that are slow in the model's dtype: one block at a time is in float32.
    """
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    per_batch = max(1, tokens_per_batch // windows.shape[1])
    batches = [
        (held_out, batch)
        for held_out, part in enumerate(held_out_split(windows))
        for batch in (part.split(per_batch) if len(part) else ())
    ]
    collectors = [_Collector(layer, second_moments) for layer in model.model.layers]
    bar = {"desc": "calibrate", "disable": None if progress else True}
    if device is None and not second_moments and not is_slow(model.dtype, model.device):
        finished = _collect_at_once(model, batches, collectors, bar)
    else:
        walk = LayerWalk(model, [batch for _, batch in batches], device=device)
        finished = _collect_by_layer(walk, collectors, [held_out for held_out, _ in batches], bar)
    measured = iter(gradients or ())
    for index, collector in enumerate(finished):
        yield collector.statistics(index, windows.numel(), group, next(measured, None))
        collector.sums.clear()
        collector.moments.clear()


@torch.no_grad()
def _collect_at_once(
    model: nn.Module, batches: Sequence[tuple[int, torch.Tensor]], collectors: list[_Collector], bar: dict
) -> list[_Collector]:
    with ExitStack() as stack:
        for collector in collectors:
            stack.enter_context(collector.watching())
        for _, batch in tqdm(batches, unit="batch", **bar):
            model.model(input_ids=batch.to(model.device), use_cache=False)
    return collectors


# not of `iterate_statistics`, around which it would hold what was yielded last, second moments, until the next is there
@torch.no_grad()
def _collect_by_layer(
    walk: LayerWalk, collectors: list[_Collector], held_out: list[int], bar: dict
) -> Iterator[_Collector]:
    for index, layer in walk.blocks(**bar):
        with collectors[index].watching():
            for batch, is_held_out in enumerate(held_out):
                collectors[index].held_out = is_held_out
                walk.advance(index, layer, batch)
        yield collectors[index]


def calibrate(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    second_moments: bool = False,
    gradients: str | None = None,
    device: torch.device | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = False,
) -> Statistics:
    """Statistics of a Llama, dense or narrowed, over `windows` (samples, length) of token ids.

    The language-model head is not run and nothing but the sums is kept, so memory does not grow with the number of
    samples (but for one hidden state a token with `second_moments` or a `device`). The activations are those that the
    paper scores (Shen et al., ACL Findings 2024, section 3).
    `second_moments` adds the matrices that leverage, OBS and least squares need. `gradients` adds one backward pass:
    "outputs" of every module's output, over an eighth of the windows, "weights" of every weight, over all of them (see
    `loss_gradients`). `device` computes block by block there (see `iterate_statistics`).

    Windows may be of any integers, or lists of rows. Raises ValueError where they do not fit the model, or it is none
    of the family or carries adapters, or an activation or a gradient is not finite (the layer is named).
    """
    check_model(model)
    check_nothing_dropped(model)
    check_in_one_place(model, device)
    with undisturbed(model):
        windows = checked_windows(model, windows)
        measured = None
        if gradients:
            measured = loss_gradients(model, windows, of=gradients, device=device, progress=progress)
        layers = iterate_statistics(
            model, windows, second_moments=second_moments, gradients=measured, device=device,
            tokens_per_batch=tokens_per_batch, progress=progress,
        )  # fmt: skip
        return Statistics(layers=tuple(layers), tokens=windows.numel())
