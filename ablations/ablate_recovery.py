"""Which way of training recovers most of what pruning lost? Perplexity against tokens, and memory."""

FRUGALLY = " frugally"  # one window at once and no activations kept: what a way gives for the least memory
QUICK = {"preset": ("best",), "ratio": (0.3,), "recovery": ("", "lora"), "tokens": (2_048,)}
FULL = {"preset": ("best", "transact"), "ratio": (0.3, 0.5),
        "recovery": ("", "distillation", "full", "lora", "lora-distillation", "lozo", "lozo-distillation",
                     f"lora{FRUGALLY}", f"lozo{FRUGALLY}"), "tokens": (2_000_000,)}  # fmt: skip


def test_recovery(workbench, record, preset, ratio, recovery, tokens):
    frugal = recovery.endswith(FRUGALLY)
    way = recovery.removesuffix(FRUGALLY)
    record(workbench.case(preset, ratio, recovery=way, recovery_tokens=tokens, recovery_frugal=frugal))
