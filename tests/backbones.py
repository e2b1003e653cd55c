"""Checkpoints and images for the tests of evaluations: small, made on the spot, never trained."""

import importlib
from functools import cache
from io import BytesIO
from pathlib import Path

import torch
from omegaconf import OmegaConf

from eval import backbone
from eval.backbone import Backbone
from launch.command import call, say_error
from launch.config import CONFIG_DIR, ConfigError, compose_config
from launch.validate import check_config
from util.build import build_model
from util.checkpoint import FORMAT

TINY = [
    "encoder.grid_size=6",
    "encoder.patch_size=4",
    "num_vis=9",
    "encoder.embed_dim=24",
    "encoder.depth=3",
    "proj.mlp_dim=32",
    "decoder_embed_dim=24",
    "decoder_depth=1",
]


@cache
def digits_contents(overrides: tuple[str, ...], seed: int) -> bytes:
    cfg = compose_config("demo", [*TINY, *overrides])
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():  # the target differs from the online encoder once training has begun
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    contents = {
        "state_dict": model.state_dict(),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "epoch": 1,
        "step": 10,
        "format": FORMAT,
    }
    file = BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def digits_checkpoint(folder: Path, *overrides: str, seed: int = 0) -> Path:
    """What a pre-training run on the digits leaves behind."""
    path = folder / "digits.pth"
    path.write_bytes(digits_contents(overrides, seed))
    return path


def load_backbone(pretrained: Path | str | None, **options) -> Backbone:
    """With the keys of configs/backbone/ as they are shipped, but for these."""
    cfg = OmegaConf.load(CONFIG_DIR / "backbone" / "default.yaml")
    own = {"pretrained": None if pretrained is None else str(pretrained), **options}
    return backbone.load_backbone(OmegaConf.merge(cfg, own))


def images(side: int, columns: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, side, columns or side, generator=generator)


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in weights.items()}


def run_command(config_name: str, *overrides: str) -> int:
    """What the command line does, in this process. -> exit code"""
    try:
        cfg = compose_config(config_name, ["dataset=digits", "num_workers=0", *overrides])
        check_config(cfg)
    except ConfigError as error:
        say_error(error)
        return 2
    threads = torch.get_num_threads()
    try:
        return call(importlib.import_module(cfg.worker).main, cfg)
    finally:
        torch.set_num_threads(threads)
