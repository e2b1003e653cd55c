"""From `pretrained=` to a backbone: this project's checkpoints, the published one, any model of
timm, and the official files of other methods (eval/families.py)."""

import math
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig

from eval.families import FAMILIES, HEADS, build_from_file
from eval.networks import Backbone, OwnBackbone, TimmBackbone, Tokens
from eval.weights import (
    BackboneError,
    StateDict,
    file_fingerprint,
    fit,
    read_file,
    state_fingerprint,
    unwrap,
)
from models.vit import Encoder
from util.checkpoint import newest_readable, without_module_prefix

__all__ = ["Backbone", "BackboneError", "Tokens", "backbone_from", "load_backbone"]

PARTS = {"encoder": "encoder.", "target": "target_encoder."}
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


def backbone_from(cfg: DictConfig) -> Backbone:
    return load_backbone(
        cfg.pretrained,
        which=cfg.which,
        layer=cfg.layer,
        final_norm=cfg.final_norm,
        image_side=cfg.image_side,
        pretrained_weights=cfg.pretrained_weights,
        random_init=cfg.random_init,
        seed=cfg.seed,
    )


def load_backbone(
    pretrained: str | None,
    *,
    which: str = "encoder",
    layer: int = -1,
    final_norm: bool = True,
    image_side: int | None = None,
    pretrained_weights: str | None = None,
    random_init: bool = False,
    seed: int = 0,
) -> Backbone:
    """pretrained: a checkpoint or job folder of this project, the published checkpoint, timm:NAME,
    or FAMILY:FILE. which: the encoder or its target, where a file holds both. layer: -1 the last
    block, others counted from 0. random_init: the same architecture with fresh weights."""
    if pretrained is None:
        raise BackboneError(
            "pretrained=null: expected a checkpoint or job folder, timm:NAME, or one of "
            f"{', '.join(f'{family}:FILE' for family in FAMILIES)}"
        )
    family, colon, rest = pretrained.partition(":")
    if pretrained_weights is not None and family != "timm":
        raise BackboneError(
            f"pretrained_weights={pretrained_weights}: expected with pretrained=timm:NAME only"
        )
    # Fresh weights follow from the seed, and the numbers of others do not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if colon and family == "timm":
            backbone = load_timm(rest, pretrained_weights, random_init, layer, final_norm)
        elif colon and family in FAMILIES:
            backbone = load_family(family, Path(rest), which, random_init, layer, final_norm)
        elif colon and not Path(pretrained).exists():
            raise BackboneError(
                f"pretrained={pretrained}: no such family; valid: timm, {', '.join(FAMILIES)}"
            )
        else:
            backbone = load_own(Path(pretrained), which, random_init, layer, final_norm)
    if image_side is not None:
        backbone.image_side = image_side
    if backbone.is_vit and backbone.image_side % backbone.patch_size:
        raise BackboneError(
            f"image_side={backbone.image_side}: expected a multiple of the patch size "
            f"{backbone.patch_size}"
        )
    backbone.eval()
    if isinstance(backbone, TimmBackbone):
        check_forward(backbone)
    return backbone


@torch.inference_mode()
def check_forward(backbone: TimmBackbone) -> None:
    """timm has models of many kinds: one image shows whether this one gives tokens on a grid."""
    side = backbone.image_side
    place = f"pretrained={backbone.family}:{backbone.name}, image_side={side}"
    try:
        tokens = backbone(torch.zeros(1, 3, side, side))
    except BackboneError:
        raise
    except Exception as error:  # of any kind, from inside the model
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"{place}: no image of this size goes through it ({reason})") from error
    rows, columns = tokens.grid
    if tokens.patches.shape[1] != rows * columns:
        raise BackboneError(
            f"{place}: {tokens.patches.shape[1]} tokens are no grid of {rows} x {columns}; valid "
            f"are ViTs and feature maps"
        )


# --- this project's -----------------------------------------------------------------------------


def find_checkpoint(path: Path) -> Path:
    """The file itself; of a job the newest checkpoint that can be read."""
    if not path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = newest_readable(folder, report=print)
    if newest is None:
        raise BackboneError(f"pretrained={path}: this folder holds no checkpoint")
    return newest[0]


