"""The one interface that all evaluations see, and from `pretrained=` to what has it: this project's
checkpoints, the published one, any model of timm, and official files of other methods."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from timm.layers import DropPath
from torch import Tensor, nn

from eval import families
from eval.families import FAMILIES, SIZES, BackboneError, StateDict
from launch.places import missing_backbone
from models.vit import Encoder
from util.checkpoint import first_words, load_weights, without_module_prefix

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
    mean: Colour | None = None  # None: the data set's
    std: Colour | None = None
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
        (height, width), size = images.shape[-2:], self.patch_size
        if height % size or width % size:
            raise BackboneError(f"images of {height} x {width}: expected multiples of {size}")
        return height // size, width // size

    def resize(self, image_side: int | None) -> int:
        """-> the side of the images from now on; None: as it was trained."""
        self.image_side = image_side or self.image_side
        if self.is_vit and self.image_side % self.patch_size:
            valid = f"a multiple of the patch size {self.patch_size}"
            raise BackboneError(f"image_side={image_side}: expected {valid}")
        return self.image_side

    def layer_of(self, parameter_name: str) -> int:
        """0: embeddings, class token, positions; 1 .. depth: blocks; depth + 1: what comes after.

        For parameters of this module, also where it lies inside another one."""
        if block := re.search(r"(?:^|\.)blocks\.(\d+)\.", parameter_name):
            return int(block.group(1)) + 1
        after = re.search(r"(?:^|\.)(norm|fc_norm|head)\.", parameter_name)
        return self.depth + 1 if after else 0

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth: none in the first block, `rate` in the last, linear in between."""
        if not self.is_vit or not all(hasattr(block, "drop_path1") for block in self.blocks()):
            raise BackboneError(f"{self.family}:{self.name}: only plain ViTs can be fine-tuned")
        blocks = self.blocks()
        for index, block in enumerate(blocks):
            share = rate * index / max(len(blocks) - 1, 1)
            for name in ("drop_path1", "drop_path2"):
                setattr(block, name, DropPath(share) if share > 0 else nn.Identity())

    def describe(self) -> dict[str, object]:
        """For results files and the console."""
        names = ("family", "name", "image_side", "patch_size", "embed_dim", "layer", "final_norm")
        parameters = sum(parameter.numel() for parameter in self.parameters())
        counted = {"parameters": parameters, "sha256": self.fingerprint}
        return {name: getattr(self, name) for name in names} | counted


def block_index(layer: int, depth: int) -> int:
    """The last block that is run, counted from 0; -1 is the last of all."""
    if layer >= depth:
        raise BackboneError(f"layer={layer}: expected -1 (the last block) or 0 to {depth - 1}")
    return depth - 1 if layer == -1 else layer


class OwnBackbone(Backbone):
    """This project's encoder: no gap between patches, no projection head."""

    def __init__(self, encoder: Encoder, *, name: str, layer: int, final_norm: bool):
        super().__init__()
        self.layer = block_index(layer, len(encoder.blocks))
        # Drop what is not run, which would be counted and trained.
        encoder.blocks = encoder.blocks[: self.layer + 1]
        encoder.head = nn.Identity()
        if not final_norm:
            encoder.norm = nn.Identity()
        self.encoder = encoder
        self.family, self.name, self.final_norm = "lmim", name, final_norm
        self.embed_dim, self.patch_size = encoder.embed_dim, encoder.patch_size
        self.depth = len(encoder.blocks)
        self.image_side = encoder.grid_size * encoder.patch_size

    def blocks(self) -> nn.ModuleList:
        return self.encoder.blocks

    def forward(self, images: Tensor) -> Tokens:
        grid = self.grid_of(images)
        tokens = self.encoder.norm(self.encoder.encode_images(images))
        return Tokens(tokens[:, 0], tokens[:, 1:], grid)


class TimmBackbone(Backbone):
    """Any model of timm. What is no ViT gives its last feature map as patch tokens. Attributes
    differ, hence Any."""

    def __init__(self, model: Any, *, family: str, name: str, layer: int, final_norm: bool):
        super().__init__()
        has_blocks = isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList)
        self.is_vit = has_blocks and hasattr(model, "num_prefix_tokens")
        self.family, self.name, self.final_norm = family, name, final_norm
        if self.is_vit:
            self.layer = block_index(layer, len(model.blocks))
            model.blocks = model.blocks[: self.layer + 1]
            self.depth = len(model.blocks)
            self.patch_size = model.patch_embed.patch_size[0]
        elif layer != -1:
            raise BackboneError(f"layer={layer}: expected -1 for {family}:{name}, which is no ViT")
        else:
            self.layer = self.depth = len(model.feature_info)
            self.patch_size = model.feature_info[-1]["reduction"]
        has_norm = not isinstance(getattr(model, "norm", None), nn.Identity)
        if self.is_vit and not has_norm and hasattr(model, "fc_norm"):
            model.norm = model.fc_norm  # its only norm follows timm's own pooling
        if not final_norm and hasattr(model, "norm"):
            model.norm = nn.Identity()
        # Norm and head behind timm's own pooling are not run.
        for unused in ("fc_norm", "head_drop", "head", "attn_pool"):
            if hasattr(model, unused):
                setattr(model, unused, nn.Identity())
        self.model = model
        self.embed_dim = model.num_features
        settings = model.pretrained_cfg
        self.image_side = settings["input_size"][-1]
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])

    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    def forward(self, images: Tensor) -> Tokens:
        grid = self.grid_of(images) if self.is_vit else (0, 0)
        features = self.model.forward_features(images)
        if self.is_vit and features.shape[1] == self.model.num_prefix_tokens + math.prod(grid):
            has_cls = getattr(self.model, "cls_token", None) is not None  # in front of registers
            patches = features[:, self.model.num_prefix_tokens :]
            return Tokens(features[:, 0] if has_cls else None, patches, grid)
        if self.is_vit or features.ndim != 4:
            place = f"pretrained={self.family}:{self.name}"
            raise BackboneError(f"{place}: expected ViTs and feature maps")
        if getattr(self.model, "output_fmt", "NCHW") == "NCHW":
            features = features.permute(0, 2, 3, 1)
        return Tokens(None, features.flatten(1, 2), tuple(features.shape[1:3]))


