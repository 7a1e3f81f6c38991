"""The user's cache: where what is made once and serves again is kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$TRANSACT_CACHE, or `transact` in the user's cache."""
    if "TRANSACT_CACHE" in os.environ:
        return Path(os.environ["TRANSACT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transact"
