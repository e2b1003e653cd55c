"""The one interface that all evaluations see, and from `pretrained=` to what has it: this project's
checkpoints, the published one, any model of timm, and official files of other methods.

These methods use plain ViTs, which become timm's VisionTransformer. Positions at other image sizes
are resampled as timm does it, which for DINOv2 is close to the official way and not the same.
"""

import hashlib
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from launch.config import ConfigError
from launch.places import missing_backbone
from launch.results import sha256_of
from models.vit import Encoder
from util import checkpoint
from util.checkpoint import CheckpointError, first_words, load_weights

StateDict = dict[str, Tensor]
Colour = tuple[float, float, float]

# Heads per width: shapes do not tell.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant"}


class BackboneError(ConfigError):
    """The backbone is not available as it was asked for; the message says what is."""


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
            problem = f"image_side={image_side}: expected a multiple of the patch size"
            raise BackboneError(f"{problem} {self.patch_size}")
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
        facts = {name: getattr(self, name) for name in names}
        return facts | {"parameters": parameters, "sha256": self.fingerprint}


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
            raise BackboneError(f"{self.family}:{self.name}: expected ViTs and feature maps")
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
    path = Path(rest if is_other else cfg.pretrained)
    if family != "timm" and cfg.pretrained_weights is not None:
        weights = f"pretrained_weights={cfg.pretrained_weights}"
        raise BackboneError(f"{weights}: expected with pretrained=timm:NAME only")
    # Fresh weights follow from the seed, and the numbers of others do not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if is_other:
            backbone = load_other(cfg, family, rest)
        else:
            backbone = load_own(cfg, path, contents or read_file(path))
            backbone.resize(cfg.image_side)
    file = cfg.pretrained_weights if family == "timm" else path
    backbone.fingerprint = fingerprint(backbone, None if cfg.random_init else file)
    return backbone.eval()


def load_own(cfg: DictConfig, path: Path, contents: dict) -> OwnBackbone:
    which = cfg.which
    prefix = {"encoder": "encoder.", "target": "target_encoder."}[which]
    stored = checkpoint.without_module_prefix(unwrap(contents, ("state_dict",), path))
    weights = {
        key.removeprefix(prefix): value
        for key, value in stored.items()
        if key.startswith(prefix) and not key.startswith(f"{prefix}head.")  # of pre-training
    }
    config = contents.get("config") or {}
    if not weights:
        raise BackboneError(
            f"{path} has no keys {prefix}*: expected a Latent MIM checkpoint with which={which}; "
            f"for files of other methods write FAMILY:FILE, FAMILY one of {', '.join(FAMILIES)}"
        )
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
    require_keys(weights, ("cls_token", "embed.proj.weight", "pos_embed.pos_embeds"), path)
    embed_dim, patch_values = weights["embed.proj.weight"].shape
    blocks = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
    heads = config.get("encoder", {}).get("num_heads") or HEADS.get(embed_dim)
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


def load_other(cfg: DictConfig, family: str, name: str) -> TimmBackbone:
    """timm has models of many kinds: one image shows whether this one gives tokens on a grid."""
    if family == "timm":
        model = build_timm(name, cfg.pretrained_weights, cfg.random_init)
    else:
        model, name = build_from_file(family, Path(name), cfg.which, cfg.random_init)
    cut = {"layer": cfg.layer, "final_norm": cfg.final_norm}
    try:
        backbone = TimmBackbone(model, family=family, name=name, **cut).eval()
        side = backbone.resize(cfg.image_side)
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, side, side))
    except BackboneError:
        raise
    except Exception as error:  # of any kind, from inside the model
        raise BackboneError(
            f"pretrained={family}:{name}, image_side={cfg.image_side}: expected ViTs and feature "
            f"maps ({first_words(error)})"
        ) from error
    return backbone


