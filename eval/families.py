"""Weights from elsewhere: files, read without running anything in them and fitted key by key;
models of timm; and official files of other methods, with the keys that hold their encoder.

These methods use plain ViTs, which become timm's VisionTransformer. Positions at other image sizes
are resampled as timm does it, which for DINOv2 is close to the official way and not the same.
"""

import hashlib
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from launch.config import ConfigError
from launch.results import sha256_of
from util.checkpoint import CheckpointError, load_file, load_weights, without_module_prefix

StateDict = dict[str, Tensor]


class BackboneError(ConfigError):
    """The backbone is not available as it was asked for; the message says what is."""


def read_file(path: Path) -> dict:
    """Plain types and tensors only: a file that wants more is refused by name, never run."""
    if not path.is_file():
        raise BackboneError(f"pretrained: expected a file, but there is no {path}")
    try:
        return load_safetensors(path) if path.suffix == ".safetensors" else load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{path} cannot be read ({error})") from error
    except CheckpointError as error:
        wanted = []
        with suppress(Exception):  # it is damaged instead
            wanted = sorted(get_unsafe_globals_in_checkpoint(path))
        if not wanted:
            raise
        why = f"reading it would run code: it wants {', '.join(wanted)}"
        valid = "expected a file of tensors and plain types"
        raise BackboneError(f"{path} is refused, because {why}; {valid}") from error


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


def fingerprint(model: nn.Module, file: Path | None) -> str:
    """Of the file that the weights come from or, where they come from none, of the weights."""
    if file is not None:
        return sha256_of(file)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def build_timm(name: str, weights_file: Path | None, random_init: bool) -> nn.Module:
    """Any model of timm, with the weights of the hub, or of a local file with timm's own keys."""
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them"
        raise BackboneError(f"pretrained=timm:{name}: timm has no such model; {hint}")
    options = {"num_classes": 0}
    with suppress(TypeError), torch.device("meta"):  # where there is no such option
        timm.create_model(name, **options, dynamic_img_size=True)
        options["dynamic_img_size"] = True  # other image sizes are resampled
    if random_init:
        return timm.create_model(name, **options)
    if weights_file is not None:
        model = timm.create_model(name, **options)
        weights = unwrap(read_file(weights_file), ("state_dict", "model"), weights_file)
        weights, own = without_module_prefix(weights), model.state_dict()
        heads = ("head.", "fc.", "classifier.", "head_dist.")  # are left out
        weights = {k: v for k, v in weights.items() if k in own or not k.startswith(heads)}
        load_weights(model, weights, weights_file)
        return model
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub fails in many ways, all of which mean the same
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        problem = f"its weights could not be fetched ({reason})"
        valid = "expected a file of them, pretrained_weights=FILE"
        raise BackboneError(f"pretrained=timm:{name}: {problem}; {valid}") from error


# Heads per width: shapes do not tell.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant"}


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
