"""Does it cost less to set every other weight to zero (2:4) than to narrow, and what does it cost narrowed models?"""

from dataclasses import replace

from transact import recipe_by_name

QUICK = {"preset": ("best",), "ratio": (0.0,), "sparsity": ("magnitude-2:4", "wanda-2:4"), "narrowed": ()}
FULL = {"preset": ("best",), "ratio": (0.0, 0.1, 0.3), "sparsity": ("none", "magnitude-2:4", "wanda-2:4"),
        "narrowed": (0.5,)}  # fmt: skip


def test_sparsity(workbench, record, preset, ratio, sparsity):
    record(workbench.case(replace(recipe_by_name(preset), sparsity=sparsity), ratio))


def test_narrowed(workbench, record, preset, narrowed):
    """As many weights gone as are zero above, and gone from memory and time as well."""
    record(workbench.case(preset, narrowed))
