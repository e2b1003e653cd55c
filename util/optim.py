"""AdamW as published: which parameters decay. LARS for linear probes. Schedules, as pure functions
of the fractional epoch: a resumed run needs no state of theirs."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import nn

NO_DECAY = ("bias", "norm", "embed")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and tokens do; vectors and anything named bias, norm or embed do not."""
    return parameter.ndim > 1 and not any(word in name for word in NO_DECAY)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]


def build_adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """The learning rate is set before each step (engine_pretrain.begin_step).

    Fused: one kernel for all parameters, which can leave a step out on the device (`found_inf`)."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class LARS(torch.optim.Optimizer):
    """Stochastic gradient descent whose step is proportional to the size of what it changes, as
    MAE's linear probe has it: matrices get a layer-wise rate and weight decay, vectors (bias and
    norm) plain momentum. timm's divides by |gradient| + weight_decay * |weight| instead.

    step = lr * v, where v = momentum * v + rate * (gradient + weight_decay * weight) and
    rate = trust_coefficient * |weight| / |gradient + weight_decay * weight|, or 1 where either norm
    is 0."""

    def __init__(self, params: Iterable, lr: float = 0.0, weight_decay: float = 0.0):
        constants = {"momentum": 0.9, "trust_coefficient": 0.001}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **constants})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # it takes no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    def update(self, parameter: torch.Tensor, group: dict) -> None:
        change = parameter.grad
        if parameter.ndim > 1:
            change = change + group["weight_decay"] * parameter
            weight_norm, change_norm = parameter.norm(), change.norm()
            rate = group["trust_coefficient"] * weight_norm / change_norm
            # On the device: no answer is waited for.
            change = change * torch.where((weight_norm > 0) & (change_norm > 0), rate, 1.0)
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(change)
        parameter.sub_(group["lr"] * state["momentum"])


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
