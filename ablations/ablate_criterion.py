"""How much quality does each criterion keep at each fraction removed, with the widths of the paper, in one shot?"""

import pytest

from transact import Recipe

CRITERIA = ("activation", "magnitude", "random")
RATIOS = (0.1, 0.2, 0.3, 0.5)


def test_dense(workbench, record):
    record(workbench.dense_case)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criterion(workbench, record, criterion, ratio):
    record(workbench.case(Recipe(criterion=criterion), ratio))
