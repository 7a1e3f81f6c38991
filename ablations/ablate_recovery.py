"""Which way of training recovers most of what pruning lost? Perplexity against tokens, and memory."""

QUICK = {"preset": ("best",), "ratio": (0.3,), "recovery": ("", "distillation", "lora"), "tokens": (2_048,)}
FULL = {"preset": ("best", "transact"), "ratio": (0.3, 0.5),
        "recovery": ("", "distillation", "full", "lora", "lora-distillation", "lozo", "lozo-distillation"),
        "frugal": ("lora", "lozo"), "tokens": (2_000_000,)}  # fmt: skip


def test_recovery(workbench, record, preset, ratio, recovery, tokens):
    record(workbench.case(preset, ratio, recovery=recovery, recovery_tokens=tokens))


def test_in_little_memory(workbench, record, preset, ratio, frugal, tokens):
    """One window at once and no activations kept: what adapters and forward passes alone give for the same memory."""
    record(workbench.case(preset, ratio, recovery=frugal, recovery_tokens=tokens, recovery_frugal=True))
