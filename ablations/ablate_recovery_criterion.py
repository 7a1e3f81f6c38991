"""Does the criterion still matter after training? The paper's activation norms against its rival, Taylor."""

from transact import Recipe

QUICK = {"criterion": (), "ratio": (), "tokens": ()}  # as few tokens as quick has time for cannot tell
FULL = {"criterion": ("activation", "taylor", "wanda", "magnitude"), "ratio": (0.3, 0.5), "tokens": (2_000_000,)}


def test_recovery_criterion(workbench, record, criterion, ratio, tokens):
    record(workbench.case(Recipe(criterion=criterion), ratio, recovery="distillation", recovery_tokens=tokens))
