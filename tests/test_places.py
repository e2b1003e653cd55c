"""What a command reads is looked at before torch is imported, in the words of what reads it."""

import subprocess
import sys

import pytest

from data.base import DataError
from data.datasets import DATASETS, LAYOUTS, build_dataset
from data.files import given_images
from data.masks import read_videos
from eval import backbone
from eval.backbone import BackboneError
from launch.config import ConfigError, compose_config
from launch.places import FAMILIES, check_places
from tests.backbones import digits_checkpoint, load_backbone
from tests.evaluations import config
from tests.runs import LAUNCHER, ROOT


def refusal(cfg) -> str:
    with pytest.raises(ConfigError) as caught:
        check_places(cfg)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("data_path", ["null", "/not/there", "FILE"])
def test_a_data_set_that_is_not_there(tmp_path, name, data_path):
    (tmp_path / "file").write_text("")
    path = {"null": None, "FILE": str(tmp_path / "file")}.get(data_path, data_path)
    with pytest.raises(DataError) as said:
        read_videos(path, "val") if name == "DAVIS-2017" else build_dataset(name, "train", path)
    given = [f"data_path={path or 'null'}", f"output_dir={tmp_path}"]
    if name == "DAVIS-2017":
        cfg = config("video", digits_checkpoint(tmp_path), tmp_path, *given)
    else:
        cfg = compose_config("lmim", [f"dataset={name}", *given, "env=local"])
    if name == "images" and data_path == "FILE":
        check_places(cfg)  # it may be a .tar
    else:
        assert refusal(cfg) == str(said.value)
    cfg.env.slurm = True
    check_places(cfg)  # on the nodes it may be there


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - LAYOUTS.keys()))
def test_a_data_set_that_needs_no_folder(tmp_path, name):
    checkpoint = digits_checkpoint(tmp_path)
    check_places(config("nn", checkpoint, tmp_path, f"dataset={name}", "data_path=/not/there"))
    assert len(build_dataset(name, "train", "/not/there"))


@pytest.mark.parametrize(
    "pretrained", ["null", "/no/file.pth", "moco:x.pth", "mae:/no/file.pth", "FOLDER"]
)
def test_a_backbone_that_is_not_there(tmp_path, pretrained):
    path = {"null": None, "FOLDER": str(tmp_path)}.get(pretrained, pretrained)
    said = refusal(config("nn", path, tmp_path))
    with pytest.raises(BackboneError) as caught:
        load_backbone(path)
    assert said == str(caught.value)
    compared = [digits_checkpoint(tmp_path), path or "''"]
    own = [f"pretrained=[{','.join(map(str, compared))}]", "controls=[pixels]"]
    if path is not None:
        assert refusal(config("visualize", compared[0], tmp_path, *own)) == said


def test_the_families_are_those_that_can_be_read():
    assert {*FAMILIES} == backbone.FAMILIES.keys()


@pytest.mark.parametrize("name", ["features", "visualize"])
def test_images_that_are_not_there(tmp_path, name):
    checkpoint = digits_checkpoint(tmp_path)
    with pytest.raises(DataError) as said:
        given_images(f"{tmp_path}/*.jpg")
    given = [f"images={tmp_path}/*.jpg", "dataset=imagenet"]  # whose data_path is not asked for
    assert refusal(config(name, checkpoint, tmp_path, *given)) == str(said.value)


def test_what_does_not_read_data_path_does_not_ask_for_it(tmp_path):
    checkpoint, own = digits_checkpoint(tmp_path), ["dataset=imagenet", "data_path=/not/there"]
    for name in ("export", "visualize"):
        check_places(config(name, checkpoint, tmp_path, *own))
    with pytest.raises(ConfigError, match="/not/there is not a folder"):
        check_places(config("features", checkpoint, tmp_path, *own))


def test_the_launcher_says_so_without_torch():
    """Of all runs of a sweep."""
    arguments = ["env=local", "-m", "seed=1,2", "data_path=/not/there"]
    command = [sys.executable, "-X", "importtime", *LAUNCHER[1:], *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and error.startswith("error: data_path=/not/there: ")
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "data.datasets" in loaded and not {"torch", "torchvision", "timm"} & loaded
