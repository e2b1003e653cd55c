"""A pre-training in which something fails: FAIL="RANK STEP KIND", also as a worker of the project's
own (worker=tests.failing).

In step STEP (from 0): bug, memory, inside (the optimiser), gone (the folder VAL, for good), lost (a
loader worker). Or, after so many steps, in what follows them: evaluate, watch, log_line, picture.
Or, between the last checkpoint and the result, killed, or a folder whose disk is full then."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import main_lmim
from launch.command import call
from tests.runs import configured_here, fill
from util.loop import Loop

ERRORS = {
    "bug": RuntimeError("a bug"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


def main(cfg):
    plant(pytest.MonkeyPatch(), os.environ["FAIL"])
    main_lmim.main(cfg)


def train_here(folder: Path, *overrides: str, fail: str = "") -> int:
    """A small training in the process of the test. -> exit code"""
    with pytest.MonkeyPatch.context() as patch:
        if fail:
            plant(patch, fail)
        return call(main_lmim.main, configured_here(folder, *overrides))


def plant(patch: pytest.MonkeyPatch, fail: str) -> None:
    rank, failing, kind = fail.split()
    task = main_lmim.Pretraining
    is_this_rank = rank == os.environ.get("RANK", "0")
    train_step, finish = main_lmim.train_step, task.finish

    def only_one(batches):
        yield next(batches)
        raise ERRORS[kind]

    def failing_step(training, batches, draw_views, step, epoch):
        """Fails between two micro-steps, when the target has moved, or inside the optimiser."""
        if step == int(failing) and is_this_rank:
            if kind == "inside":
                training.scaler.update = lambda: 1 / 0
            elif kind == "gone":
                shutil.rmtree(os.environ["VAL"])
            elif kind == "lost":
                multiprocessing.active_children()[0].kill()
            elif kind in ERRORS:
                batches = only_one(batches)
        train_step(training, batches, draw_views, step, epoch)

    patch.setattr(main_lmim, "train_step", failing_step)
    if kind in ("evaluate", "watch", "log_line", "picture"):
        method, done = getattr(task, kind), 0

        def follow_step(loop, *args, followed=Loop.follow_step, **options):
            nonlocal done
            done = loop.done
            followed(loop, *args, **options)

        def fails(*args):
            if done == int(failing) and is_this_rank:
                raise MemoryError("planted")
            return method(*args)

        patch.setattr(Loop, "follow_step", follow_step)
        patch.setattr(task, kind, fails)
    if kind == "killed":
        patch.setattr(task, "finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if os.path.isdir(kind):

        def finish_on_a_full_disk(task, loop):
            fill(Path(kind))
            finish(task, loop)

        patch.setattr(task, "finish", finish_on_a_full_disk)
