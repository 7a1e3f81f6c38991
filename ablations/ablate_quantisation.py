"""How far can a pruned model be quantised, and what does that cost? Dense and pruned, in the dtype, int8 and int4."""

from dataclasses import replace

QUICK = {"preset": ("best",), "ratio": (0.3,), "quantisation": ("", "int8"), "decode_tokens": (8,)}
FULL = {"preset": ("best",), "ratio": (0.3, 0.5), "quantisation": ("", "int8", "int4"), "decode_tokens": (64,)}


def test_dense(workbench, record, quantisation, decode_tokens):
    record(workbench.with_quantisation(replace(workbench.dense_case, decode_tokens=decode_tokens), quantisation))


def test_quantisation(workbench, record, preset, ratio, quantisation, decode_tokens):
    record(workbench.case(preset, ratio, quantisation=quantisation, decode_tokens=decode_tokens))
