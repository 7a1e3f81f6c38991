"""How much quality does each criterion keep at each fraction removed, with the widths of the paper, in one shot?"""

from transact import CRITERIA, Recipe

QUICK = {"criterion": tuple(CRITERIA), "ratio": (0.3,)}
FULL = {"criterion": tuple(CRITERIA), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_dense(workbench, record):
    record(workbench.dense_case)


def test_criterion(workbench, record, criterion, ratio):
    record(workbench.case(Recipe(criterion=criterion), ratio))
