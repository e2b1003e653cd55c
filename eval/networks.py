"""The one interface that all evaluations see, around this project's encoder and around timm's."""

import re
from typing import NamedTuple

import torch
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn

from eval.weights import BackboneError
from models.vit import Encoder

Colour = tuple[float, float, float]


class Tokens(NamedTuple):
    cls: Tensor | None  # [B, D]
    patches: Tensor  # [B, L, D], row by row over the grid
    grid: tuple[int, int]  # rows, columns


class Backbone(nn.Module):
    """Images in, tokens out: of one layer, with or without the final norm, fixed when loaded."""

    family: str
    name: str
    embed_dim: int
    depth: int  # blocks that are run
    patch_size: int
    image_side: int  # what it was trained on, or what was asked for
    mean: Colour | None  # None: the data set's
    std: Colour | None
    fingerprint: str
    layer: int  # the last block that is run
    final_norm: bool
    is_vit: bool = True  # others take images of any size

    def forward(self, images: Tensor) -> Tokens:
        """images [B, 3, H, W], normalised; H and W are multiples of patch_size."""
        raise NotImplementedError

    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise BackboneError(
                f"images of {height} x {width} pixels: expected multiples of the patch size "
                f"{self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def layer_of(self, parameter_name: str) -> int:
        """0: embeddings, class token, positions; 1 .. depth: blocks; depth + 1: what comes after.

        For parameters of this module, also where it lies inside another one.
        """
        if block := re.search(r"(?:^|\.)blocks\.(\d+)\.", parameter_name):
            return int(block.group(1)) + 1
        after = re.search(r"(?:^|\.)(norm|fc_norm|head)\.", parameter_name)
        return self.depth + 1 if after else 0

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth: none in the first block, `rate` in the last, linear in between."""
        blocks = self.blocks()
        for index, block in enumerate(blocks):
            share = rate * index / max(len(blocks) - 1, 1)
            for name in ("drop_path1", "drop_path2"):
                if not hasattr(block, name):
                    raise BackboneError(
                        f"{self.family}:{self.name}: stochastic depth is only for plain ViTs"
                    )
                setattr(block, name, DropPath(share) if share > 0 else nn.Identity())

    def describe(self) -> dict[str, object]:
        """For results files."""
        return {
            "family": self.family,
            "name": self.name,
            "image_side": self.image_side,
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "layer": self.layer,
            "final_norm": self.final_norm,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "sha256": self.fingerprint,
        }

    def summary(self) -> str:
        norm = "with" if self.final_norm else "without"
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"{self.family}:{self.name}, {self.image_side} x {self.image_side} pixels, patches of "
            f"{self.patch_size}, {self.embed_dim} channels, block {self.layer} {norm} final norm, "
            f"{parameters / 1e6:.1f} M parameters, sha256 {self.fingerprint[:16]}"
        )


def block_index(layer: int, depth: int) -> int:
    """The last block that is run, counted from 0; -1 is the last of all."""
    if not -1 <= layer < depth:
        raise BackboneError(
            f"layer={layer}: expected -1 (the last) or 0 to {depth - 1}, the blocks of the backbone"
        )
    return depth - 1 if layer == -1 else layer


class OwnBackbone(Backbone):
    """This project's encoder: no gap between patches, no projection head."""

    def __init__(self, encoder: Encoder, *, name: str, layer: int, final_norm: bool):
        super().__init__()
        self.layer = block_index(layer, len(encoder.blocks))
        # What is not run is not there either: it would be trained in vain, or counted.
        encoder.blocks = encoder.blocks[: self.layer + 1]
        encoder.head = nn.Identity()
        if not final_norm:
            encoder.norm = nn.Identity()
        self.encoder = encoder
        self.family, self.name, self.final_norm = "lmim", name, final_norm
        self.embed_dim, self.patch_size = encoder.embed_dim, encoder.patch_size
        self.depth = len(encoder.blocks)
        self.image_side = encoder.grid_size * encoder.patch_size
        self.mean = self.std = None

    def blocks(self) -> nn.ModuleList:
        return self.encoder.blocks

    def forward(self, images: Tensor) -> Tokens:
        encoder = self.encoder
        grid = self.grid_of(images)
        positions = self.positions(grid)
        tokens = encoder.embed(cut_patches(images, self.patch_size)) + positions[:, 1:]
        cls_token = (encoder.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1)
        for block in encoder.blocks:
            tokens = block(tokens)
        tokens = encoder.norm(tokens)
        return Tokens(tokens[:, 0], tokens[:, 1:], grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, 1 + rows * columns, D]: the trained table, interpolated for other grids."""
        table = self.encoder.pos_embed.pos_embeds[None]
        side = self.encoder.grid_size
        if grid == (side, side):
            return table
        return resample_abs_pos_embed(
            table, new_size=list(grid), old_size=[side, side], num_prefix_tokens=1
        )


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, L, patch_size * patch_size * 3] in the order row, column, channel: what
    models.views.extract_patches does for squares."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


class TimmBackbone(Backbone):
    """Any model of timm. Its last feature map gives the patch tokens; layers, stochastic depth and
    layer decay are for those with a list of transformer blocks."""

    def __init__(self, model: nn.Module, *, family: str, name: str, layer: int, final_norm: bool):
        super().__init__()
        self.is_vit = hasattr(model, "num_prefix_tokens") and isinstance(
            getattr(model, "blocks", None), nn.Sequential | nn.ModuleList
        )
        self.family, self.name, self.final_norm = family, name, final_norm
        if self.is_vit:
            self.layer = block_index(layer, len(model.blocks))
            model.blocks = model.blocks[: self.layer + 1]
            self.depth = len(model.blocks)
        elif layer != -1:
            raise BackboneError(f"layer={layer}: expected -1 for {family}:{name}, which is no ViT")
        else:
            self.layer = self.depth = len(model.feature_info)
        has_norm = not isinstance(getattr(model, "norm", None), nn.Identity)
        if self.is_vit and not has_norm and hasattr(model, "fc_norm"):
            model.norm = model.fc_norm  # its only norm stands behind timm's own pooling
        if not final_norm and hasattr(model, "norm"):
            model.norm = nn.Identity()
        # Norm and head behind timm's own pooling are not run.
        for unused in ("fc_norm", "head_drop", "head", "attn_pool"):
            if hasattr(model, unused):
                setattr(model, unused, nn.Identity())
        self.model = model
        self.embed_dim = model.num_features
        self.patch_size = self.find_patch_size()
        settings = model.pretrained_cfg
        self.image_side = settings["input_size"][-1]
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        # Where the class token is: in front of any registers.
        self.has_cls = self.is_vit and getattr(model, "cls_token", None) is not None

    def find_patch_size(self) -> int:
        if self.is_vit:
            height, width = self.model.patch_embed.patch_size
            if height != width:
                raise BackboneError(f"{self.family}:{self.name}: expected square patches")
            return height
        return self.model.feature_info[-1]["reduction"]

    def blocks(self) -> nn.ModuleList:
        if not self.is_vit:
            raise BackboneError(
                f"{self.family}:{self.name}: stochastic depth and layer decay are only for ViTs"
            )
        return self.model.blocks

    def layer_of(self, parameter_name: str) -> int:
        self.blocks()
        return super().layer_of(parameter_name)

    def forward(self, images: Tensor) -> Tokens:
        if self.is_vit:
            grid = self.grid_of(images)
            features = self.model.forward_features(images)
            prefix = self.model.num_prefix_tokens
            return Tokens(features[:, 0] if self.has_cls else None, features[:, prefix:], grid)
        features = self.model.forward_features(images)
        if features.ndim != 4:
            raise BackboneError(f"{self.family}:{self.name}: expected ViTs and feature maps")
        if getattr(self.model, "output_fmt", "NCHW") == "NCHW":
            features = features.permute(0, 2, 3, 1)
        return Tokens(None, features.flatten(1, 2), tuple(features.shape[1:3]))
