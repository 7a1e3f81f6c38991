"""What should attention lose, dimensions inside heads, whole key-value heads with their queries, or both?"""

from transact import Recipe

QUICK = {"granularity": ("dims", "heads", "both"), "ratio": (0.3,)}
FULL = {"granularity": ("dims", "heads", "both"), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_granularity(workbench, record, granularity, ratio):
    record(workbench.case(Recipe(granularity=granularity), ratio))
