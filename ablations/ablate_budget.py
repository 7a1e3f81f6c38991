"""At the same measured speed: is quality better where widths are priced by the seconds they take, or by parameters?

Both by predicted losses with least squares in closed form, which plan again in seconds after each measurement.
"""

from transact import Recipe
from transact.speedup import BUDGETS

QUICK = {"budget": (), "speedup": (), "decode_tokens": ()}  # minutes of timing a cell
FULL = {"budget": BUDGETS, "speedup": (1.1, 1.3, 1.5), "decode_tokens": (64,)}


def test_dense(workbench, record):
    record(workbench.dense_case)


def test_budget(workbench, record, budget, speedup, decode_tokens):
    recipe = Recipe(criterion="predicted-loss", allocation="searched", compensation="dense")
    record(workbench.case(recipe, speedup=speedup, budget=budget, decode_tokens=decode_tokens))
