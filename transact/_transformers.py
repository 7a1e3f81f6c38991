"""Imports transformers once, in silence: it imports torchao where that is installed, which logs what a machine lacks.

Those lines (kernels for other GPUs, a deprecation between torchao and torch) would stand before every command's output
and concern none of them. Errors are still told.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_logs() -> Iterator[None]:
    """Nothing up to warnings is logged meanwhile."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


with without_logs():
    import transformers.modeling_utils  # noqa: F401
