"""Latent MIM: online encoder, target encoder and decoder in one forward pass; what targets are, and
how the target encoder follows."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decoder import DECODERS
from models.views import Views, extract_patches, take_tokens
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


class Latents(NamedTuple):
    """What the loss needs. Class tokens are not part of any of them."""

    predictions: Tensor  # [N, M, D], for pixels [N, M, patch_dim]
    targets: Tensor  # of the same shape
    visible: Tensor  # [N, V, D]


class LatentMIM(nn.Module):
    def __init__(
        self,
        *,
        patch_gap: int,
        decoder: str,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        avg_vis_mask_token: bool,
        target: str,
        target_depth: int | None,
        mask_target: bool,
        target_layers: Sequence[int] | None,
        target_norm: str | None,
        target_post_norm: str | None,
        target_tap: str,
        **encoder,
    ):
        """encoder: the arguments of Encoder, of which the decoder shares four."""
        super().__init__()
        self.patch_size, self.patch_gap = encoder["patch_size"], patch_gap
        self.target, self.target_depth, self.mask_target = target, target_depth, mask_target
        self.target_layers, self.target_tap = target_layers, target_tap
        self.target_norm, self.target_post_norm = target_norm, target_post_norm
        patch_dim, embed_dim = 3 * self.patch_size**2, encoder["embed_dim"]
        # Of the values of a patch: pixel * scale + shift is normalised (util/build.py).
        self.register_buffer("scale", torch.ones(patch_dim), persistent=False)
        self.register_buffer("shift", torch.zeros(patch_dim), persistent=False)
        self.encoder = Encoder(**encoder)
        if target in OWN_WEIGHTS:
            self.target_encoder = make_target(self.encoder, target_depth)
        elif target == "projection":
            self.target_projection = make_projection(patch_dim, embed_dim)
        self.decoder = DECODERS[decoder](
            grid_size=encoder["grid_size"],
            encoder_dim=embed_dim,
            target_dim=patch_dim if target == "pixels" else embed_dim,
            dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            visual_cue=avg_vis_mask_token,
            freeze_pe=encoder["freeze_pe"],
            recompute=encoder["recompute"],
        )

    def move_target(self, momentum: float) -> None:
        """Once per step: a moving average follows the online encoder, others stay as they are."""
        if self.target == "ema":
            follow(self.target_encoder, self.encoder, momentum)

    def compiled_methods(self) -> list[tuple[nn.Module, str]]:
        """Which methods of which modules compile=True compiles, each by itself: what is before the
        blocks, each block, what is after them; the whole target where it has no gradients. The
        blocks of a network share one compilation, and DistributedDataParallel sends the gradients
        of one while those of the next are computed."""
        methods: list[tuple[nn.Module, str]] = []
        for network in (self.encoder, self.decoder):
            methods += [(network, "embed_tokens"), (network, "project")]
            methods += [(block, "forward") for block in network.blocks]
        return methods + ([] if self.target == "joint" else [(self, "encode_target")])

    def patches(self, images: Tensor, views: Views) -> Tensor:
        """images [N, 3, side, side], uint8 or normalised -> [N, L, patch_dim] of the same type"""
        offsets = (views.row_offsets, views.column_offsets)
        return extract_patches(images, self.patch_size, self.patch_gap, *offsets)

    def take(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Those with these ids, and what is in uint8 normalised: as late as possible, because bytes
        are a quarter of the traffic. -> float32 [N, K, patch_dim]"""
        taken = take_tokens(patches, ids)
        return taken * self.scale + self.shift if taken.dtype == torch.uint8 else taken

    def encode_visible(self, patches: Tensor, views: Views) -> Tensor:
        """-> [N, 1 + V, D]"""
        return self.encoder(self.take(patches, views.visible_ids), views.visible_ids)

    def encode_target(self, patches: Tensor, views: Views) -> Tensor:
        """-> [N, 1 + M, D]; without mask_target all patches, visible first: [N, 1 + V + M, D]. What
        is no output of an encoder has no class token."""
        ids = views.masked_ids
        if self.target in ("pixels", "projection"):
            masked = self.take(patches, ids)
            return masked if self.target == "pixels" else self.target_projection(masked)
        if not self.mask_target:
            ids = torch.cat([views.visible_ids, views.masked_ids], dim=1)
        encoder = self.target_encoder if self.target in OWN_WEIGHTS else self.encoder
        with nullcontext() if self.target == "joint" else torch.no_grad():
            patches = self.take(patches, ids)
            if self.target_layers is None:
                return encoder(patches, ids, self.target_depth)
            layers = encoder.forward_layers(patches, ids, self.target_layers, self.target_tap)
            without_class = [layer[:, 1:] for layer in layers]
            return average_layers(without_class, self.target_norm, self.target_post_norm)

    def forward(self, images: Tensor, views: Views) -> Latents:
        patches = self.patches(images, views)
        visible = self.encode_visible(patches, views)
        targets = self.encode_target(patches, views)
        predictions = self.decoder(visible, views.visible_ids, views.masked_ids)
        num_masked = views.masked_ids.shape[1]
        return Latents(predictions[:, 1:], targets[:, -num_masked:], visible[:, 1:])


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
