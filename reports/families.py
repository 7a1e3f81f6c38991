"""Families of methods: what makes a model smaller or faster."""

from bench.records import Record


def family_of(record: Record) -> str:
    """What was done to the model: "width", "depth", "width and depth", "2:4", a format of weights, or several of them.

    "dense" where nothing was. A layer without attention or MLP left has lost depth, whatever recipe took it.
    """
    if record.case.depth != "none":
        removed = "depth"
    elif any(0 in layer.values() for layer in record.widths):
        removed = "width and depth"
    else:
        removed = "width" if record.metrics["fraction_removed"] > 0 else ""
    sparsity = "" if record.case.sparsity == "none" else "2:4"
    return ", ".join(filter(None, (removed, sparsity, record.case.quantisation))) or "dense"
