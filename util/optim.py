"""AdamW as published: which parameters decay, and the fused implementation."""

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
