"""Which way of training recovers most of what pruning lost? Perplexity against the tokens trained on."""

QUICK = {"preset": ("best",), "ratio": (0.3,), "recovery": ("", "distillation", "lora"), "tokens": (2_048,)}
FULL = {"preset": ("best", "transact"), "ratio": (0.3, 0.5),
        "recovery": ("", "distillation", "full", "lora", "lora-distillation"), "tokens": (2_000_000,)}  # fmt: skip


def test_recovery(workbench, record, preset, ratio, recovery, tokens):
    record(workbench.case(preset, ratio, recovery=recovery, recovery_tokens=tokens))
