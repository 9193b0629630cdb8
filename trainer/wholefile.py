"""Files that others read while they are written anew: they see the old one or the new one, never a part."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Replace the file `path` whole, durably; text as UTF-8. A death on the way leaves NAME.partial, which the next
    write takes. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
