"""With the same budget of training: one shot and then all of it, or several shots with training in between?"""

from transact import Recipe

QUICK = {"shots": (), "ratio": (), "tokens": ()}  # as few tokens as quick has time for cannot tell
FULL = {"shots": (1, 2, 4, 8), "ratio": (0.3, 0.5), "tokens": (2_000_000,)}


def test_recovery_shots(workbench, record, shots, ratio, tokens):
    record(workbench.case(Recipe(shots=shots), ratio, recovery="distillation", recovery_tokens=tokens))
