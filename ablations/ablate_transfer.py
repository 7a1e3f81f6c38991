"""Does what a model was calibrated on show elsewhere? Presets by calibration text and by evaluation text.

Calibration texts by `--domains`, evaluation texts by `--evaluation`. A text near the calibration text flatters: what
counts is the mean over texts.
"""

QUICK = {"preset": ("transact",), "domain": ("embedded",), "ratio": (0.3,)}  # as in ablate_domain: minutes a cell less
FULL = {"preset": ("best", "transact", "flap"), "domain": ("embedded",), "ratio": (0.1, 0.2, 0.3, 0.5)}


def test_dense(workbench, record):
    record(workbench.dense_case)


def test_transfer(workbench, record, preset, domain, ratio):
    record(workbench.case(preset, ratio, calibration=domain))
