"""Stdin, stdout and stderr when nobody is there: closed (>&-), or a pipe whose reader has gone
(| head). Neither is to stop a run, whose log is in its folder as well."""

import io
import os
import sys
from contextlib import suppress

STREAMS = ("stdin", "stdout", "stderr")


class Pipe(io.FileIO):
    """Written to: what its reader has not waited for is lost."""

    def write(self, data, /) -> int:
        with suppress(BrokenPipeError):
            return super().write(data)
        return memoryview(data).nbytes


def open_streams() -> None:
    """To be called before anything is printed. Python sets a closed stream to None, which has no
    flush(), and the next file that is opened would get the stream's number."""
    for name in STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the stream's own
            os.set_inheritable(number, True)  # to the processes of a run
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and not stream.isatty():
            pipe = Pipe(stream.fileno(), "w", closefd=False)
            kept = ("encoding", "errors", "line_buffering", "write_through")
            settings = {setting: getattr(stream, setting) for setting in kept}
            buffer = pipe if stream.write_through else io.BufferedWriter(pipe)
            setattr(sys, name, io.TextIOWrapper(buffer, **settings))
