"""Which is more redundant, attention or the MLP? Each narrowed to a share of its width, on a grid of both.

The widths are the paper's: A = heads x head width, and M.
"""

import pytest

from transact import Recipe
from transact.widths import head_dim_of


def attention_widths(*shares: float):
    """A function from a model's configuration to these shares of its A, an even width for every head."""

    def widths(config) -> list[int]:
        step, whole = 2 * config.num_attention_heads, config.num_attention_heads * head_dim_of(config)
        return sorted({max(step, round(share * whole / step) * step) for share in shares}, reverse=True)

    return widths


def mlp_widths(*shares: float):
    """A function from a model's configuration to these shares of its M."""
    return lambda config: sorted({max(1, round(share * config.intermediate_size)) for share in shares}, reverse=True)


QUICK = {"mha_dim": attention_widths(1.0, 0.5), "mlp_dim": mlp_widths(1.0, 0.5)}
FULL = {
    "mha_dim": attention_widths(1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25),
    "mlp_dim": mlp_widths(1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25),
}


def test_redundancy(workbench, record, mha_dim, mlp_dim):
    config = workbench.dense.config
    if (mha_dim, mlp_dim) == (config.num_attention_heads * head_dim_of(config), config.intermediate_size):
        pytest.skip("that is the dense model")
    record(workbench.case(Recipe(), mha_dim=mha_dim, mlp_dim=mlp_dim))
