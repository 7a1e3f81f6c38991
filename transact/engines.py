"""Engines by name: what each can hold of a narrowed Llama. Planner, exports and `transact inspect` go by this table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .criteria import lookup
from .widths import Widths


@dataclass(frozen=True)
class Engine:
    """What an engine can hold; left out, all that a narrowed Llama may be.

    `head_widths`: widths of a query-key head that its kernels know (None: all even ones). `values`: a value head is
    "any" width, or "narrower" or as wide as its query-key head, to which the KV cache pads it, or "equal" to it.
    `kv_heads_by_layer`, `heads_by_layer`, `mlp_by_layer`: whether numbers of key-value heads, widths of heads and of
    MLPs may differ between layers. `own_pairs`: whether heads and layers may keep RoPE pairs of their own.
    `mlp_multiple`: what its kernels want MLP widths to be a multiple of (None: what all kernels do). `drops`: whether
    layers may do without attention or an MLP. `format`: the export that it reads (None: the checkpoint).
    """

    head_widths: Sequence[int] | None = None
    values: str = "any"
    kv_heads_by_layer: bool = True
    heads_by_layer: bool = True
    mlp_by_layer: bool = True
    own_pairs: bool = True
    mlp_multiple: int | None = None
    drops: bool = False
    format: str | None = None

    def takes_head(self, qk_head_dim: int, v_head_dim: int) -> bool:
        """Whether a head may be of these widths."""
        if self.head_widths is not None and qk_head_dim not in self.head_widths:
            return False
        return {"any": True, "narrower": v_head_dim <= qk_head_dim, "equal": v_head_dim == qk_head_dim}[self.values]

    def cached(self, widths: Sequence[Widths]) -> tuple[Widths, ...]:
        """The widths that its KV cache has for these: narrower values are padded there."""
        return tuple(replace(one, v_head_dim=one.qk_head_dim) if self.values == "narrower" else one for one in widths)

    def heads_in_words(self) -> str:
        """What it has or runs, as a message goes on after its name."""
        values = {"any": "value heads of any width", "narrower": "value heads no wider than its query-key heads",
                  "equal": "value heads as wide as its query-key heads"}[self.values]  # fmt: skip
        if self.head_widths is None:
            return f"has {values}"
        widths = self.head_widths
        if isinstance(widths, range):
            known = f"{widths[0]} to {widths[-1]} in steps of {widths.step}"
        else:
            known = ", ".join(map(str, widths))
        return f"runs query-key heads of {known} dimensions and {values}"


# sources: the engines' own code (vLLM 0.32, llama.cpp as in llama-cpp-python 0.3.36, ExecuTorch 1.5)
ENGINES = {
    "transformers": Engine(drops=True),
    # its attention wrapper pads and crops narrower values; FlashAttention's widths, Triton's least
    "vllm": Engine(head_widths=range(32, 257, 8), values="narrower"),
    "vllm-cpu": Engine(head_widths=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512), values="narrower"),
    # one head width and one table of frequencies for a model; blocks of q8_0 are 32 wide
    "llama.cpp": Engine(values="equal", heads_by_layer=False, own_pairs=False, mlp_multiple=32, format="gguf"),
    # a stock LlamaForCausalLM, which everything reads
    "plain": Engine(values="equal", kv_heads_by_layer=False, heads_by_layer=False, mlp_by_layer=False, own_pairs=False,
                    format="llama"),
    # our programs are traced from the model, and keep keys and values in tensors of their own
    "executorch": Engine(drops=True, format="executorch"),
}  # fmt: skip


def engine_by_name(name: str) -> Engine:
    """The engine's row of the table. Raises ValueError with the allowed names for any other name."""
    return lookup(ENGINES, name, "engine")


def check_drops(name: str) -> None:
    """Raise ValueError unless layers may do without attention or an MLP in this engine."""
    if not engine_by_name(name).drops:
        able = ", ".join(other for other, engine in ENGINES.items() if engine.drops)
        raise ValueError(f"engine {name!r} runs attention and an MLP in every layer: drop_modules is for {able}")


def check_held(name: str, widths: Sequence[Widths], pairs: Sequence[torch.Tensor] = ()) -> None:
    """Raise ValueError, in one line, where the engine cannot hold layers of these widths.

    Nor, if they are given, these dense RoPE pairs of every layer: each (kv_heads, pairs).
    """
    engine = engine_by_name(name)
    for layer, one in enumerate(widths):
        if one.missing and not engine.drops:
            raise ValueError(f"engine {name!r} runs attention and an MLP in every layer: layer {layer} has no "
                             f"{one.missing}")  # fmt: skip
        if not engine.takes_head(one.qk_head_dim, one.v_head_dim):
            raise ValueError(
                f"engine {name!r} {engine.heads_in_words()}: layer {layer} has query-key heads of {one.qk_head_dim} "
                f"and value heads of {one.v_head_dim} dimensions"
            )
    for part, what, by_layer in (
        ("kv_heads", "number of key-value heads", engine.kv_heads_by_layer),
        ("qk_head_dim", "width of query-key heads", engine.heads_by_layer),
        ("v_head_dim", "width of value heads", engine.heads_by_layer),
        ("mlp", "width of MLPs", engine.mlp_by_layer),
    ):
        found = sorted({getattr(one, part) for one in widths})
        if not by_layer and len(found) > 1:
            raise ValueError(f"engine {name!r} has one {what} for all layers, not {found[0]} to {found[-1]}")
    if not engine.own_pairs and len({tuple(row) for layer in pairs for row in layer.tolist()}) > 1:
        raise ValueError(f"engine {name!r} has the same RoPE pairs in all heads and layers, these keep others")
