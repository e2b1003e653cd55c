"""A job's folder, and what is needed to know later what ran in it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from util.checkpoint import list_checkpoints
from util.config import ConfigError, job_directory

PACKAGES = ("torch", "torchvision", "timm", "numpy", "hydra-core", "omegaconf", "submitit")


def prepare_job_directory(cfg: DictConfig, is_main: bool) -> Path:
    """Make output_dir/job_name; refuse to start anew over the checkpoints of an earlier run."""
    job = job_directory(cfg)
    existing = list_checkpoints(job / "checkpoints")
    if existing and not cfg.resume and not cfg.overwrite:
        raise ConfigError(
            f"{job} already holds {existing[0].name}: choose resume=True to continue it, "
            f"overwrite=True to start anew, or another job_name"
        )
    if is_main:
        for name in ("checkpoints", "logs", "tensorboard", "results"):
            (job / name).mkdir(parents=True, exist_ok=True)
        if not cfg.resume:
            for path in existing:
                path.unlink()
        OmegaConf.save(cfg, job / "config.yaml")
        (job / "environment.json").write_text(json.dumps(describe_environment(), indent=2) + "\n")
    return job


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
