"""Files of other methods, made here with the official key names, give the tokens of an independent
forward; a file that is damaged, or that would run code, is refused."""

import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F

from eval.backbone import FAMILIES, SIZES, BackboneError
from tests.backbones import digits_checkpoint, images, load_backbone, prefixed
from tests.test_checkpoint import places_of_numbers
from util.checkpoint import CheckpointError

WIDTH, HEADS, PATCH, GRID, DEPTH = 192, 3, 4, 3, 2

# ---- Official files. -----------------------------------------------------------------------------


def official(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The encoder's keys and shapes as the family's files have them."""
    hidden = 4 * WIDTH
    shapes = {
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "pos_embed": (1, GRID**2 + (family != "ijepa"), WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if family != "ijepa":
        shapes["cls_token"] = (1, 1, WIDTH)
    for block in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        if family == "dinov2+giant":
            layers |= {"mlp.w12": (hidden, WIDTH), "mlp.w3": (WIDTH, hidden // 2)}
        else:
            layers |= {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        layers |= {"norm1": (WIDTH,), "norm2": (WIDTH,)}
        for name, shape in layers.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
        if family.startswith("dinov2"):
            shapes |= {f"blocks.{block}.ls{i}.gamma": (WIDTH,) for i in (1, 2)}
    if family.startswith("dinov2"):
        shapes["mask_token"] = (1, WIDTH)
    if family == "dinov2+registers":
        shapes["register_tokens"] = (1, 4, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.2 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def plain_vit(weights: dict, pixels: torch.Tensor) -> torch.Tensor:
    """The encoder written out. -> [B, class token and registers and patches, D]"""
    x = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    x = x @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    table = weights["pos_embed"]
    if "cls_token" in weights:
        x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + table
    if "register_tokens" in weights:
        registers = weights["register_tokens"].expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
    for block in range(DEPTH):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"blocks.{block}.")}

        def linear(y, name, w=w):
            return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def norm(y, name, w=w):
            return F.layer_norm(y, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

        qkv = linear(norm(x, "norm1"), "attn.qkv").unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
        y = linear((attention @ v).transpose(1, 2).flatten(2), "attn.proj")
        x = x + y * w.get("ls1.gamma", 1)
        y = norm(x, "norm2")
        if "mlp.w12.weight" in w:
            gate, value = linear(y, "mlp.w12").chunk(2, -1)
            y = linear(F.silu(gate) * value, "mlp.w3")
        else:
            y = linear(F.gelu(linear(y, "mlp.fc1")), "mlp.fc2")
        x = x + y * w.get("ls2.gamma", 1)
    return F.layer_norm(x, (WIDTH,), weights["norm.weight"], weights["norm.bias"], 1e-6)


EXTRA = torch.zeros(3)
FILES = {
    "mae": lambda w: {"model": w},
    "mae with decoder": lambda w: {
        "model": w
        | {"mask_token": EXTRA, "decoder_embed.weight": EXTRA, "decoder_norm.bias": EXTRA}
    },
    "ijepa": lambda w: {"encoder": prefixed(w, "module."), "target_encoder": {}, "epoch": 300},
    "ijepa target": lambda w: {"encoder": {}, "target_encoder": prefixed(w, "module.")},
    "dino": lambda w: w,
    "dino teacher": lambda w: {
        "student": prefixed(official("dino", 1), "module.backbone."),
        "teacher": prefixed(w, "backbone.") | {"head.mlp.0.weight": EXTRA},
    },
    "ibot": lambda w: {"state_dict": w | {"masked_embed": EXTRA}},
    "dinov2": lambda w: w,
    "dinov2+registers": lambda w: w,
    "dinov2+giant": lambda w: w,
    "dinov2 chunks": lambda w: {re.sub(r"^blocks\.", "blocks.0.", k): v for k, v in w.items()},
    "dinov2 teacher": lambda w: {
        "teacher": prefixed(w, "backbone.") | {"dino_head.last_layer.weight_v": EXTRA}
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_official_files_give_the_tokens_of_an_independent_forward(tmp_path, kind):
    family = kind.split(" ")[0]
    weights = official(family)
    path = tmp_path / "official.pth"
    torch.save(FILES[kind](weights), path)
    which = "target" if kind.endswith(("target", "teacher")) else "encoder"
    name = family.split("+")[0]
    # 224 pixels are slow with patches of 4: one file is asked for its own side.
    side = PATCH * GRID if kind.startswith("dinov2") and kind != "dinov2 teacher" else None
    backbone = load_backbone(f"{name}:{path}", which=which, image_side=side)
    with torch.no_grad():
        found = backbone(images(PATCH * GRID))
        expected = plain_vit(weights, images(PATCH * GRID))
    count = len(expected[0]) - GRID**2
    torch.testing.assert_close(found.patches, expected[:, count:], atol=1e-4, rtol=1e-4)
    assert (found.cls is None) == ("cls_token" not in weights) and found.grid == (GRID, GRID)
    if found.cls is not None:
        torch.testing.assert_close(found.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert backbone.image_side == (side or FAMILIES[name].image_side or GRID * PATCH)
    assert len(backbone.fingerprint) == 64 and "sha256" in backbone.describe()
    # Also the name by which features are cached, for a file may hold both.
    assert backbone.name.endswith("-target") == (which == "target")


def test_sizes_have_the_names_of_timm():
    for width, size in SIZES.items():
        patch = 14 if size in ("huge", "giant") else 16
        with torch.device("meta"):
            model = timm.create_model(f"vit_{size}_patch{patch}_224", depth=1)
        assert model.embed_dim == width


def test_a_file_with_a_key_too_few_or_too_many_is_refused(tmp_path):
    weights = official("mae")
    del weights["norm.bias"]
    torch.save({"model": weights | {"blocks.0.ls1.gamma_": EXTRA}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match='Missing.*"norm.bias". Unexpected.*gamma_"'):
        load_backbone(f"mae:{tmp_path / 'a.pth'}")


# ---- Files that are refused. ---------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_with_code_is_refused_by_name(tmp_path, capsys):
    torch.save({"state_dict": {}, "args": Harmful()}, tmp_path / "harm.pth")
    with pytest.raises(
        BackboneError, match=r"refused.*it wants builtins.print; expected a file of"
    ):
        load_backbone(tmp_path / "harm.pth")
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump(Harmful(), file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(f"mae:{tmp_path / 'plain.pth'}")
    assert "this ran" not in capsys.readouterr().out


def test_a_flipped_bit_is_named(tmp_path):
    """In a checkpoint of this project, and in a file of another method."""
    own = digits_checkpoint(tmp_path)
    torch.save({"model": official("mae")}, tmp_path / "mae.pth")
    for path, prefix in ((own, ""), (tmp_path / "mae.pth", "mae:")):
        damaged = bytearray(path.read_bytes())
        damaged[places_of_numbers(path)[3][5]] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{path} is damaged: \S+ has changed"):
            load_backbone(f"{prefix}{path}")
