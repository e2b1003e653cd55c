"""The encoder for others, below output_dir/job_name.

NAME.safetensors  what timm.create_model("vit_base_patch16_224", checkpoint_path=FILE) loads as it
                  is, with a classifier of zeros, because timm expects one
NAME/             in the style of Hugging Face: config.json, model.safetensors (no classifier) and a
                  README.md that says how to extract features

timm's ViT cuts patches with a convolution, so that the patch embedding is permuted; its position
table has a row for the class token, as ours does (zeros where positions are frozen). Positions are
resampled for another image_side.

python launcher.py --config-name=export pretrained=checkpoints/lmim-vit_base
"""

from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from eval.backbone import SIZES, BackboneError, Colour, OwnBackbone
from eval.common import EvalRun, worker
from launch.command import run_worker
from models.vit import Encoder
from util.files import write_json, write_whole

# Next to the file of weights: what timm.create_model needs to build the rest.
TIMM_CLASSES = 1000
TOLERANCE = 1e-5
README = """# {name}

The encoder of a Latent MIM model: `{timm_name}`, {pixels} x {pixels} pixels.

```python
import json, torch, timm
args = json.load(open("config.json"))["model_args"]
model = timm.create_model("{timm_name}", checkpoint_path="model.safetensors", **args)
images = torch.zeros(1, 3, {pixels}, {pixels})  # normalised with config.json's mean and std
features = model.eval().forward_features(images)[:, 1:].mean(1)  # [1, {width}], mean of the patches
```
"""


def export(run: EvalRun) -> None:
    backbone = run.backbone.cpu()
    if not isinstance(backbone, OwnBackbone):
        raise BackboneError(f"pretrained={run.cfg.pretrained}: expected a checkpoint of Latent MIM")
    if not backbone.final_norm:
        raise BackboneError("final_norm=False: expected True for an export, as timm's ViT has it")
    if not run.ranks.is_main:
        return
    folder = run.job / backbone.name
    folder.mkdir(parents=True, exist_ok=True)
    weights = timm_weights(backbone.encoder, backbone.image_side)
    config = describe(backbone.encoder, backbone.image_side, run.colours)
    with_head = run.job / f"{backbone.name}.safetensors"
    shapes = {"head.weight": (TIMM_CLASSES, backbone.embed_dim), "head.bias": (TIMM_CLASSES,)}
    head = {key: torch.zeros(shape) for key, shape in shapes.items()}
    write_whole(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_whole(with_head, save(weights | head, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    sizes = {"pixels": backbone.image_side, "width": backbone.embed_dim}
    readme = README.format(name=backbone.name, timm_name=config["architecture"], **sizes)
    (folder / "README.md").write_text(readme)
    files = {folder / "model.safetensors": 0, with_head: TIMM_CLASSES}
    difference = max(largest_difference(backbone, config, *item) for item in files.items())
    if difference > TOLERANCE:
        raise AssertionError(f"timm's features differ from ours by {difference}")
    run.say(f"export: {with_head} and {folder}/; timm's tokens differ by {difference:.1e} at most")


@torch.no_grad()
def timm_weights(encoder: Encoder, side: int) -> dict[str, Tensor]:
    """state_dict of timm's VisionTransformer without classifier."""
    weights = encoder.state_dict()
    size = encoder.patch_size
    # [D, row, column, channel] -> [D, channel, row, column]
    kernel = weights.pop("embed.proj.weight").reshape(encoder.embed_dim, size, size, -1)
    weights["patch_embed.proj.weight"] = kernel.permute(0, 3, 1, 2)
    weights["patch_embed.proj.bias"] = weights.pop("embed.proj.bias")
    del weights["pos_embed.pos_embeds"]
    grid = side // size
    rows = [encoder.pos_embed.class_row(), encoder.pos_embed.grid_rows((grid, grid))]
    weights["pos_embed"] = torch.cat(rows, dim=1)
    return {key: value.detach().contiguous() for key, value in weights.items()}


def describe(encoder: Encoder, side: int, colours: tuple[Colour, Colour]) -> dict:
    """config.json, in the form of timm's own on Hugging Face."""
    architecture = f"vit_{SIZES.get(encoder.embed_dim, 'base')}_patch{encoder.patch_size}_224"
    if encoder.patch_size not in (8, 16, 32) or not timm.is_model(architecture):
        architecture = "vit_base_patch16_224"  # whose sizes the arguments below change
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": side,
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.embed_dim,
            "depth": len(encoder.blocks),
            "num_heads": encoder.blocks[0].attn.num_heads,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "architecture": architecture,
            "input_size": [3, side, side],
            "interpolation": "bicubic",
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "mean": colours[0],
            "std": colours[1],
        },
    }


@torch.inference_mode()
def largest_difference(backbone: OwnBackbone, config: dict, file: Path, classes: int) -> float:
    """Between our tokens and those of timm's model that loads the file."""
    arguments = config["model_args"] | {"num_classes": classes}
    model = timm.create_model(config["architecture"], checkpoint_path=str(file), **arguments)
    side = backbone.image_side
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = backbone(images)
    theirs = model.eval().forward_features(images)
    return (torch.cat([ours.cls[:, None], ours.patches], dim=1) - theirs).abs().max().item()


main = worker(export)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="export")
