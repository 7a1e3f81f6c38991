"""The user's cache: where what is made once and serves again is kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$TRANSACT_CACHE, or `transact` in the user's cache. Raises ValueError where the user has no home for it."""
    if named := os.environ.get("TRANSACT_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transact"
    except RuntimeError as error:
        raise ValueError("there is no home directory to keep a cache in: set TRANSACT_CACHE to a directory") from error
