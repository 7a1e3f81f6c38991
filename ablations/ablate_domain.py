"""Does it matter what the model is calibrated on? Texts by `--domains`; one that is not there is skipped, with why."""

QUICK = {"preset": ("transact",), "domain": ("embedded",), "ratio": (0.3,)}
FULL = {"preset": ("transact", "best"), "domain": ("embedded",), "ratio": (0.1, 0.3)}


def test_domain(workbench, record, preset, domain, ratio):
    record(workbench.case(preset, ratio, calibration=domain))
