"""Which method is best at which speed? Narrower, fewer layers, 2:4 zeros, 8-bit weights: one front of speed and loss.

Speed is that of decoding in turn with the dense model, quality by how many nats the loss is higher on the first text
and on the mean of the others. The front holds every cell that was timed, whichever question asked for it, but for
those that were trained.
"""

from dataclasses import replace

from transact import recipe_by_name

QUICK = {"preset": ("best", "transact", "flap", "shortgpt", "replaceme"), "ratio": (0.3,), "narrowed": (0.3,),
         "dropped": (), "sparse": (), "decode_tokens": (8,)}  # fmt: skip
FULL = {"preset": ("best", "transact", "flap", "shortgpt", "replaceme"), "ratio": (0.1, 0.2, 0.3), "narrowed": (0.2,),
        "dropped": (0.1, 0.2, 0.3), "sparse": (0.0, 0.2), "decode_tokens": (64,)}  # fmt: skip


def test_dense(workbench, record, decode_tokens):
    record(replace(workbench.dense_case, decode_tokens=decode_tokens))


def test_front(workbench, record, preset, ratio, decode_tokens):
    record(workbench.case(preset, ratio, decode_tokens=decode_tokens))


def test_int8_dense(workbench, record, decode_tokens):
    record(workbench.with_quantisation(replace(workbench.dense_case, decode_tokens=decode_tokens), "int8"))


def test_int8(workbench, record, narrowed, decode_tokens):
    record(workbench.case("best", narrowed, quantisation="int8", decode_tokens=decode_tokens))


def test_both(workbench, record, dropped, decode_tokens):
    """Narrower, and without some attention or MLPs."""
    recipe = replace(recipe_by_name("best"), drop_modules=True)
    record(workbench.case(recipe, dropped, decode_tokens=decode_tokens, everywhere=True))


def test_sparse(workbench, record, sparse, decode_tokens):
    """Zeros in the dense model and in a narrowed one."""
    recipe = replace(recipe_by_name("best"), sparsity="wanda-2:4")
    record(workbench.case(recipe, sparse, decode_tokens=decode_tokens, everywhere=True))
