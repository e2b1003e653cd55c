"""Files that a run adds to: log.txt and TensorBoard's. A full disk stops no training: what it
refuses is kept, and written when there is room again."""

import io
import json
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class AppendedFile:
    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        self.unwritten = b""

    def append(self, contents: bytes) -> None:
        """Raises OSError where not all of it, and of what was refused before, could be written."""
        self.unwritten += contents
        while self.unwritten:  # the last free bytes of a disk take a part of it
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self) -> None:
        self.file.close()


class JsonLines(AppendedFile):
    """One JSON object per line."""

    def add(self, values: dict[str, float], step: int) -> None:
        self.append(json.dumps({"step": step, **values}).encode() + b"\n")


class TensorBoardFile(AppendedFile):
    """Scalars in TensorBoard's format. Its own writer works in a thread that ends with the first
    error, and takes what it was given with it."""

    def __init__(self, folder: Path, first_step: int | None = None):
        """first_step: of older files in the folder TensorBoard will show only what is before it."""
        folder.mkdir(parents=True, exist_ok=True)
        unique = f"{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(folder / f"events.out.tfevents.{unique}")
        now = time.time()
        self.unwritten = as_record(Event(wall_time=now, file_version="brain.Event:2"))
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self.unwritten += as_record(Event(wall_time=now, step=first_step, session_log=start))

    def add(self, values: dict[str, float], step: int) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        self.append(as_record(event))


def as_record(event: Event) -> bytes:
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
