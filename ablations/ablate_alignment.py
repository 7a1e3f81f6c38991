"""Do aligned widths cost quality, and do they decode faster? Uniform widths rounded to multiples."""

from transact import Recipe

QUICK = {"head_multiple": (8,), "mlp_multiple": (1, 64), "ratio": (0.3,), "decode_tokens": (8,)}
FULL = {"head_multiple": (1, 2, 4, 8), "mlp_multiple": (1, 8, 16, 64), "ratio": (0.3,), "decode_tokens": (64,)}


def test_alignment(workbench, record, head_multiple, mlp_multiple, ratio, decode_tokens):
    multiples = {"head_multiple": head_multiple, "mlp_multiple": mlp_multiple}
    record(workbench.case(Recipe(), ratio, decode_tokens=decode_tokens, **multiples))
