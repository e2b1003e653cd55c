"""Results of runs: which file they are in, whether a job that trains has come to its own, and
whether it may go on from a checkpoint, with this config and these images.

Imports no torch: the launcher asks before it starts or submits anything.
"""

import hashlib
import io
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data.base import DataError, ImageDataset, LabelledImages
from data.datasets import build_dataset
from launch.config import (
    PATHS,
    ConfigError,
    UserError,
    flatten,
    job_directory,
    processes_per_node,
    shipped_keys,
)
from launch.job import is_restart, list_checkpoints
from util.files import read_json

LONGEST = 150  # bytes of a name, to which an ending is added
FORMAT = 2  # 1: views depended on the number of processes


# Besides env, and as the sections of the configs say.
CHANGE_NO_RESULT = {*PATHS, "dataset.options.index_folder"} | set(
    "worker job_name resume overwrite num_workers data_timeout max_steps max_bad_images recompute "
    "max_bad_steps on_collapse watch_images "
    "print_freq save_freq save_minutes eval_freq eval_at_start".split()
)
MAY_DIFFER = CHANGE_NO_RESULT | {"batch_size", "accum_iter"}  # images_per_step may not


class CheckpointError(UserError):
    pass


def result_path(cfg: DictConfig, evaluation: str, sha256: str, processes: int) -> Path:
    """Return the file of an evaluation's result: its name has kind, protocol, data set and
    checkpoint in words, and a digest of all that the numbers depend on. So a result replaces only
    one of the same thing. sha256: of the weights."""
    kind = cfg.get("protocol") or cfg.get("method") or ""
    words = [evaluation, kind, cfg.dataset.name, *words_of(cfg.pretrained or "")]
    words += ["random-init"] if cfg.random_init else []
    name = re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, words)), flags=re.ASCII)[:LONGEST]
    digest = digest_of(cfg, evaluation, sha256, processes)
    return job_directory(cfg) / "results" / f"{name}-{digest}.json"


def words_of(pretrained: str) -> list[str]:
    """Return the job and the file of JOB/checkpoints/FILE, else both parts of FAMILY:FILE."""
    family, _, rest = pretrained.rpartition(":")
    if family == "timm":
        return [rest]
    path = Path(rest)
    job = path.parent.parent.name if path.parent.name == "checkpoints" else ""
    return [family, job, path.stem]


