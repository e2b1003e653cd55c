"""Checks of the composed configuration, before anything is built. One sentence per mistake: the
key,
its value, and what would be valid."""

import os
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from util.config import ConfigError

Rule = tuple[str, Callable[[object], bool]]  # what is valid, in words and as a test


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(least: int) -> Rule:
    return f"a whole number of at least {least}", lambda v: is_whole(v) and v >= least


def number(least: float, most: float = float("inf")) -> Rule:
    words = f"a number of at least {least}" if most == float("inf") else f"{least} to {most}"
    return words, lambda v: is_number(v) and least <= v <= most


def or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


POSITIVE: Rule = ("a number above 0", lambda v: is_number(v) and v > 0)
YES_OR_NO: Rule = ("True or False", lambda v: isinstance(v, bool))
TEXT: Rule = ("a text that is not empty", lambda v: isinstance(v, str) and v.strip() != "")
PRECISION: Rule = ("auto, bf16, fp16 or fp32", lambda v: v in ("auto", "bf16", "fp16", "fp32"))

RULES: dict[str, Rule] = {
    "job_name": TEXT,
    "output_dir": TEXT,
    "data_path": or_null(TEXT),
    "resume": YES_OR_NO,
    "overwrite": YES_OR_NO,
    "num_workers": or_null(whole(0)),
    "max_bad_images": number(0, 1),
    "max_bad_steps": whole(0),
    "seed": whole(0),
    "precision": PRECISION,
    "grid_size": whole(2),
    "patch_size": whole(1),
    "patch_gap": whole(0),
    "num_vis": whole(1),
    "min_crop": ("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1),
    "freeze_pe": YES_OR_NO,
    "proj.mlp_dim": whole(1),
    "proj.mlp_depth": whole(0),
    "decoder_depth": whole(1),
    "decoder_embed_dim": whole(1),
    "decoder_num_heads": whole(1),
    "avg_vis_mask_token": YES_OR_NO,
    "target_depth": or_null(whole(1)),
    "mask_target": YES_OR_NO,
    "tau": POSITIVE,
    "avg_sim_coeff": number(0),
    "sim_init": number(-1, 1),
    "sim_end": number(-1, 1),
    "target_mom": number(0, 1),
    "epochs": whole(1),
    "warmup_epochs": number(0),
    "blr": POSITIVE,
    "min_lr_frac": number(0, 1),
    "weight_decay": number(0),
    "batch_size": whole(1),
    "accum_iter": whole(1),
    "clip_grad": or_null(POSITIVE),
    "encoder.embed_dim": whole(1),
    "encoder.depth": whole(1),
    "encoder.num_heads": whole(1),
    "dataset.flip": YES_OR_NO,
    "dataset.crop_ratio": ("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1),
    "env.slurm": YES_OR_NO,
    "env.distributed": YES_OR_NO,
    "env.ngpu": whole(1),
    "env.world_size": whole(1),
    "print_freq": whole(1),
    "save_freq": whole(1),
    "save_minutes": POSITIVE,
    "eval_freq": whole(0),
    "eval_at_start": YES_OR_NO,
}


def check_config(cfg: DictConfig) -> None:
    for key, (valid, holds) in RULES.items():
        value = OmegaConf.select(cfg, key)
        if not holds(value):
            raise ConfigError(f"{key}={shown(value)}: valid is {valid}")
    check_views(cfg)
    check_networks(cfg)
    check_schedule(cfg)
    check_job(cfg)


def shown(value) -> str:
    return "null" if value is None else str(value)


def check_views(cfg: DictConfig) -> None:
    patches = cfg.grid_size**2
    if cfg.num_vis >= patches:
        raise ConfigError(
            f"num_vis={cfg.num_vis}: valid is 1 to {patches - 1}, because grid_size={cfg.grid_size} "
            f"makes {patches} patches and at least one must be masked"
        )


def check_networks(cfg: DictConfig) -> None:
    networks = (
        ("encoder.embed_dim", cfg.encoder.embed_dim, "encoder.num_heads", cfg.encoder.num_heads),
        ("decoder_embed_dim", cfg.decoder_embed_dim, "decoder_num_heads", cfg.decoder_num_heads),
    )
    for dim_key, dim, heads_key, heads in networks:
        if dim % heads:
            raise ConfigError(f"{dim_key}={dim}: valid is a multiple of {heads_key}={heads}")
        if dim % 4:
            raise ConfigError(
                f"{dim_key}={dim}: valid is a multiple of 4, because the position table holds sines "
                f"and cosines of two coordinates"
            )
    if cfg.target_depth is not None and cfg.target_depth > cfg.encoder.depth:
        raise ConfigError(
            f"target_depth={cfg.target_depth}: valid is 1 to {cfg.encoder.depth} (encoder.depth), "
            f"or null for all of them"
        )


def check_schedule(cfg: DictConfig) -> None:
    if cfg.warmup_epochs > cfg.epochs:
        raise ConfigError(f"warmup_epochs={cfg.warmup_epochs}: valid is 0 to {cfg.epochs} (epochs)")


def check_job(cfg: DictConfig) -> None:
    processes = cfg.env.ngpu * cfg.env.world_size
    if not cfg.env.distributed and processes > 1:
        raise ConfigError(
            f"env.distributed=False: valid with one process, but env.ngpu * env.world_size is "
            f"{processes}"
        )
    check_writable(Path(cfg.output_dir))


def check_writable(output_dir: Path) -> None:
    """The nearest existing folder above must be one that we may write to."""
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir={output_dir}: valid is a folder that can be written to, but {existing} "
            f"{'is not writable' if existing.is_dir() else 'is not a folder'}"
        )
