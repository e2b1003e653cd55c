"""AdamW as published: which parameters decay, and the fused implementation. Layer decay for
fine-tuning."""

from collections.abc import Callable

import torch
from torch import nn

NO_DECAY = ("bias", "norm", "embed")
NO_DECAY_IN_FINETUNING = ("pos_embed", "token")  # positions, class and register tokens


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


def layer_decay_groups(
    model: nn.Module,
    layer_of: Callable[[str], int],
    last_layer: int,
    weight_decay: float,
    layer_decay: float,
) -> list[dict]:
    """One group for each layer and kind. The last layer learns at the full rate (lr_scale 1), each
    one below it at layer_decay times the rate of the one above. `names`: the group's parameters."""
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name)
        is_token = any(word in name for word in NO_DECAY_IN_FINETUNING)
        decays = parameter.ndim > 1 and not is_token
        group = groups.setdefault((layer, decays), {"params": [], "names": []})
        group["weight_decay"] = weight_decay if decays else 0.0
        group["lr_scale"] = layer_decay ** (last_layer - layer)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
