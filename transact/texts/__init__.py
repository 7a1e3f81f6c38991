"""Texts to calibrate, train and measure on: by name, the model's own samples, several in turn."""

from .named import TEXTS, Text, cut_windows, load_text, tokenise
from .samples import own_samples
from .sources import (
    DEFAULT_CALIBRATION,
    SELF,
    Source,
    calibration_sources,
    calibration_windows,
    mixed,
    source_names,
    text_source,
)

__all__ = [
    "DEFAULT_CALIBRATION",
    "SELF",
    "TEXTS",
    "Source",
    "Text",
    "calibration_sources",
    "calibration_windows",
    "cut_windows",
    "load_text",
    "mixed",
    "own_samples",
    "source_names",
    "text_source",
    "tokenise",
]
