"""Must RoPE pairs stay whole, each at its frequency, or may single dimensions go, as the paper's authors have it?"""

from transact import Recipe

QUICK = {"rope": ("pairs", "released"), "ratio": (0.3,)}
FULL = {"rope": ("pairs", "released"), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_rope(workbench, record, rope, ratio):
    record(workbench.case(Recipe(rope=rope), ratio))
