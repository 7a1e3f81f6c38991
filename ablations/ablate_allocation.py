"""Which layers and modules should pay, and what does a smaller KV cache cost beside fewer parameters?

All by predicted losses with least squares in closed form, but for FLAP's global allocation, which is a preset. What an
engine can hold restricts what is searched.
"""

import pytest

from transact import PRESETS, Recipe
from transact.recipe import ALLOCATIONS

ENGINES = ("llama.cpp", "plain")
QUICK = {"allocation": ALLOCATIONS, "engine": ENGINES, "ratio": (0.3,), "kv_ratio": (None, 0.5)}
FULL = {"allocation": ALLOCATIONS, "engine": ENGINES, "ratio": (0.1, 0.2, 0.3, 0.5), "kv_ratio": (None, 0.3, 0.5, 0.7)}


def test_allocation(workbench, record, allocation, ratio, kv_ratio):
    recipe = Recipe(criterion="predicted-loss", allocation=allocation, compensation="dense")
    if allocation == "global":
        if kv_ratio:
            pytest.skip("the global allocation knows no KV budget")
        recipe = PRESETS["flap"]
    record(workbench.case(recipe, ratio, kv_ratio=kv_ratio))


def test_engine(workbench, record, engine, ratio):
    recipe = Recipe(criterion="predicted-loss", allocation="searched", compensation="dense", engine=engine)
    record(workbench.case(recipe, ratio))
