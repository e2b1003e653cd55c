"""What a command reads and where it writes, looked at before torch is imported: that takes long."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.config import ConfigError
from launch.job import list_checkpoints, refuse_folder_of_another

FAMILIES = ("mae", "ijepa", "dino", "ibot", "dinov2")  # of official files: eval/backbone.py
IGNORE_DATA_PATH = ("eval.export", "eval.visualize")


def check_places(cfg: DictConfig) -> None:
    """On Slurm what is read may be there on the nodes alone."""
    if "job_name" in cfg:
        refuse_folder_of_another(cfg)
    if cfg.env.slurm or not (cfg.worker == "main_lmim" or cfg.worker.startswith("eval.")):
        return
    from data.base import DataError
    from data.datasets import check_data_path
    from data.files import given_images

    if "pretrained" in cfg:
        for pretrained in cfg.pretrained if OmegaConf.is_list(cfg.pretrained) else [cfg.pretrained]:
            if problem := missing_backbone(pretrained):
                raise ConfigError(problem)
    try:
        if cfg.get("images") is not None:
            given_images(cfg.images)
        elif cfg.worker not in IGNORE_DATA_PATH:
            name = "DAVIS-2017" if cfg.worker == "eval.video" else cfg.dataset.name
            check_data_path(name, cfg.data_path)
    except DataError as error:
        raise ConfigError(str(error)) from error


def missing_backbone(pretrained: str | None) -> str | None:
    """What is wrong with pretrained=, as far as names of files tell."""
    family, colon, file = (pretrained or "").partition(":")
    is_of_family = bool(colon) and family in FAMILIES
    if colon and family == "timm":
        return None
    path = Path(file if is_of_family else pretrained or "")
    if pretrained is None or (colon and not is_of_family and not path.exists()):
        files = ", ".join(f"{family}:FILE" for family in FAMILIES)
        valid = f"a checkpoint or job folder, timm:NAME, {files}"
        return f"pretrained={pretrained or 'null'}: expected {valid}"
    if path.is_dir() and not is_of_family:
        is_there = bool(list_checkpoints(path))
        return None if is_there else f"pretrained={path}: this folder holds no checkpoint"
    return None if path.is_file() else f"pretrained: expected a file, but there is no {path}"