def load_own(
    path: Path, which: str, random_init: bool, layer: int, final_norm: bool
) -> OwnBackbone:
    path = find_checkpoint(path)
    contents = read_file(path)
    weights = without_module_prefix(unwrap(contents, ("state_dict",), path))
    prefix = PARTS[which]
    weights = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    config = contents.get("config") or {}
    if not weights and which == "target" and config:
        raise BackboneError(
            f"which=target: {path} holds no target encoder (target={config['target']['name']}); "
            f"expected encoder"
        )
    if not weights:
        raise BackboneError(
            f"{path} holds no keys that start with {prefix}: it is no Latent MIM checkpoint; for "
            f"files of other methods write FAMILY:FILE, FAMILY one of {', '.join(FAMILIES)}"
        )
    # The projection head belongs to pre-training.
    weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    encoder = encoder_for(weights, config, path)
    if not random_init:
        fit(encoder, weights, path)
    depth = len(encoder.blocks)
    size = config.get("encoder", {}).get("name") or f"vit_{SIZES.get((encoder.embed_dim, depth))}"
    name = f"{size}-{which}" if which != "encoder" else size
    backbone = OwnBackbone(encoder, name=name, layer=layer, final_norm=final_norm)
    if dataset := config.get("dataset"):  # the published file does not say
        backbone.mean, backbone.std = tuple(dataset["mean"]), tuple(dataset["std"])
    backbone.fingerprint = state_fingerprint(backbone) if random_init else file_fingerprint(path)
    return backbone


def encoder_for(weights: StateDict, config: dict, path: Path) -> Encoder:
    """The architecture, read off the shapes. What shapes do not tell stands in the config."""
    needed = ("cls_token", "embed.proj.weight", "pos_embed.pos_embeds")
    missing = [key for key in needed if key not in weights]
    if missing:
        raise BackboneError(f"{path} holds another architecture: {', '.join(missing)} is missing")
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


# --- others -------------------------------------------------------------------------------------


def load_timm(
    name: str, weights_file: str | None, random_init: bool, layer: int, final_norm: bool
) -> TimmBackbone:
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them"
        raise BackboneError(f"pretrained=timm:{name}: timm has no such model; {hint}")
    from_hub = weights_file is None and not random_init
    model = create_timm_model(name, from_hub)
    if weights_file is not None and not random_init:
        fit_timm(model, Path(weights_file))
    try:
        backbone = TimmBackbone(model, family="timm", name=name, layer=layer, final_norm=final_norm)
    except (AttributeError, TypeError) as error:
        raise BackboneError(
            f"pretrained=timm:{name}: expected ViTs and models with feature maps ({error})"
        ) from error
    is_file = weights_file is not None and not random_init
    backbone.fingerprint = (
        file_fingerprint(Path(weights_file)) if is_file else state_fingerprint(backbone)
    )
    return backbone


def create_timm_model(name: str, from_hub: bool) -> torch.nn.Module:
    try:
        # Other image sizes are resampled where the model knows how to.
        return timm.create_model(name, pretrained=from_hub, num_classes=0, **size_options(name))
    except Exception as error:  # the hub fails in many ways, all of which mean the same
        if not from_hub:
            raise
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"pretrained=timm:{name}: its weights could not be fetched ({type(error).__name__}: "
            f"{reason}); expected a file of them, pretrained_weights=FILE"
        ) from error


def size_options(name: str) -> dict[str, bool]:
    """What makes a model of timm take images of any size, if it can."""
    try:
        with torch.device("meta"):
            timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:  # it has no such option, most often because it needs none
        return {}
    return {"dynamic_img_size": True}


def fit_timm(model: torch.nn.Module, path: Path) -> None:
    """A local file of timm's own keys; the classifier is left out."""
    weights = unwrap(read_file(path), ("state_dict", "model"), path)
    weights = without_module_prefix(weights)
    expected = model.state_dict()
    heads = ("head.", "fc.", "classifier.", "head_dist.")
    weights = {
        key: value for key, value in weights.items() if key in expected or not key.startswith(heads)
    }
    fit(model, weights, path)


def load_family(
    family: str, path: Path, which: str, random_init: bool, layer: int, final_norm: bool
) -> TimmBackbone:
    model, name = build_from_file(family, path, which, random_init)
    name = f"{name}-{which}" if which != "encoder" else name
    backbone = TimmBackbone(model, family=family, name=name, layer=layer, final_norm=final_norm)
    backbone.fingerprint = state_fingerprint(backbone) if random_init else file_fingerprint(path)
    return backbone
