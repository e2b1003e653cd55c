"""A worker of the project's own in which something fails: FAIL="RANK STEP KIND".

In step STEP (from 0): bug, memory, inside (the optimiser), gone (the folder VAL, for good). Or,
after so many steps, in what follows them: evaluate, watch, log_line, picture. Or, between the last
checkpoint and the result, killed, or a folder whose disk is full then."""

import os
import shutil
import signal
from pathlib import Path

import torch

import engine_pretrain
import main_lmim
from tests.test_full_disk import fill
from util.loop import Loop

ERRORS = {
    "bug": RuntimeError("a bug"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}
BETWEEN_STEPS = ("evaluate", "watch", "log_line", "picture")


def main(cfg):
    rank, failing, kind = os.environ["FAIL"].split()
    is_this_rank = rank == os.environ.get("RANK", "0")
    done = 0

    def only_one(batches):
        yield next(batches)
        raise ERRORS[kind]

    def train_step(training, batches, draw_views, step, epoch):
        """Fails between two micro-steps, when the target has moved, or inside the optimiser."""
        if step == int(failing) and is_this_rank:
            if kind == "inside":
                training.scaler.update = lambda: 1 / 0
            elif kind == "gone":
                shutil.rmtree(os.environ["VAL"])
            elif kind in ERRORS:
                batches = only_one(batches)
        engine_pretrain.train_step(training, batches, draw_views, step, epoch)

    def follow_step(loop):
        nonlocal done
        done = loop.done
        followed(loop)

    def fails_between_steps(method):
        def fails(*args):
            if done == int(failing) and is_this_rank:
                raise MemoryError("planted")
            return method(*args)

        return fails

    followed, Loop.follow_step = Loop.follow_step, follow_step
    main_lmim.train_step = train_step
    if kind in BETWEEN_STEPS:
        method = fails_between_steps(getattr(main_lmim.Pretraining, kind))
        setattr(main_lmim.Pretraining, kind, method)
    if kind == "killed":
        main_lmim.Pretraining.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if os.path.isdir(kind):

        def finish(task, loop, finish=main_lmim.Pretraining.finish):
            fill(Path(kind))
            finish(task, loop)

        main_lmim.Pretraining.finish = finish
    main_lmim.main(cfg)
