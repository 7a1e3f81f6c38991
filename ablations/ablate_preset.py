"""How do the presets compare, the paper's, its authors' code's, the rivals' and the best found here?"""

import pytest

from transact import PRESETS

RATIOS = (0.3,)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset(workbench, record, preset, ratio):
    record(workbench.case(preset, ratio))
