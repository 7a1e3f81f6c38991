"""Should widths narrow, whole layers go, or widths narrow and modules go where that loses less?

By the preset that searches widths, with and without dropping attention and MLPs of single layers, and by block
influence with its repair.
"""

from dataclasses import replace

from transact import PRESETS

WAYS = {"widths": PRESETS["best"], "layers": PRESETS["shortgpt"], "both": replace(PRESETS["best"], drop_modules=True)}
QUICK = {"way": (), "ratio": ()}  # minutes a cell, for a rival and a setting that few ask for
FULL = {"way": tuple(WAYS), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_dense(workbench, record):
    record(workbench.dense_case)


def test_drops(workbench, record, way, ratio):
    record(workbench.case(WAYS[way], ratio, everywhere=True))
