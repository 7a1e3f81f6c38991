"""Which capabilities does a pruned model lose? Bundled probes (or `--tasks`) on the dense model and on presets."""

import pytest

RATIOS = (0.3,)
PRESETS = ("best", "transact", "flap")


def test_dense(workbench, with_tasks, record):
    record(with_tasks(workbench.dense_case))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("preset", PRESETS)
def test_capability(workbench, with_tasks, record, preset, ratio):
    record(with_tasks(workbench.case(preset, ratio)))
