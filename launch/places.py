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
    family, colon, rest = (pretrained or "").partition(":")
    is_other = bool(colon) and family in ("timm", *FAMILIES)
    path = Path(rest if is_other else pretrained or "")
    is_there = path.is_file() or (pretrained and not is_other and list_checkpoints(path))
    if is_there or (is_other and family == "timm"):
        return None
    files = ", ".join(f"{name}:FILE" for name in FAMILIES)
    valid = f"a file or folder with a checkpoint, timm:NAME, {files}"
    return f"pretrained={'null' if pretrained is None else pretrained}: expected {valid}"