def load_backbone(cfg: DictConfig, contents: dict | None = None) -> Backbone:
    """By the keys of configs/backbone/. pretrained: a checkpoint of this project, the published
    one, timm:NAME, or FAMILY:FILE. contents: of this project's, where the caller has read it."""
    if problem := missing_backbone(cfg.pretrained):
        raise BackboneError(problem)
    family, colon, rest = cfg.pretrained.partition(":")
    is_other = colon and family in ("timm", *FAMILIES)
    if cfg.pretrained_weights is not None and family != "timm":
        valid = "expected with pretrained=timm:NAME only"
        raise BackboneError(f"pretrained_weights={cfg.pretrained_weights}: {valid}")
    # Fresh weights follow from the seed, and the numbers of others do not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if is_other and family == "timm":
            file = None if cfg.pretrained_weights is None else Path(cfg.pretrained_weights)
            model = families.build_timm(rest, file, cfg.random_init)
            backbone = in_timm(cfg, model, family, rest)
        elif is_other:
            file = Path(rest)
            model, name = families.build_from_file(family, file, cfg.which, cfg.random_init)
            backbone = in_timm(cfg, model, family, name)
        else:
            file = Path(cfg.pretrained)
            backbone = load_own(cfg, file, contents or families.read_file(file))
            backbone.resize(cfg.image_side)
    backbone.fingerprint = families.fingerprint(backbone, None if cfg.random_init else file)
    return backbone.eval()


def load_own(cfg: DictConfig, path: Path, contents: dict) -> OwnBackbone:
    which = cfg.which
    prefix = {"encoder": "encoder.", "target": "target_encoder."}[which]
    stored = without_module_prefix(families.unwrap(contents, ("state_dict",), path))
    weights = {
        key.removeprefix(prefix): value
        for key, value in stored.items()
        if key.startswith(prefix) and not key.startswith(f"{prefix}head.")  # of pre-training
    }
    config = contents.get("config") or {}
    if not weights and which == "target" and config:
        found = f"no target encoder (target={config['target']['name']})"
        raise BackboneError(f"which=target: {path} holds {found}; expected encoder")
    if not weights:
        hint = f"for files of other methods write FAMILY:FILE, FAMILY one of {', '.join(FAMILIES)}"
        raise BackboneError(f"{path} has no keys {prefix}*: it is no Latent MIM checkpoint; {hint}")
    encoder = encoder_for(weights, config, path)
    if not cfg.random_init:
        load_weights(encoder, weights, path)
    size = config.get("encoder", {}).get("name") or f"vit_{SIZES.get(encoder.embed_dim, 'other')}"
    name = f"{size}-{which}" if which != "encoder" else size
    backbone = OwnBackbone(encoder, name=name, layer=cfg.layer, final_norm=cfg.final_norm)
    if dataset := config.get("dataset"):  # the published file does not say
        backbone.mean, backbone.std = tuple(dataset["mean"]), tuple(dataset["std"])
    return backbone


def encoder_for(weights: StateDict, config: dict, path: Path) -> Encoder:
    """The architecture, read from the shapes and, for the number of heads, from the config."""
    families.require_keys(weights, ("cls_token", "embed.proj.weight", "pos_embed.pos_embeds"), path)
    embed_dim, patch_values = weights["embed.proj.weight"].shape
    blocks = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
    heads = config.get("encoder", {}).get("num_heads") or families.HEADS.get(embed_dim)
    if heads is None:
        raise BackboneError(f"{path} does not say how many heads its {embed_dim} channels have")
    return Encoder(
        grid_size=math.isqrt(len(weights["pos_embed.pos_embeds"]) - 1),
        patch_size=math.isqrt(patch_values // 3),
        embed_dim=embed_dim,
        depth=len(blocks),
        num_heads=heads,
        freeze_pe=config.get("freeze_pe", True),
        mlp_dim=0,
        mlp_depth=0,  # the projection head belongs to pre-training
        recompute=False,
    )


def in_timm(cfg: DictConfig, model: Any, family: str, name: str) -> TimmBackbone:
    """timm has models of many kinds: one image shows whether this one gives tokens on a grid."""
    cut = {"layer": cfg.layer, "final_norm": cfg.final_norm}
    try:
        backbone = TimmBackbone(model, family=family, name=name, **cut).eval()
        side = backbone.resize(cfg.image_side)
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, side, side))
    except BackboneError:
        raise
    except Exception as error:  # of any kind, from inside the model
        place = f"pretrained={family}:{name}, image_side={cfg.image_side}"
        valid = f"expected ViTs and feature maps ({first_words(error)})"
        raise BackboneError(f"{place}: {valid}") from error
    return backbone