def read_file(path: Path) -> dict:
    """Plain types and tensors only: a file that wants more is refused by name, never run."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        return checkpoint.load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{path} cannot be read ({error})") from error
    except CheckpointError as error:
        wanted = []
        with suppress(Exception):  # it is damaged instead
            wanted = get_unsafe_globals_in_checkpoint(path)
        if not wanted:
            raise
        raise BackboneError(
            f"{path} is refused, because reading it would run code: it wants "
            f"{', '.join(sorted(wanted))}; expected a file of tensors and plain types"
        ) from error


def unwrap(contents: object, names: tuple[str, ...], path: Path) -> StateDict:
    """The tensors below the first of these keys that is there, or at the top."""
    if not isinstance(contents, dict):
        raise BackboneError(f"{path} holds a {type(contents).__name__}; expected a state_dict")
    sections = [contents[name] for name in names if isinstance(contents.get(name), dict)]
    contents = [*sections, contents][0]
    tensors = {key: value for key, value in contents.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(contents)[:5])) or "nothing"
        raise BackboneError(f"{path} holds no weights where they are expected; it holds {found}")
    return tensors


def require_keys(weights: StateDict, needed: tuple[str, ...], path: Path) -> None:
    """Those that the architecture is read off."""
    missing = [key for key in needed if key not in weights]
    if missing:
        raise BackboneError(f"{path} holds another architecture: {', '.join(missing)} is missing")


def fingerprint(model: nn.Module, file: Path | str | None) -> str:
    """Of the file that the weights come from or, where they come from none, of the weights."""
    if file is not None:
        return sha256_of(Path(file))
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def build_timm(name: str, weights_file: str | None, random_init: bool) -> nn.Module:
    """Any model of timm, with the weights of the hub, or of a local file with timm's own keys."""
    if not timm.is_model(name.split(".")[0]):
        raise BackboneError(f"pretrained=timm:{name}: expected a name of timm.list_models()")
    options = {"num_classes": 0}
    with suppress(TypeError), torch.device("meta"):  # where there is no such option
        timm.create_model(name, **options, dynamic_img_size=True)
        options["dynamic_img_size"] = True  # other image sizes are resampled
    if random_init:
        return timm.create_model(name, **options)
    if weights_file is not None:
        model = timm.create_model(name, **options)
        path = Path(weights_file)
        weights = unwrap(read_file(path), ("state_dict", "model"), path)
        weights, own = checkpoint.without_module_prefix(weights), model.state_dict()
        heads = ("head.", "fc.", "classifier.", "head_dist.")  # are left out
        weights = {k: v for k, v in weights.items() if k in own or not k.startswith(heads)}
        load_weights(model, weights, weights_file)
        return model
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub fails in many ways, all of which mean the same
        raise BackboneError(
            f"pretrained=timm:{name}: its weights could not be fetched ({type(error).__name__}: "
            f"{first_words(error)}); expected a file of them, pretrained_weights=FILE"
        ) from error


class Family(NamedTuple):
    """encoder, target: where the file keeps what which=encoder and which=target ask for, the first
    section that is there; a file of the encoder alone has none. prefix: what its keys start with
    there. other: keys outside the encoder."""

    encoder: tuple[str, ...]
    target: tuple[str, ...]
    prefix: str = ""
    other: str = ""
    image_side: int | None = None  # None: that of the position table


STUDENT, TEACHER = ("student", "state_dict"), ("teacher", "state_dict")
WRAPPED = r"(module\.)?(backbone\.)?"

FAMILIES = {
    "mae": Family(("model",), ("model",), other=r"decoder|mask_token|head\."),
    "ijepa": Family(("encoder",), ("target_encoder",), prefix=r"module\."),
    "dino": Family(STUDENT, TEACHER, WRAPPED, other=r"head\."),
    "ibot": Family(STUDENT, TEACHER, WRAPPED, other=r"head\.|masked_embed"),
    # As it is evaluated; it was trained up to 518 pixels.
    "dinov2": Family(STUDENT, TEACHER, WRAPPED, other=r"dino_head\.|ibot_head\.", image_side=224),
}


def build_from_file(name: str, path: Path, which: str, random_init: bool) -> tuple[nn.Module, str]:
    """-> the network, and the name of its size"""
    family = FAMILIES[name]
    weights = encoder_weights(family, read_file(path), which, path)
    model = vit_like(weights, path)
    if not random_init:
        load_weights(model, checkpoint_filter_fn(weights, model), path)
    # Where the family has no fixed side, the size of the position table gives it.
    side = family.image_side or model.patch_embed.img_size[0]
    colours = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    model.pretrained_cfg = {"input_size": (3, side, side), **colours}
    size = f"vit_{SIZES.get(model.num_features, 'other')}_patch{model.patch_embed.patch_size[0]}"
    return model, f"{size}-{which}" if which != "encoder" else size


def encoder_weights(family: Family, contents: dict, which: str, path: Path) -> StateDict:
    """The encoder's tensors under the names that timm's filter knows."""
    found = {}
    for key, value in unwrap(contents, getattr(family, which), path).items():
        match = re.match(family.prefix, key)
        key = key[match.end() :] if match else ""
        if key and not (family.other and re.match(family.other, key)):
            # DINOv2's files of models that were trained in chunks number blocks twice.
            found[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)] = value
    return found


def vit_like(weights: StateDict, path: Path) -> VisionTransformer:
    """The architecture, read off the shapes."""
    is_gated = "blocks.0.mlp.w12.weight" in weights
    first = "blocks.0.mlp.w12.weight" if is_gated else "blocks.0.mlp.fc1.weight"
    require_keys(weights, ("patch_embed.proj.weight", "pos_embed", first), path)
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    if width not in HEADS:
        raise BackboneError(f"{path}: has {width} channels; expected one of {list(HEADS)}")
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    has_class = "cls_token" in weights
    places = weights["pos_embed"].shape[1] - int(has_class)
    options = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if is_gated else {}
    return VisionTransformer(
        img_size=round(places**0.5) * patch_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        num_heads=HEADS[width],
        mlp_ratio=(len(weights[first]) + 0.5) / width,  # timm rounds the product down
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
