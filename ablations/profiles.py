"""What a run measures where nothing else is asked for: a profile is a row of defaults that options override.

`texts`: the first of these that can be read evaluates, and calibrates unless `calibration` names others. `others`:
texts evaluated beside it, those that can be read; `everywhere`: for every cell, not only for presets. `compared`: on
how many windows of each text the dense model's predictions are compared with. `domains`: calibration texts of
ablate_domain and ablate_transfer. `limit` 0: all items, `windows`, `other_windows` and `compared` 0: all windows.
`grid`: which of the parameters that each question states, QUICK or FULL.
"""

from collections.abc import Mapping

from transact.texts import DEFAULT_CALIBRATION

EMBEDDED_TEXTS = ("self", "embedded", "sources")  # to calibrate on, from nothing but the model and its installation

PROFILES: Mapping[str, Mapping] = {
    # embedded model and texts, on two CPU cores; fewer samples are too few for least squares
    "quick": {
        "model": "smollm2-135m", "texts": ("embedded",), "calibration": DEFAULT_CALIBRATION,
        "domains": EMBEDDED_TEXTS, "samples": 24, "windows": 8,
        "others": ("sources", "probes"), "other_windows": 4, "everywhere": False, "compared": 4,
        "seq_len": 256, "tasks": "probes", "limit": 40, "grid": "QUICK",
    },
    # embedded model on a GPU: whole texts, WikiText-2 where the hub can be reached, all items
    "full": {
        "model": "smollm2-135m", "texts": ("wikitext2", "embedded"), "calibration": None,
        "domains": (*EMBEDDED_TEXTS, "wikitext2"),
        "samples": 128, "windows": 0, "others": ("embedded", "sources", "probes"), "other_windows": 32,
        "everywhere": True, "compared": 32, "seq_len": 512, "tasks": "probes", "limit": 0, "grid": "FULL",
    },
    # the paper's tasks, and its 128 samples; the model is named by --model
    "paper": {
        "model": None, "texts": ("wikitext2",), "calibration": None,
        "domains": ("wikitext2", "c4", "embedded"), "samples": 128, "windows": 0,
        "others": ("c4", "embedded", "sources"), "other_windows": 12, "everywhere": True, "compared": 12,
        "seq_len": 2048, "tasks": "paper", "limit": 0, "grid": "FULL",
    },
}  # fmt: skip
