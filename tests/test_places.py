"""What a command reads is looked at before torch is imported, in the words of what reads it."""

import subprocess
import sys

import pytest

from data.base import DataError
from data.datasets import DATASETS, LAYOUTS, build_dataset
from launch.command import check_places
from launch.config import ConfigError, compose_config
from tests.runs import LAUNCHER, ROOT


def refusal(cfg) -> str:
    with pytest.raises(ConfigError) as caught:
        check_places(cfg)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"DAVIS-2017"}))
@pytest.mark.parametrize("data_path", ["null", "/not/there", "FILE"])
def test_a_data_set_that_is_not_there(tmp_path, name, data_path):
    (tmp_path / "file").write_text("")
    path = {"null": None, "FILE": str(tmp_path / "file")}.get(data_path, data_path)
    with pytest.raises(DataError) as said:
        build_dataset(name, "train", path)
    given = [f"data_path={path or 'null'}", f"output_dir={tmp_path}"]
    cfg = compose_config("lmim", [f"dataset={name}", *given, "env=local"])
    if name == "images" and data_path == "FILE":
        check_places(cfg)  # it may be a .tar
    else:
        assert refusal(cfg) == str(said.value)
    cfg.env.slurm = True
    check_places(cfg)  # on the nodes it may be there


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - LAYOUTS.keys()))
def test_a_data_set_that_needs_no_folder(name):
    check_places(compose_config("lmim", [f"dataset={name}", "data_path=/not/there", "env=local"]))
    assert len(build_dataset(name, "train", "/not/there"))


def test_the_launcher_says_so_without_torch():
    """Of all runs of a sweep."""
    arguments = ["env=local", "-m", "seed=1,2", "data_path=/not/there"]
    command = [sys.executable, "-X", "importtime", *LAUNCHER[1:], *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and error.startswith("error: data_path=/not/there: ")
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "data.datasets" in loaded and not {"torch", "torchvision", "timm"} & loaded
