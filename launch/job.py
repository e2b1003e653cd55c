"""A job's folder: its checkpoints by name, whether it is finished, and a record of what ran there.

Imports no torch: the launcher asks the same questions before it submits.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from launch.config import ConfigError, job_directory
from launch.lock import lock, unlock
from launch.validate import check_writable
from util.files import remove_unfinished, write_json, write_whole

PACKAGES = ("torch", "torchvision", "timm", "numpy", "hydra-core", "omegaconf", "submitit")
CHECKPOINT_NAME = re.compile(r"(?:epoch-(\d+)-)?step-(\d+)\.pth")


def checkpoint_name(step: int, epoch: int | None = None) -> str:
    """Files with an epoch in their name are kept for good, of the others the last two."""
    return (f"epoch-{epoch:04d}-" if epoch is not None else "") + f"step-{step:08d}.pth"


def is_restart() -> bool:
    """Slurm or torchrun has started this job before."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(os.environ.get(name, 0)) > 0 for name in counts)


def is_one_of_several() -> bool:
    """torchrun or srun has started other processes of this run."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def list_checkpoints(folder: Path) -> list[Path]:
    """Those of a job, given its folder or the one they are in, the newest first."""
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        return []
    matches = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(match.group(2)), bool(match.group(1)), path) for match, path in matches if match]
    return [path for *_, path in sorted(found, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """How many steps it holds, by its name."""
    return int(checkpoint.stem.rpartition("-")[2])


def refuse_to_start_over(cfg: DictConfig) -> None:
    """The checkpoints of an earlier run are only removed on demand."""
    existing = list_checkpoints(job_directory(cfg))
    if existing and not cfg.resume and not cfg.overwrite:
        choices = "choose resume=True, overwrite=True or another job_name"
        raise ConfigError(f"{job_directory(cfg)} already holds {existing[0].name}: {choices}")


def refuse_folder_of_another(cfg: DictConfig) -> None:
    """A folder belongs to one worker: config.yaml, logs and results of two would mix."""
    job = job_directory(cfg)
    try:
        owner = OmegaConf.load(job / "config.yaml").get("worker", cfg.worker)
    except (OSError, ValueError, YAMLError, AttributeError):  # none yet, or no YAML of keys
        return
    # With a training a worker of the user's own may go on: resuming compares the rest.
    if owner != cfg.worker and any(str(name).startswith("eval.") for name in (owner, cfg.worker)):
        valid = f"another name for {cfg.worker}, because {job} belongs to {owner}"
        raise ConfigError(f"job_name={cfg.job_name}: expected {valid}")


def prepare_job_directory(cfg: DictConfig) -> Path:
    """Make the folder, and try whether files can be written there. For one process of the job."""
    job = job_directory(cfg)
    for name in ("checkpoints", "logs", "tensorboard", "results"):
        (job / name).mkdir(parents=True, exist_ok=True)
        check_writable(cfg, job / name)
    open(job / "log.txt", "ab").close()
    lock(job)
    try:
        refuse_folder_of_another(cfg)
        refuse_to_start_over(cfg)
        for folder in (job, job / "logs", job / "results", job / "checkpoints"):
            remove_unfinished(folder)
        replaced = [] if cfg.resume else list_checkpoints(job / "checkpoints")  # overwrite=True
        if replaced:
            newest = f"the newest is {replaced[0].name}"
            print(f"replacing {len(replaced)} checkpoints of {job.name}, {newest}", flush=True)
        for path in replaced:
            path.unlink()
    except BaseException:
        unlock(job)
        raise
    return job


def record_start(cfg: DictConfig, job: Path) -> None:
    """What runs there. Of a training the configs of earlier starts are kept."""
    newest, config = job / "config.yaml", OmegaConf.to_yaml(cfg).encode()
    if (job / "logs").is_dir() and newest.exists() and newest.read_bytes() != config:
        number = 1 + len(list((job / "logs").glob("config-*.yaml")))
        write_whole(job / "logs" / f"config-{number}.yaml", newest.read_bytes())
    write_whole(newest, config)
    write_json(job / "environment.json", describe_environment())


def describe_environment() -> dict:
    return {
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_uncommitted": git("status", "--porcelain").splitlines(),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git(*arguments: str) -> str:
    """What git says of the code that runs; empty where it is not in a repository."""
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
