"""Does it help to prune in several shots, with statistics taken afresh at each? Here without training in between."""

from transact import Recipe

QUICK = {"shots": (1, 2), "ratio": (0.3,)}
FULL = {"shots": (1, 2, 4, 8, 16), "ratio": (0.1, 0.3, 0.5)}


def test_shots(workbench, record, shots, ratio):
    record(workbench.case(Recipe(shots=shots), ratio))
