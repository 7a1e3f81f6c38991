"""Do rounds of measuring the pruned model's own sensitivity pay, near the calibration text and far from it?"""

from dataclasses import replace

from transact import PRESETS

QUICK = {"measurements": (), "ratio": ()}  # a minute a cell
FULL = {"measurements": (0, 1, 2, 3, 5), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_dense(workbench, record):
    record(workbench.dense_case)


def test_measurements(workbench, record, measurements, ratio):
    recipe = replace(PRESETS["best"], measurements=measurements)
    record(workbench.case(recipe, ratio, everywhere=True))
