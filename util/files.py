"""Files that are there whole or not at all, whatever happens while they are written."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, contents: bytes | Callable[[BinaryIO], object]) -> None:
    """contents: what to write, or what writes it to a file. Of several processes that write the
    same file the last one wins. Raises what the writing raises, and leaves the old file then."""
    # A name has 255 bytes at most, of which the host's may take 64.
    start = os.fsdecode(os.fsencode(path.name)[:160])
    unfinished = path.with_name(f"{start}.{socket.gethostname()}-{os.getpid()}.writing")
    try:
        with open(unfinished, "wb") as file:
            if callable(contents):
                contents(file)
            else:
                file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        if isinstance(error, OSError):  # of a full disk the system does not say which file it was
            error.filename = str(path)
        with suppress(OSError):
            unfinished.unlink()
        raise
    sync_directory(path.parent)


def write_json(path: Path, contents: object) -> None:
    write_whole(path, json.dumps(contents, indent=2).encode() + b"\n")


def read_json(path: Path) -> dict:
    """Return what a file holds; empty where there is none, or none that can be read."""
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def read_records(path: Path) -> list[dict]:
    """Return the objects of a log with one per line, but not those of lines that are cut
    off or damaged."""
    records = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and type(r.get("step")) is int]


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left half written."""
    for path in folder.glob("*.writing"):
        path.unlink()


def sync_directory(folder: Path) -> None:
    """Make the new name itself durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
