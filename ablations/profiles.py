"""What a run measures where nothing else is asked for: a profile is a row of defaults that options override.

`texts`: the first of these that can be read calibrates and evaluates. `limit` 0: all items, `windows` 0: all windows.
`grid`: which of the parameters that each question states, QUICK or FULL.
"""

from collections.abc import Mapping

PROFILES: Mapping[str, Mapping] = {
    # embedded model and text, minutes on two CPU cores
    "quick": {
        "model": "smollm2-135m", "texts": ("embedded",), "domains": ("embedded", "sources"), "samples": 32,
        "windows": 20, "seq_len": 256, "tasks": "probes", "limit": 40, "grid": "QUICK",
    },
    # embedded model on a GPU: whole texts, WikiText-2 where the hub can be reached, all items
    "full": {
        "model": "smollm2-135m", "texts": ("wikitext2", "embedded"), "domains": ("embedded", "sources", "wikitext2"),
        "samples": 128, "windows": 0, "seq_len": 512, "tasks": "probes", "limit": 0, "grid": "FULL",
    },
    # the paper's tasks, and its 128 samples; the model is named by --model
    "paper": {
        "model": None, "texts": ("wikitext2",), "domains": ("wikitext2", "c4", "embedded"), "samples": 128,
        "windows": 0, "seq_len": 2048, "tasks": "paper", "limit": 0, "grid": "FULL",
    },
}  # fmt: skip
