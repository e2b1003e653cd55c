"""Runs of the evaluations for the tests: in this process, and as commands of their own."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig

from launch.config import compose_config
from launch.validate import check_config
from tests.runs import LAUNCHER, finish, start_process


def config(name: str, pretrained: Path | None, folder: Path, *overrides: str) -> DictConfig:
    cfg = compose_config(name, arguments(name, pretrained, folder, *overrides)[1:])
    check_config(cfg)
    return cfg


def arguments(name: str, pretrained: Path | None, folder: Path, *overrides: str) -> list[str]:
    defaults = ["dataset=digits", "num_workers=0"]
    if name != "few_shot":
        defaults.append("precision=fp32")
    places = [f"pretrained={pretrained or 'null'}", f"output_dir={folder}"]
    return [f"--config-name={name}", *defaults, *places, *overrides]


def launch(name: str, pretrained: Path, folder: Path, *overrides: str) -> tuple[int, str]:
    """-> exit code, everything it printed"""
    return finish(start_process([*LAUNCHER, *arguments(name, pretrained, folder, *overrides)]))


def results(folder: Path, name: str, job_name: str = "") -> dict:
    """Of the evaluation that left the one result in the folder of this job."""
    (path,) = (folder / (job_name or name) / "results").glob(f"{name}-*.json")
    return json.loads(path.read_text())


def unlabelled_folder(folder: Path) -> list[str]:
    """Overrides for images without labels."""
    from PIL import Image

    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
    return ["dataset=folder", f"data_path={folder}"]


def assert_bad_input(main, cfg: DictConfig, error: type, words: str) -> None:
    """main(cfg) ends with one sentence that has these words."""
    with pytest.raises(error, match=words) as caught:
        main(cfg)
    assert "\n" not in str(caught.value)
