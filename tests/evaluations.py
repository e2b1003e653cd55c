"""Runs of the evaluations for the tests: in this process, and as commands of their own."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from omegaconf import DictConfig

from data.base import ArrayDataset
from data.datasets import DATASETS, build_digits
from launch.config import compose_config
from launch.validate import check_config
from tests.runs import LAUNCHER, finish, records, start_process

TRAIN, EVAL = 160, 60


def build_few_digits(split: str, data_path: str | None) -> ArrayDataset:
    """A part of the digits, which is enough for a run whose numbers are compared."""
    digits = build_digits(split, data_path)
    count = {"train": TRAIN, "eval": EVAL}[split]
    return ArrayDataset(digits.name, digits.images[:count], digits.labels[:count], digits.classes)


@contextmanager
def few_digits() -> Iterator[None]:
    """Inside, dataset=digits has TRAIN and EVAL images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", build_few_digits)
        yield


def stop_in_step(monkeypatch, task: type, step: int) -> None:
    """In runs of this task Slurm's signal arrives in this step."""
    take_step = task.step

    def take_last_step(self, number: int, batches: Iterator) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGUSR2)
        take_step(self, number, batches)

    monkeypatch.setattr(task, "step", take_last_step)


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


def numbers(job: Path) -> list[dict]:
    """Of the lines of log.txt all that a run which was stopped has to repeat."""
    speed = {"images_per_second", "data_wait", "eta_seconds", "seconds"}
    return [{key: r[key] for key in r.keys() - speed} for r in records(job)]


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
