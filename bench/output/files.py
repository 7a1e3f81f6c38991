"""Files that are whole or absent: a report that is cut short leaves no half of one."""

import os
import tempfile
from pathlib import Path


def write_whole(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write the content beside the path and rename it into place; returns the path.

    Raises OSError, leaving what was there before, where it cannot be written (no room, no permission).
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp lets only its owner read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
