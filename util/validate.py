"""Checks of the composed configuration, before anything is built. One sentence for each mistake:
the key, its value, and what would be valid."""

import math
import os
import re
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from omegaconf import DictConfig, ListConfig, OmegaConf

from util.config import (
    CONFIG_DIR,
    ConfigError,
    group_choices,
    job_directory,
    processes_per_node,
    shipped_keys,
)

Rule = tuple[str, Callable[[object], bool]]  # what is expected, in words and as a test
ABSENT = object()


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Infinity and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_switch(value) -> bool:
    return isinstance(value, bool)


def is_text(value) -> TypeGuard[str]:
    return isinstance(value, str) and value.strip() != ""


def is_module(value) -> bool:
    try:
        return is_text(value) and find_spec(value) is not None
    except (ImportError, ValueError):  # of the package around it
        return False


def whole(least: int, most: float = float("inf")) -> Rule:
    words = f"of at least {least}" if most == float("inf") else f"from {least} to {most}"
    return f"a whole number {words}", lambda v: is_whole(v) and least <= v <= most


def number(least: float, most: float = float("inf")) -> Rule:
    words = f"of at least {least}" if most == float("inf") else f"from {least} to {most}"
    return f"a number {words}", lambda v: is_number(v) and least <= v <= most


def whole_list(least: int) -> Rule:
    return (
        f"a list of whole numbers of at least {least}, such as [{least},{least + 1}]",
        lambda v: (
            isinstance(v, ListConfig)
            and len(v) > 0
            and all(is_whole(item) and item >= least for item in v)
        ),
    )


def is_distinct(values: ListConfig) -> bool:
    return 0 < len(values) == len(set(map(str, values)))


def several_of(*names: str) -> Rule:
    words = f"a list of different ones of {', '.join(names)}"
    return (
        words,
        lambda v: isinstance(v, ListConfig) and is_distinct(v) and all(name in names for name in v),
    )


def or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


def one_of(*names: str) -> Rule:
    return f"one of {', '.join(names)}", lambda v: v in names


def choice_of(group: str) -> Rule:
    return one_of(*group_choices(group, [CONFIG_DIR]))


