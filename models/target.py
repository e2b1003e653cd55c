"""The target encoder: where the latents to be predicted come from, and how it follows."""

import copy

import torch
from torch import Tensor, nn

from models.vit import Encoder

# ema:      a moving average of the online encoder (published)
# joint:    the online encoder itself, gradients through both sides
# stopgrad: the online encoder itself, detached
# frozen:   the online encoder as it was at the start, never updated
# pixels:     no encoder: the patch itself
# projection: no encoder: a linear map of the patch, never updated
TARGETS = ("ema", "joint", "stopgrad", "frozen", "pixels", "projection")
OWN_WEIGHTS = ("ema", "frozen")
# Of tokens [N, L, D]: what each number is standardised over.
NORMS = {"layer": -1, "instance": 1, "batch": (0, 1)}


def make_target(encoder: Encoder, depth: int | None) -> Encoder:
    """A copy without gradients of the first `depth` blocks (None: all), final norm and head."""
    target = copy.deepcopy(encoder)
    if depth is not None:
        target.blocks = target.blocks[:depth]
    return target.requires_grad_(False)


def make_projection(patch_dim: int, embed_dim: int) -> nn.Linear:
    """Like a patch embedding of torch's own start: weights and biases uniform below
    1 / sqrt(patch_dim)."""
    return nn.Linear(patch_dim, embed_dim).requires_grad_(False)


def standardise(tokens: Tensor, norm: str | None) -> Tensor:
    """tokens [N, L, D]: over the channels of each token (layer), or for each channel over the
    tokens of the image (instance) or of all images of the process (batch)."""
    if norm is None:
        return tokens
    variance, mean = torch.var_mean(tokens, NORMS[norm], correction=0, keepdim=True)
    return (tokens - mean) * (variance + 1e-5).rsqrt()


def average_layers(layers: list[Tensor], norm: str | None, post_norm: str | None) -> Tensor:
    """The mean of several layers (data2vec), patch tokens of all positions: [N, L, D] each."""
    full = [layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in layers]
    mean = torch.stack([standardise(layer, norm) for layer in full]).mean(dim=0)
    return standardise(mean, post_norm)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online.

    Parameters are paired by name, so that a target of fewer blocks follows exactly the blocks that
    it copied."""
    own, others = dict(target.named_parameters()), dict(online.named_parameters())
    torch._foreach_lerp_([*own.values()], [others[name] for name in own], 1.0 - momentum)
