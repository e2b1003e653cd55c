"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, contents: str) -> None:
    """Also where several processes write the same file: the last one wins."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.writing")
    unfinished.write_text(contents)
    os.replace(unfinished, path)