POSITIVE: Rule = ("a number above 0", lambda v: is_number(v) and v > 0)
SHARE: Rule = ("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1)
YES_OR_NO: Rule = ("True or False", is_switch)
TEXT: Rule = ("a text that is not empty", is_text)
FOLDER_NAME: Rule = (
    "the name of a folder inside output_dir, without '/'",
    lambda v: is_text(v) and not set("/\0") & set(v) and v not in (".", "..") and len(v) < 200,
)
# Slurm's accounts and nodes may be plain numbers.
LABEL: Rule = ("a text or a whole number", lambda v: is_text(v) or is_whole(v))
SECTION: Rule = ("a section of keys", lambda v: isinstance(v, DictConfig))
RGB: Rule = (
    "a list of three numbers (red, green, blue)",
    lambda v: isinstance(v, ListConfig) and len(v) == 3 and all(map(is_number, v)),
)
RGB_POSITIVE: Rule = (
    "a list of three numbers above 0 (red, green, blue)",
    lambda v: RGB[1](v) and min(v) > 0,
)

TEXT_LIST: Rule = (
    "a list of texts, such as ['linear_probe.epochs=10']",
    lambda v: isinstance(v, ListConfig) and all(map(is_text, v)),
)
SEVERAL_RATES: Rule = (
    "a list of different numbers above 0",
    lambda v: isinstance(v, ListConfig) and is_distinct(v) and all(map(POSITIVE[1], v)),
)
RAND_AUGMENT: Rule = (
    "a RandAugment of timm, such as rand-m9-mstd0.5-inc1",
    lambda v: is_text(v) and bool(re.fullmatch(r"rand(-(m|mstd|mmax|n|p|inc|t|w)\d+(\.\d+)?)*", v)),
)

# Keys that are True or False in the shipped configs need none.
RULES: dict[str, Rule] = {
    "worker": ("a Python module with main(cfg), such as main_lmim", is_module),
    "job_name": FOLDER_NAME,
    "output_dir": TEXT,
    "data_path": or_null(TEXT),
    "num_workers": or_null(whole(0)),
    "max_bad_images": number(0, 1),
    "max_bad_steps": whole(0),
    "seed": whole(0, 2**63 - 1),
    "precision": one_of("auto", "bf16", "fp16", "fp32"),
    "grid_size": whole(2),
    "patch_size": whole(1),
    "patch_gap": whole(0),
    "num_vis": whole(1),
    "min_crop": SHARE,
    "proj.mlp_dim": whole(1),
    "proj.mlp_depth": whole(0),
    "decoder_depth": whole(1),
    "decoder_embed_dim": whole(1),
    "decoder_num_heads": whole(1),
    "target_depth": or_null(whole(1)),
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
    "encoder.name": FOLDER_NAME,  # part of the default job_name
    "encoder.embed_dim": whole(1),
    "encoder.depth": whole(1),
    "encoder.num_heads": whole(1),
    "encoder.grid_size": whole(2),
    "encoder.patch_size": whole(1),
    "decoder.name": choice_of("decoder"),
    "target.name": choice_of("target"),
    "loss.name": choice_of("loss"),
    "dataset.name": choice_of("dataset"),
    "dataset.crop_ratio": SHARE,
    "dataset.mean": RGB,
    "dataset.std": RGB_POSITIVE,
    "dataset.options": SECTION,
    "env.ngpu": whole(0),
    "env.tasks_per_node": whole(1),
    "env.world_size": whole(1),
    "env.partition": or_null(LABEL),
    "env.timeout": whole(1),
    "env.signal_delay": whole(1),
    "env.workers": whole(1),
    "env.mem": or_null(POSITIVE),
    "env.constraint": or_null(LABEL),
    "env.nodelist": or_null(LABEL),
    "env.exclude": or_null(LABEL),
    "env.account": or_null(LABEL),
    "env.qos": or_null(LABEL),
    "env.comment": or_null(LABEL),
    "env.slurm_extra": SECTION,
    "env.nccl": SECTION,
    "env.max_restarts": whole(0),
    "env.array_parallelism": whole(1),
    "print_freq": whole(1),
    "save_freq": whole(1),
    "save_minutes": POSITIVE,
    "eval_freq": whole(0),
    # every evaluation
    "pretrained": or_null(TEXT),
    "pretrained_weights": or_null(TEXT),
    "which": one_of("encoder", "target"),
    "layer": whole(-1),
    "image_side": or_null(whole(1)),
    "cache_dir": or_null(TEXT),
    # nn
    "protocol": one_of("paper", "knn"),
    "pooling": one_of("cls", "mean", "cls+mean"),
    "neighbours": whole_list(1),
    "temperature": POSITIVE,
    # collapse
    "split": one_of("eval", "train"),
    "probe_images": whole(4),
    # evaluate
    "evals": several_of("nn", "knn", "linear_probe", "few_shot", "collapse", "finetune"),
    "settings": TEXT_LIST,
    # linear_probe, finetune
    "poolings": several_of("cls", "mean", "cls+mean", "attentive"),
    "blrs": SEVERAL_RATES,
    "min_lr": number(0),
    "layer_decay": SHARE,
    "drop_path": number(0, 0.99),
    "auto_augment": or_null(RAND_AUGMENT),
    "mixup": number(0),
    "cutmix": number(0),
    "label_smoothing": number(0, 0.99),
    "erase": number(0, 1),
    # few_shot
    "shots": whole_list(1),
    "draws": whole(1),
    "regularisers": SEVERAL_RATES,
    # segmentation
    "method": one_of("unsupervised", "linear"),
    "features": one_of("tokens", "pixels"),
    "segments": whole_list(1),
    "clustering.metric": one_of("cosine", "euclidean", "manhattan"),
    "clustering.linkage": one_of("average", "complete", "single", "ward"),
    "patch_head.epochs": whole(1),
    "patch_head.lr": POSITIVE,
    "patch_head.weight_decay": number(0),
    "patch_head.batch_images": whole(1),
    # video
    "video_split": FOLDER_NAME,
    "frame_side": whole(1),
    "previous_frames": whole(0),
    "neighbourhood": whole(0),
    "top_k": whole(1),
}


def check_config(cfg: DictConfig) -> None:
    """Each key that the config has; then, for pre-training, what must fit together."""
    switches = {key: YES_OR_NO for key, value in shipped_keys().items() if is_switch(value)}
    for key, (valid, holds) in (RULES | switches).items():
        value = OmegaConf.select(cfg, key, default=ABSENT)
        if value is not ABSENT and not holds(value):
            raise ConfigError(f"{key}={shown(value)}: expected {valid}")
    if "encoder" in cfg:
        check_views(cfg)
        check_networks(cfg)
    if "warmup_epochs" in cfg:
        check_schedule(cfg)
    if "clustering" in cfg:
        check_clustering(cfg)
    if "job_name" in cfg:
        check_job(cfg)


def shown(value) -> str:
    return "null" if value is None else str(value)


def check_views(cfg: DictConfig) -> None:
    patches = cfg.grid_size**2
    # infonce_patches tells the masked patches of an image apart.
    masked, words = (2, "two") if cfg.loss.name == "infonce_patches" else (1, "one")
    if cfg.num_vis > patches - masked:
        raise ConfigError(
            f"num_vis={cfg.num_vis}: expected 1 to {patches - masked}, because "
            f"grid_size={cfg.grid_size} makes {patches} patches and at least {words} must be masked"
        )


def check_networks(cfg: DictConfig) -> None:
    networks = (
        ("encoder.embed_dim", cfg.encoder.embed_dim, "encoder.num_heads", cfg.encoder.num_heads),
        ("decoder_embed_dim", cfg.decoder_embed_dim, "decoder_num_heads", cfg.decoder_num_heads),
    )
    for dim_key, dim, heads_key, heads in networks:
        if dim % heads:
            raise ConfigError(f"{dim_key}={dim}: expected a multiple of {heads_key}={heads}")
        if dim % 4:
            raise ConfigError(
                f"{dim_key}={dim}: expected a multiple of 4, because the position table holds "
                f"sines and cosines of two coordinates"
            )
    if cfg.target_depth is not None and cfg.target_depth > cfg.encoder.depth:
        raise ConfigError(
            f"target_depth={cfg.target_depth}: expected 1 to {cfg.encoder.depth} (encoder.depth), "
            f"or null for all of them"
        )


def check_schedule(cfg: DictConfig) -> None:
    if cfg.warmup_epochs > cfg.epochs:
        raise ConfigError(f"warmup_epochs={cfg.warmup_epochs}: expected 0 to {cfg.epochs} (epochs)")


def check_clustering(cfg: DictConfig) -> None:
    if cfg.clustering.linkage == "ward" and cfg.clustering.metric != "euclidean":
        raise ConfigError(
            f"clustering.metric={cfg.clustering.metric}: expected euclidean with "
            f"clustering.linkage=ward"
        )


def check_job(cfg: DictConfig) -> None:
    processes = processes_per_node(cfg) * cfg.env.world_size
    if not cfg.env.distributed and processes > 1:
        raise ConfigError(
            f"env.distributed=False: valid with one process, but env.ngpu={cfg.env.ngpu} and "
            f"env.world_size={cfg.env.world_size} make {processes}"
        )
    if cfg.env.signal_delay >= 60 * cfg.env.timeout:
        raise ConfigError(
            f"env.signal_delay={cfg.env.signal_delay}: expected fewer seconds than the "
            f"env.timeout={cfg.env.timeout} minutes have"
        )
    if problem := why_not_writable(job_directory(cfg)):
        raise ConfigError(
            f"output_dir={cfg.output_dir}: expected a folder that can be written to, but {problem}"
        )


def why_not_writable(folder: Path) -> str | None:
    """Try it, in the nearest folder that exists: permissions say nothing to root, nor about file
    systems that are read-only."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{existing} refuses new files ({error.strerror})"


def check_gpus(wanted: int, present: int) -> None:
    """Without any GPU the processes run on the CPU."""
    if 0 < present < wanted:
        raise ConfigError(f"env.ngpu={wanted}: expected 1 to {present}, the GPUs present")
