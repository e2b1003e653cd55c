"""The target encoder: where the latents to be predicted come from, and how it follows."""

import copy

import torch
from torch import Tensor, nn

from models.vit import Encoder

# ema:      a moving average of the online encoder (published)
# joint:    the online encoder itself, gradients through both sides
# stopgrad: the online encoder itself, detached
# frozen:   the online encoder as it was at the start, never updated
TARGETS = ("ema", "joint", "stopgrad", "frozen")
OWN_WEIGHTS = ("ema", "frozen")


def make_target(encoder: Encoder, depth: int | None) -> Encoder:
    """A copy without gradients of the first `depth` blocks (None: all), final norm and head."""
    target = copy.deepcopy(encoder)
    if depth is not None:
        target.blocks = target.blocks[:depth]
    return target.requires_grad_(False)


class MovingAverage:
    """target <- momentum * target + (1 - momentum) * online.

    Parameters are paired by name, so that a target of fewer blocks follows exactly the blocks that
    it copied."""

    def __init__(self, target: nn.Module, online: nn.Module):
        own, others = dict(target.named_parameters()), dict(online.named_parameters())
        self.targets: list[Tensor] = list(own.values())
        self.online: list[Tensor] = [others[name] for name in own]

    @torch.no_grad()
    def step(self, momentum: float) -> None:
        torch._foreach_lerp_(self.targets, self.online, 1.0 - momentum)
