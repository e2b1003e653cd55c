"""Schedules as pure functions of the fractional epoch: a resumed run needs no state of theirs."""

from dataclasses import dataclass
from math import cos, pi
from typing import Any


@dataclass(frozen=True)
class Schedule:
    cfg: Any  # a composed config, or anything with its keys as attributes
    peak_lr: float

    def learning_rate(self, epoch: float) -> float:
        """Linear from the floor to the peak over warmup_epochs, then half a cosine back."""
        floor = self.peak_lr * self.cfg.min_lr_frac
        height = warmup_cosine(epoch, 0.0, self.cfg.warmup_epochs, self.cfg.epochs)
        return floor + (self.peak_lr - floor) * height

    def target_momentum(self, epoch: float) -> float:
        """From target_mom to 1: the target comes to rest at the end."""
        rise = half_cosine(epoch / self.cfg.epochs)
        return 1 - (1 - self.cfg.target_mom) * rise

    def similarity_goal(self, epoch: float) -> float:
        first, last = self.cfg.sim_init, self.cfg.sim_end
        return last + (first - last) * half_cosine(epoch / self.cfg.epochs)


def half_cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return (1 + cos(pi * progress)) / 2


def warmup_cosine(epoch: float, floor_share: float, warmup_epochs: float, epochs: float) -> float:
    """Linear from 0 to 1 over warmup_epochs, then half a cosine back to floor_share."""
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    length = epochs - warmup_epochs
    height = half_cosine((epoch - warmup_epochs) / length) if length > 0 else 1.0
    return floor_share + (1 - floor_share) * height


def peak_learning_rate(blr: float, batch_size: int, accum_iter: int, world_size: int) -> float:
    """Base learning rates are per 256 images of the effective batch."""
    return blr * batch_size * accum_iter * world_size / 256
