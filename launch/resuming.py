"""May a run go on from a checkpoint, with this config and these images?

One comparison for the run that resumes and for the launcher, which asks before it starts or submits
anything (launch/results.py): so this imports no torch.
"""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data.base import ImageDataset
from launch.config import PATHS, ConfigError, UserError, flatten, shipped_keys

FORMAT = 2  # 1: views depended on the number of processes


class CheckpointError(UserError):
    pass


# Besides env, and as the sections of the configs say.
CHANGE_NO_RESULT = {*PATHS, "dataset.options.index_folder"} | set(
    "worker job_name resume overwrite num_workers data_timeout max_steps max_bad_images recompute "
    "max_bad_steps on_collapse watch_images "
    "print_freq save_freq save_minutes eval_freq eval_at_start".split()
)
MAY_DIFFER = CHANGE_NO_RESULT | {"batch_size", "accum_iter"}  # images_per_step may not


def training_batch_size(cfg: DictConfig, images: int, processes: int) -> int:
    """The config's; with shrink_batch at most what is there, because steps are whole."""
    if not ("shrink_batch" in cfg and cfg.shrink_batch):
        return cfg.batch_size
    return min(cfg.batch_size, max(1, images // (cfg.accum_iter * processes)))


def describe(dataset: ImageDataset, batch_size: int, images_per_step: int) -> dict[str, object]:
    """What a run depends on besides its config."""
    return describe_images(dataset) | describe_steps(len(dataset), batch_size, images_per_step)


def describe_images(dataset: ImageDataset) -> dict[str, object]:
    """Their names and labels: reading the images themselves would take too long."""
    names = [dataset.describe(index) for index in range(len(dataset))]
    folder = os.path.commonprefix([min(names), max(names)]).rpartition("/")[0]  # it may be moved
    digest = hashlib.sha256(os.fsencode("\0".join(name[len(folder) :] for name in names)))
    if dataset.labels is not None:
        digest.update(np.asarray(dataset.labels, dtype=np.int64).tobytes())
    return {"images": len(names), "image_list": digest.hexdigest()[:16]}


def describe_steps(images: int, batch_size: int, images_per_step: int) -> dict[str, object]:
    """Return what a run depends on of a loader of so many images."""
    return {
        "images_per_step": images_per_step,
        "steps_per_epoch": images // images_per_step,
        "batch_size": batch_size,
    }


def facts_in(contents: dict) -> dict:
    """What describe() said when this checkpoint was made, as far as it was written down."""
    steps = contents.get("steps_per_epoch") or contents["windows_per_epoch"]  # its older name
    known = {"steps_per_epoch": steps, "batch_size": contents["config"]["batch_size"]}
    return known | contents.get("made_from", {})


def differences(old: dict, new: dict) -> dict[str, tuple[object, object]]:
    """Return the settings and facts that differ and may not: {key: (old, new)}."""
    return {
        key: (old.get(key), new.get(key))
        for key in new | old
        if key not in MAY_DIFFER and not key.startswith("env.") and old.get(key) != new.get(key)
        if not (key == "epochs" and new[key] > old[key])
    }


def accept(path: Path, contents: dict, cfg: DictConfig, facts: dict) -> list[str]:
    """-> what the log should say. Raises where the run may not go on from this checkpoint. facts:
    from describe()."""
    config = contents["config"]
    # What one side lacks, being of another version.
    defaults = (shipped_keys(cfg.worker) or shipped_keys()) | facts
    old = defaults | flatten(config) | facts_in(contents)
    found = differences(old, defaults | flatten(OmegaConf.to_container(cfg)))
    changed, least = cfg.resume == "changed", math.ceil(contents["step"] / facts["steps_per_epoch"])
    if least > cfg.epochs and (changed or "steps_per_epoch" not in found):
        raise ConfigError(f"epochs={cfg.epochs}: expected at least {least}, which are trained")
    text = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in found.items())
    if found and not changed:
        if "target_mom" in found and old["target_mom"] == 0.996:
            text += ". It was 0.996 by default once: target_mom=0.996 goes on with that"
        given = "resume=True" if cfg.resume else f"job_name={cfg.job_name}"
        others = "" if cfg.resume else ", overwrite=True or another job_name"
        valid = f"the settings and images of {path}, or resume=changed{others}"
        raise CheckpointError(f"{given}: expected {valid}; differences: {text}")
    said = [f"resume=changed: {text}"] if found else []
    if cfg.epochs > config["epochs"]:
        said.append(f"epochs {config['epochs']} -> {cfg.epochs}: the schedules are stretched")
    per_micro_batch = any(cfg.get(key) for key in ("avg_sim_coeff", "mixup", "sigreg"))
    batch_wide = ("pred_unit", "negatives", "target_norm", "target_post_norm")
    per_micro_batch |= any(cfg.get(key) == "batch" for key in batch_wide)
    before, now = old["batch_size"], facts["batch_size"]  # as shrink_batch has made them
    if now != before and per_micro_batch:
        what = "the objective or mixup is per micro-batch, so numbers differ"
        said.append(f"batch_size {before} -> {now}: {what}")
    if contents.get("format", 1) < FORMAT:
        said.append("the checkpoint is of an earlier version, which drew other random numbers")
    return said
