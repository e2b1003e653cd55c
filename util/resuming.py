"""May a job go on with this config and these images? A checkpoint says what it was made with."""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data.base import ImageDataset
from data.loader import StepOrder
from util.checkpoint import FORMAT, CheckpointError
from util.config import PATHS, ConfigError, flatten, shipped_keys

# Besides env, and as the sections of the configs say.
CHANGE_NO_RESULT = {*PATHS, "dataset.options.index_folder"} | set(
    "worker job_name resume overwrite num_workers data_timeout max_steps max_bad_images recompute "
    "max_bad_steps on_collapse watch_images "
    "print_freq save_freq save_minutes eval_freq eval_at_start".split()
)
MAY_DIFFER = CHANGE_NO_RESULT | {"batch_size", "accum_iter"}  # images_per_step may not


def describe(dataset: ImageDataset, loader: StepOrder, processes: int) -> dict[str, object]:
    """What a run depends on besides its config. Of the images their names and labels: reading them
    would take too long."""
    names = [dataset.describe(index) for index in range(len(dataset))]
    folder = os.path.commonprefix([min(names), max(names)]).rpartition("/")[0]  # it may be moved
    digest = hashlib.sha256(os.fsencode("\0".join(name[len(folder) :] for name in names)))
    if dataset.labels is not None:
        digest.update(np.asarray(dataset.labels, dtype=np.int64).tobytes())
    return {
        "images": len(names),
        "image_list": digest.hexdigest()[:16],
        "images_per_step": loader.batch_size * loader.accum_iter * processes,
        "steps_per_epoch": loader.steps_per_epoch,
    }


def differences(old: dict, new: dict) -> dict[str, tuple[object, object]]:
    """Of what must stay."""
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
    steps = contents.get("steps_per_epoch") or contents["windows_per_epoch"]  # its older name
    made_from = {"steps_per_epoch": steps} | contents.get("made_from", {})
    # What one side lacks, being of another version.
    defaults = (shipped_keys(cfg.worker) or shipped_keys()) | facts
    old = defaults | flatten(config) | made_from
    found = differences(old, defaults | flatten(OmegaConf.to_container(cfg)))
    changed, least = cfg.resume == "changed", math.ceil(contents["step"] / facts["steps_per_epoch"])
    if least > cfg.epochs and (changed or "steps_per_epoch" not in found):
        raise ConfigError(f"epochs={cfg.epochs}: expected at least {least}, which are trained")
    text = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in found.items())
    if found and not changed:
        if "target_mom" in found and old["target_mom"] == 0.996:
            text += ". It was 0.996 by default once: target_mom=0.996 goes on with that"
        valid = f"the settings and images of {path}, or resume=changed"
        raise CheckpointError(f"resume=True: expected {valid}; differences: {text}")
    said = [f"resume=changed: {text}"] if found else []
    if cfg.epochs > config["epochs"]:
        said.append(f"epochs {config['epochs']} -> {cfg.epochs}: the schedules are stretched")
    if cfg.batch_size != config["batch_size"] and (cfg.get("avg_sim_coeff") or cfg.get("mixup")):
        what = "the similarity constraint and mixup are per micro-batch, so numbers differ"
        said.append(f"batch_size {config['batch_size']} -> {cfg.batch_size}: {what}")
    if contents.get("format", 1) < FORMAT:
        said.append("the checkpoint is of an earlier version, which drew other random numbers")
    return said
