"""Official files of other methods: which keys hold the encoder, and how they are called in timm.

All are plain ViTs and become timm's VisionTransformer. Positions at other image sizes are resampled
as timm does it, which for DINOv2 is close to the official way and not the same.
"""

import re
from pathlib import Path
from typing import NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from eval.weights import BackboneError, StateDict, fit, read_file, unwrap

# Heads per width: shapes do not tell.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant"}


class Family(NamedTuple):
    """sections: where the file keeps the encoder for which=encoder and which=target, the first that
    is there; a file of the encoder alone has no section. prefix: what its keys start with there.
    other: keys that are no part of the encoder. renamed: a pattern and what replaces it."""

    sections: dict[str, tuple[str, ...]]
    prefix: str = ""
    other: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    image_side: int | None = None  # None: that of the position table


TEACHER = {"encoder": ("student", "state_dict"), "target": ("teacher", "state_dict")}

FAMILIES = {
    "mae": Family(
        sections={"encoder": ("model",), "target": ("model",)},
        other=r"decoder|mask_token|head\.",
    ),
    "ijepa": Family(
        sections={"encoder": ("encoder",), "target": ("target_encoder",)}, prefix=r"module\."
    ),
    "dino": Family(sections=TEACHER, prefix=r"(module\.)?(backbone\.)?", other=r"head\."),
    "ibot": Family(
        sections=TEACHER, prefix=r"(module\.)?(backbone\.)?", other=r"head\.|masked_embed"
    ),
    "dinov2": Family(
        sections=TEACHER,
        prefix=r"(backbone\.)?",
        other=r"dino_head\.|ibot_head\.|mask_token",
        renamed=(
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # files that were trained in chunks
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
            (r"^register_tokens$", "reg_token"),
        ),
        image_side=224,  # as it is evaluated; it was trained up to 518
    ),
}


def build_from_file(name: str, path: Path, which: str, random_init: bool) -> tuple[nn.Module, str]:
    """-> the network, and the name of its size"""
    family = FAMILIES[name]
    weights = encoder_weights(family, read_file(path), which, path)
    model = vit_like(weights, path)
    if not random_init:
        fit(model, weights, path)
    patch_size = model.patch_embed.patch_size[0]
    # Without a side of its own a family has a table of positions, which tells.
    side = family.image_side or patch_size * model.patch_embed.grid_size[0]
    model.pretrained_cfg = {
        "input_size": (3, side, side),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
    return model, f"vit_{SIZES.get(model.num_features, 'other')}_patch{patch_size}"


def encoder_weights(family: Family, contents: dict, which: str, path: Path) -> StateDict:
    """The encoder's tensors under timm's names."""
    found = {}
    for key, value in unwrap(contents, family.sections[which], path).items():
        match = re.match(family.prefix, key)
        if match is None:
            continue
        key = key[match.end() :]
        if family.other and re.match(family.other, key):
            continue
        for pattern, replacement in family.renamed:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    if "reg_token" in found:
        # The table's first row belongs to the class token; registers have no place.
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def vit_like(weights: StateDict, path: Path) -> VisionTransformer:
    """The architecture, read off the shapes."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in weights]
    if missing:
        raise BackboneError(f"{path} holds another architecture: {', '.join(missing)} is missing")
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    if width not in HEADS:
        valid = ", ".join(map(str, HEADS))
        raise BackboneError(f"{path}: a width of {width} channels is not known; valid: {valid}")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    has_class = "cls_token" in weights
    places = weights["pos_embed"].shape[1] - int(has_class and not registers)
    hidden = len(weights["blocks.0.mlp.fc1.weight"])
    gated = hidden == 2 * weights["blocks.0.mlp.fc2.weight"].shape[1]
    options = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    return VisionTransformer(
        img_size=round(places**0.5) * patch_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        num_heads=HEADS[width],
        mlp_ratio=(hidden + 0.5) / width,  # timm rounds the product down
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1e-5 if "blocks.0.ls1.gamma" in weights else None,
        class_token=has_class,
        no_embed_class=registers > 0,
        reg_tokens=registers,
        global_pool="token" if has_class else "avg",
        fc_norm=False,
        num_classes=0,
        dynamic_img_size=True,
        **options,
    )
