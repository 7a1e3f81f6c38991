"""Engines: what each holds, plans that keep to it and are the cheapest of these, and what `inspect` says."""

import pytest
import torch

from transact import Widths
from transact.engines import ENGINES, check_held, engine_by_name

WHOLE = Widths(3, 64, 64, 1536)


def layers(*changes: dict) -> list[Widths]:
    return [Widths(**vars(WHOLE) | one) for one in changes]


HELD = {
    "all alike": (layers({}, {}), set()),
    "MLPs of two widths": (layers({}, {"mlp": 1024}), {"plain"}),
    "fewer heads in a layer": (layers({}, {"kv_heads": 2}), {"plain"}),
    "heads of two widths": (layers({}, {"qk_head_dim": 32, "v_head_dim": 32}), {"plain", "llama.cpp"}),
    "narrow values": (layers({"v_head_dim": 24}, {"v_head_dim": 24}), {"plain", "llama.cpp", "executorch"}),
    "wide values": (
        layers({"qk_head_dim": 32}, {"qk_head_dim": 32}), {"plain", "llama.cpp", "executorch", "vllm", "vllm-cpu"},
    ),
    "heads of 48": (layers(*2 * [{"qk_head_dim": 48, "v_head_dim": 48}]), {"vllm-cpu"}),
    "heads of 24": (layers(*2 * [{"qk_head_dim": 24, "v_head_dim": 24}]), {"vllm", "vllm-cpu"}),
}  # fmt: skip


@pytest.mark.parametrize("case", HELD)
def test_what_each_engine_holds(case):
    widths, refusing = HELD[case]
    for name in ENGINES:
        if name not in refusing:
            check_held(name, widths)
            continue
        with pytest.raises(ValueError, match=f"^engine '{name}' ") as caught:
            check_held(name, widths)
        assert "\n" not in str(caught.value)


def test_pairs_of_their_own_are_held_by_some():
    same = [torch.tensor([[0, 2], [0, 2]])] * 2
    of_heads, of_layers = [torch.tensor([[0, 2], [0, 3]])] * 2, [same[0], same[0] + 1]
    for name, engine in ENGINES.items():
        check_held(name, layers({}, {}), same)
        for pairs in (of_heads, of_layers):
            if engine.own_pairs:
                check_held(name, layers({}, {}), pairs)
            else:
                with pytest.raises(ValueError, match="has the same RoPE pairs in all heads and layers"):
                    check_held(name, layers({}, {}), pairs)


def test_reasons_say_what_is_there_and_what_may_be():
    with pytest.raises(ValueError, match=r"'vllm-cpu' runs query-key heads of 32, 64, 80, .* layer 1 has .* of 48"):
        check_held("vllm-cpu", layers({}, {"qk_head_dim": 48, "v_head_dim": 48}))
    with pytest.raises(ValueError, match=r"'vllm' runs query-key heads of 32 to 256 in steps of 8 .*no wider"):
        check_held("vllm", layers({"qk_head_dim": 32}))
    with pytest.raises(ValueError, match="'plain' has one width of MLPs for all layers, not 1024 to 1536"):
        check_held("plain", layers({}, {"mlp": 1024}))
    with pytest.raises(ValueError, match=r"unknown engine 'vllm-gpu', allowed: transformers, vllm, .* did you"):
        engine_by_name("vllm-gpu")