def digest_of(cfg: DictConfig, evaluation: str, sha256: str, processes: int) -> str:
    config = flatten(OmegaConf.to_container(cfg))
    kept = {
        key: value
        for key, value in config.items()
        if key not in MAY_DIFFER and not key.startswith("env.")
    }
    if "accum_iter" in cfg:  # it is trained
        kept["images_per_step"] = cfg.batch_size * cfg.accum_iter * processes
    if cfg.data_path is not None:
        kept["data_path"] = os.path.realpath(cfg.data_path)
    text = json.dumps([evaluation, sha256, kept], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ---- Finished? -----------------------------------------------------------------------------------

# What is trained, and whether on labelled images alone.
TRAININGS = {"main_lmim": False, "eval.linear_probe": True, "eval.finetune": True}


def is_finished(cfg: DictConfig) -> bool:
    """Whether nothing is left to do, which is said: the last checkpoint is there, made with these
    settings, images and backbone, and so is its result. Raises what differs. What cannot be found
    out here the run itself compares, when it resumes; there it makes a missing result, too."""
    if "resume" not in cfg:
        return False  # an evaluation that trains nothing may always run again
    if cfg.overwrite or cfg.resume == "changed":
        return False
    path = newest_checkpoint(cfg)
    contents = read_outline(path)
    if path is None or not has_ended(cfg, contents):
        return False
    facts = facts_here(cfg)
    accept(path, contents, cfg, facts or facts_in(contents))
    is_known = facts is not None and is_same_backbone(cfg, contents)
    if not is_known or not has_result(cfg, contents):
        return False
    print(f"{cfg.job_name}: already finished ({path})", flush=True)
    return True


def resumes(cfg: DictConfig) -> bool | str:
    """Whether this start goes on from the newest checkpoint (True or changed). So it does without
    being told if Slurm or torchrun has started the job before, and if all is trained already: what
    is missing then, such as a result, is made."""
    if cfg.resume or is_restart():
        return cfg.resume or True
    return not cfg.overwrite and has_ended(cfg, read_outline(newest_checkpoint(cfg)))


class Outline(pickle.Unpickler):
    """Reads all of torch.save's file but its tensors, and runs nothing that the file names."""

    def find_class(self, module: str, name: str) -> object:
        return OrderedDict if name == "OrderedDict" else lambda *arguments: None

    def persistent_load(self, identity: object) -> None:
        return None


def newest_checkpoint(cfg: DictConfig) -> Path | None:
    return next(iter(list_checkpoints(job_directory(cfg))), None)


def read_outline(path: Path | None) -> dict:
    """Empty where there is none, or it cannot be read: the run says what is wrong."""
    if path is None:
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            contents = Outline(io.BytesIO(archive.read(name))).load()
        facts_in(contents)
    except Exception:  # a damaged file fails in many ways
        return {}
    return contents


def has_ended(cfg: DictConfig, contents: dict) -> bool:
    """Whether the planned steps are done, and what follows the last of them."""
    if not isinstance(contents.get("step"), int) or contents.get("unfinished"):
        return False
    planned = cfg.epochs * facts_in(contents)["steps_per_epoch"]
    return contents["step"] >= min(planned, cfg.get("max_steps") or planned)


def facts_here(cfg: DictConfig) -> dict | None:
    """What resuming would compare besides the config. None: the images are not on this machine, or
    only the run itself knows."""
    processes = count_processes(cfg)
    if cfg.worker not in TRAININGS or processes is None:
        return None
    if cfg.data_path is not None and cfg.data_path.startswith("$"):
        return None  # the node's
    options = json.dumps(OmegaConf.to_container(cfg.dataset.options))
    try:
        images = listed(cfg.dataset.name, cfg.data_path, options, TRAININGS[cfg.worker])
    except (DataError, OSError):
        return None
    batch_size = training_batch_size(cfg, images["images"], processes)
    images_per_step = batch_size * cfg.accum_iter * processes
    if images_per_step > images["images"]:
        return None
    return images | describe_steps(images["images"], batch_size, images_per_step)


@cache
def listed(name: str, data_path: str | None, options: str, only_labelled: bool) -> dict:
    """Describe the images of a data set, once for all runs of a sweep."""
    dataset = build_dataset(name, "train", data_path, json.loads(options))
    is_part = only_labelled and dataset.labels is not None
    return describe_images(LabelledImages(dataset) if is_part else dataset)


def count_processes(cfg: DictConfig) -> int | None:
    """None: as many as there are GPUs, which only torch knows."""
    if cfg.env.ngpu is None:
        return None if cfg.env.distributed else 1
    return processes_per_node(cfg) * cfg.env.world_size


def is_same_backbone(cfg: DictConfig, contents: dict) -> bool:
    """False where that is not known. Raises where it is another one."""
    if "backbone" not in contents:
        return True
    before, now = contents["backbone"].get("sha256"), sha256_here(cfg)
    if now is not None and now != before:
        raise CheckpointError(other_backbone("sha256", before, now))
    return now is not None


def other_backbone(key: str, before: object, now: object) -> str:
    change = f"{key} {before} is now {now}"
    hint = "choose that one, overwrite=True or another job_name"
    return f"the checkpoint to resume belongs to another backbone ({change}): {hint}"


def sha256_here(cfg: DictConfig) -> str | None:
    """Return the digest of the file that the weights come from. None: it is not on this machine,
    or there is none."""
    given = Path(cfg.pretrained_weights or (cfg.pretrained or "").rpartition(":")[2])
    path = next(iter(list_checkpoints(given)), given)
    return sha256_of(path) if path.is_file() and not cfg.random_init else None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest()


def has_result(cfg: DictConfig, contents: dict) -> bool:
    """Whether there is the result of the newest checkpoint, and not of fewer epochs."""
    folder = job_directory(cfg) / "results"
    if "backbone" not in contents:
        return read_json(folder / f"{cfg.job_name}.json").get("steps") == contents["step"]
    evaluation, processes = cfg.worker.rpartition(".")[2], count_processes(cfg) or 1
    digest = digest_of(cfg, evaluation, contents["backbone"]["sha256"], processes)
    return any(read_json(path) for path in folder.glob(f"*-{digest}.json"))


# ---- May it go on from a checkpoint? -------------------------------------------------------------


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
        given = "resume=True" if cfg.resume else f"job_name={cfg.job_name}"
        others = "" if cfg.resume else ", overwrite=True or another job_name"
        valid = f"the settings and images of {path}, or resume=changed{others}"
        raise CheckpointError(f"{given}: expected {valid}; differences: {text}")
    said = [f"resume=changed: {text}"] if found else []
    if cfg.epochs > config["epochs"]:
        said.append(f"epochs {config['epochs']} -> {cfg.epochs}: the schedules are stretched")
    before, now = old["batch_size"], facts["batch_size"]  # as shrink_batch has made them
    if now != before:
        said.append(f"batch_size {before} -> {now}: what is per micro-batch gives other numbers")
    if contents.get("format", 1) < FORMAT:
        said.append("the checkpoint is of an earlier version, which drew other random numbers")
    return said
