"""Imports transformers once, silently: it imports torchao where that is installed, which logs what this machine lacks.

Those lines (kernels for other GPUs, a deprecation between torchao and torch) would stand before every command's output
and concern none of them. Errors are still told.
"""

import logging

_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import transformers.modeling_utils  # noqa: F401
finally:
    logging.disable(_disabled)
