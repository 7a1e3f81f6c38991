"""Which layers can lose most? One layer alone is narrowed, by a fraction of its own parameters."""

from transact import Recipe


def spread(config) -> list[int]:
    """Five layers from the first to the last."""
    return sorted({round(share * (config.num_hidden_layers - 1)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)})


QUICK = {"layer": spread, "ratio": (0.5,)}
FULL = {"layer": lambda config: range(config.num_hidden_layers), "ratio": (0.5,)}


def test_layer(workbench, record, layer, ratio):
    record(workbench.case(Recipe(), ratio, only_layer=layer))
