"""What a run says: lines on the console, above a bar on a terminal, and with the time of each in
logs/console.txt; log.txt; TensorBoard.

A full disk does not stop training: what could not be written is kept until there is room again.
"""

import io
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import RLock

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto
from tqdm import tqdm

from util.files import read_records, write_whole

GROUPS = {  # of TensorBoard; what is in none is about training
    "similarity": "sim_pred sim_vis sim_trg sim_goal",
    "schedule": "epoch lr momentum",
    "speed": "images_per_second share_of_peak data_wait eta_seconds memory_gb seconds",
    "collapse": "verdict since reason rankme mean_cosine same_place other_places "
    "token_similarity position_probe position_chance",
    "eval": "nn_accuracy top1 top5",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}

# tqdm's default lock between processes would be reported as leaked at the end.
tqdm.set_lock(RLock())


class RunLog:
    """The console (on a terminal above a progress bar), log.txt with one JSON object per line,
    TensorBoard. Rank 0 writes; on the others this is silent.

    A resumed run first drops what the interrupted one had logged of later steps, so that no step is
    there twice. One that starts from the beginning puts the log of an earlier run into logs/."""

    def __init__(
        self,
        job: Path,
        is_main: bool,
        total_steps: int,
        resumed_step: int = 0,
        unfinished: bool = False,  # of that step, all but its log line will be recorded again
    ):
        self.job, self.is_main = job, is_main
        self.start = self.last_said = time.monotonic()
        self.bar = tqdm(
            total=total_steps,
            initial=resumed_step,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}% |{bar}|",
            disable=not (is_main and sys.stderr.isatty()),
        )
        if not is_main:
            return
        (job / "logs").mkdir(exist_ok=True)
        earlier = put_away_earlier_log(job) if resumed_step == 0 else ""
        keep_until_step(job / "log.txt", resumed_step or -1, unfinished)
        self.lines = JsonLines(job / "log.txt")
        self.scalars = TensorBoardFile(job / "tensorboard", resumed_step + 1)
        with suppress(OSError):  # it is kept until there is room
            config = (job / "config.yaml").read_text().replace("\n", "\n    ")
            self.scalars.add({"config": "    " + config}, resumed_step)
        self.console = AppendedFile(job / "logs" / "console.txt")
        if earlier:
            self.say(earlier)

    def say(self, text: str) -> None:
        """A line on the console."""
        if not self.is_main:
            return
        self.last_said = time.monotonic()
        # OSError: on a full disk, where the console is a file, too.
        with tqdm.external_write_mode(), suppress(OSError):
            print(text, flush=True)
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{clock}  {line}\n" for line in text.splitlines())
        with suppress(OSError):  # it is kept until there is room
            self.console.append(lines.encode())

    def record(self, values: Mapping[str, float | str], step: int, summary: str) -> None:
        """Numbers of one step: to log.txt, TensorBoard and the console."""
        if not self.is_main:
            return
        seconds = {"seconds": round(time.monotonic() - self.start, 1)}
        for file in (self.lines, self.scalars):
            try:
                file.add({**values, **seconds}, step)
            except OSError as error:
                self.say(f"{file.path} cannot be written ({error.strerror}); training goes on")
        self.say(summary)

    def show(self, picture: bytes, step: int) -> None:
        """A PNG, in TensorBoard alone."""
        with suppress(OSError):  # it is kept until there is room
            self.scalars.add({"eval/images": picture}, step)

    def records_with(self, name: str) -> dict[int, dict]:
        """Return the lines of log.txt that have this number, by step. For the first process."""
        records = read_records(self.lines.path)
        return {record["step"]: record for record in records if name in record}

    def last_with(self, name: str) -> dict:
        """Return the last line of log.txt that has this number; empty if there is none."""
        return [{}, *self.records_with(name).values()][-1]

    def seconds(self) -> float:
        """Return how long the start that wrote the last line of log.txt had taken by then. For the
        first process."""
        return self.last_with("seconds").get("seconds", 0.0)

    def progress(self, step: int, text: str = "") -> None:
        """text: what stands in front of the bar from now on"""
        if text:
            self.bar.set_description_str(text, refresh=False)
        self.bar.update(step - self.bar.n)

    def sync(self) -> None:
        """So that no checkpoint is on the disk without the lines before it."""
        for file in (self.lines, self.scalars, self.console):
            with suppress(OSError):  # a file system that cannot, or a disk that is gone
                os.fsync(file.file.fileno())

    def close(self) -> None:
        """The bar must not stand in front of the last words."""
        self.bar.close()
        if self.is_main:
            for file in (self.lines, self.scalars, self.console):
                file.close()


