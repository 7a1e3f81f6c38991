"""How do the presets compare, the paper's, its authors' code's, the rivals' and the best found here?"""

from transact import PRESETS

QUICK = {"preset": tuple(name for name in PRESETS if name != "crash"), "ratio": (0.1, 0.3)}
FULL = {"preset": tuple(PRESETS), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_dense(workbench, record):
    record(workbench.dense_case)


def test_preset(workbench, record, preset, ratio):
    record(workbench.case(preset, ratio))
