"""A worker of the project's own in which one step fails: FAIL="RANK STEP KIND"."""

import os

import torch

import engine_pretrain
import main_lmim

ERRORS = {
    "bug": RuntimeError("a bug"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


def main(cfg):
    rank, failing, kind = os.environ["FAIL"].split()

    def only_one(batches):
        yield next(batches)
        raise ERRORS[kind]

    def train_step(training, batches, draw_views, step, epoch):
        """Fails between two micro-steps, when the target has moved, or inside the optimiser."""
        if step == int(failing) and rank == os.environ.get("RANK", "0"):
            if kind == "inside":
                training.scaler.update = lambda: 1 / 0
            else:
                batches = only_one(batches)
        engine_pretrain.train_step(training, batches, draw_views, step, epoch)

    main_lmim.train_step = train_step
    main_lmim.main(cfg)