def put_away_earlier_log(job: Path) -> str:
    """The log of a run whose checkpoints are gone, or replaced (overwrite=True): to logs/, with the
    first number that is free. -> what was done. One that has no step yet is dropped."""
    log, tensorboard, logs = job / "log.txt", job / "tensorboard", job / "logs"
    if not log.exists() or all(record["step"] == 0 for record in read_records(log)):
        shutil.rmtree(tensorboard, ignore_errors=True)
        return ""
    number = 1
    while (logs / f"log-{number}.txt").exists() or (logs / f"tensorboard-{number}").exists():
        number += 1
    if tensorboard.exists():
        tensorboard.rename(logs / f"tensorboard-{number}")
    log.rename(logs / f"log-{number}.txt")
    return f"the log of an earlier run is kept: {logs}/log-{number}.txt and tensorboard-{number}"


def keep_until_step(path: Path, last_step: int, unfinished: bool = False) -> None:
    """Drop what a log has beyond a step, and lines that are damaged. unfinished: and what was found
    out after that step, but not the line about its training."""
    records = read_records(path) if path.exists() else []
    kept = [record for record in records if record["step"] <= last_step]
    if unfinished:
        kept = [r for r in kept if r["step"] < last_step or "images_per_second" in r]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


class AppendedFile:
    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        self.unwritten = b""

    def append(self, contents: bytes) -> None:
        """Raises OSError unless all of it, and all that was refused before, is written."""
        self.unwritten += contents
        while self.unwritten:  # the last free bytes of a disk may hold a part of it
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self) -> None:
        self.file.close()


class JsonLines(AppendedFile):
    """One JSON object per line."""

    def add(self, values: Mapping[str, float | str], step: int) -> None:
        self.append(json.dumps({"step": step, **values}).encode() + b"\n")


class TensorBoardFile(AppendedFile):
    """Scalars in TensorBoard's format. Its own writer works in a thread, which ends at the first
    error and loses what is queued."""

    def __init__(self, folder: Path, first_step: int | None = None):
        """TensorBoard will ignore first_step and later steps of older files in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        unique = f"{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(folder / f"events.out.tfevents.{unique}")
        self.unwritten = as_record(file_version="brain.Event:2")
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self.unwritten += as_record(step=first_step, session_log=start)

    def add(self, values: Mapping[str, float | str | bytes], step: int) -> None:
        shown = [as_value(name, value) for name, value in values.items()]
        self.append(as_record(step=step, summary=Summary(value=shown)))


def as_value(name: str, value: float | str | bytes) -> Summary.Value:
    tag = name if "/" in name else f"{GROUP_OF.get(name, 'train')}/{name}"
    if isinstance(value, bytes):
        width, height = Image.open(io.BytesIO(value)).size
        size = {"width": width, "height": height, "colorspace": 3}
        return Summary.Value(tag=tag, image=Summary.Image(**size, encoded_image_string=value))
    if not isinstance(value, str):
        return Summary.Value(tag=tag, simple_value=value)
    text = {"metadata": create_summary_metadata("", ""), "tensor": make_tensor_proto([value])}
    return Summary.Value(tag=tag, **text)


def as_record(**fields) -> bytes:
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()
