"""What does a given speed cost? Quality against decoded tokens per second, of the dense model and of presets."""

from dataclasses import replace

QUICK = {"preset": ("best", "transact", "flap"), "ratio": (0.3,), "decode_tokens": (8,)}
FULL = {"preset": ("best", "transact", "flap", "wanda-sp"), "ratio": (0.1, 0.2, 0.3, 0.5), "decode_tokens": (64,)}


def test_dense(workbench, record, decode_tokens):
    record(replace(workbench.dense_case, decode_tokens=decode_tokens))


def test_speed(workbench, record, preset, ratio, decode_tokens):
    record(workbench.case(preset, ratio, decode_tokens=decode_tokens))
