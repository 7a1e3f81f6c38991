"""How much calibration text is enough? Windows of it, and their length, for the paper's score and for the best recipe.

Least squares learn from the text as well as the score, so they ask for more of it.
"""

# 24 windows of 256 are what the profile calibrates on: that cell is the preset's
QUICK = {"preset": ("transact",), "samples": (8, 24), "seq_len": (64, 256), "ratio": (0.3,)}
FULL = {"preset": ("transact", "best"), "samples": (8, 32, 128, 512), "seq_len": (64, 256, 512), "ratio": (0.3,)}


def test_calibration(workbench, record, preset, samples, seq_len, ratio):
    record(workbench.case(preset, ratio, samples=samples, seq_len=seq_len))
