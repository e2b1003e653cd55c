"""Checkpoints of a job: written whole or not at all, found again whatever happened.

A file holds plain types and tensors only (it loads with weights_only=True):
{state_dict, optimizer, loss_scaler, epoch, step, config, format}. state_dict has the published key
names. `epoch` and `step` count what is finished; resuming needs nothing else, because all
randomness is a function of the seed and these two.
"""

import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from launch.job import checkpoint_name, list_checkpoints
from launch.results import FORMAT, CheckpointError
from util.files import write_whole

KEEP_ROLLING = 2


def load_file(path: Path) -> dict:
    """weights_only: a file cannot run code. Raises CheckpointError where it cannot be read, and
    where any bit has changed since it was written."""
    try:
        record = damaged_record(path)
        if record is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an incomplete file fails in many ways, all of which mean the same
        reason = f"{type(error).__name__}: {first_words(error)}"
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    raise CheckpointError(f"{path} is damaged: {record} has changed")


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def damaged_record(path: Path) -> str | None:
    """The first part of the zip file that differs from its CRC-32, which torch writes but does not
    compare. None: all are as they were written, or the file has no such values."""
    if not zipfile.is_zipfile(path):
        return None  # torch's format of before 1.6, or a file that torch will refuse
    with zipfile.ZipFile(path) as archive:
        has_values = any(record.CRC for record in archive.infolist())
        return archive.testzip() if has_values else None


def newest_readable(folder: Path, report) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and what it holds, if there is one; damaged ones are reported.
    Files that are all damaged are an error: a run must never start over in silence."""
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            contents = load_file(path)
            if not is_state(contents):
                raise CheckpointError(f"{path} is of another program")
        except CheckpointError as error:
            report(f"{error}; using the one before")
            continue
        if (number := contents.get("format", 1)) not in range(1, FORMAT + 1):
            raise CheckpointError(f"{path} has format {number}: expected 1 to {FORMAT}")
        return path, contents
    if paths:
        problem = f"none of the {len(paths)} checkpoints in {folder} can be read"
        raise CheckpointError(f"{problem}: remove them to start over")
    return None


def is_state(contents: object) -> TypeGuard[dict]:
    """Whether it has what a run needs to find its place: its step and its config."""
    if not isinstance(contents, dict) or not isinstance(contents.get("config"), dict):
        return False
    step = contents.get("step")
    return type(step) is int and step >= 0


def without_module_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published checkpoints carry DistributedDataParallel's prefix."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def load_weights(model: torch.nn.Module, state_dict: dict[str, Tensor], source) -> None:
    """Raises CheckpointError with the first keys that differ in name or shape."""
    try:
        model.load_state_dict(without_module_prefix(state_dict))
    except RuntimeError as error:
        reason = first_words(error)
        raise CheckpointError(f"{source} holds another architecture: {reason}") from error


class CheckpointWriter:
    """Writes in the background, one file at a time, from a copy on the CPU: training does not wait
    for the disk. Call `wait` before the process ends. A write that fails (a full disk) leaves the
    older files as they are, is reported at once, and does not stop training. before_write: what
    has to be on the disk before a checkpoint is."""

    def __init__(self, folder: Path, report, before_write: Callable[[], None] = lambda: None):
        self.folder, self.report, self.before_write = folder, report, before_write
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, contents: dict, step: int, epoch: int | None = None) -> None:
        self.wait()
        path = self.folder / checkpoint_name(step, epoch)
        copied = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), contents)
        self.writing = self.background.submit(self.write, copied, path)

    def wait(self) -> None:
        """Until the file is written. Errors other than write errors are raised here."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def write(self, contents: dict, path: Path) -> None:
        self.before_write()
        try:
            write_whole(path, partial(torch.save, contents))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or first_words(error)
            self.report(f"checkpoint {path} could not be written ({reason}); training goes on")
            return
        rolling = [p for p in list_checkpoints(self.folder) if p.name.startswith("step-")]
        for path in rolling[KEEP_ROLLING:]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.report(f"checkpoint {path} could not be removed ({error.strerror})")
