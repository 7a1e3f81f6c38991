"""What makes up best for what was dropped, and must its ridge be chosen by held-out tokens?"""

from transact import Recipe

QUICK = {"compensation": ("none", "bias", "dense", "pruned"), "fitted": ("dense",), "ridge": (1e-3, 1e-1, 10.0),
         "ratio": (0.3,)}  # fmt: skip
FULL = {"compensation": ("none", "bias", "dense", "pruned"), "fitted": ("dense", "pruned"),
        "ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), "ratio": (0.1, 0.3, 0.5)}  # fmt: skip


def test_compensation(workbench, record, compensation, ratio):
    record(workbench.case(Recipe(compensation=compensation), ratio))


def test_ridge(workbench, record, fitted, ridge, ratio):
    record(workbench.case(Recipe(compensation=fitted, ridge=ridge), ratio))
