"""Which file a result is in, and when a job that trains is finished: its last checkpoint is there,
of the same settings, images and backbone, and so is its result."""

import importlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from data.base import LabelledImages
from data.datasets import build_dataset
from launch.command import run_command_line
from launch.config import ConfigError, compose_config
from launch.job import checkpoint_name, prepare_job_directory
from launch.results import (
    FORMAT,
    CheckpointError,
    describe,
    is_finished,
    read_outline,
    result_path,
    resumes,
    sha256_of,
)
from tests.backbones import digits_checkpoint
from tests.evaluations import arguments, config, launch, results
from tests.runs import LAUNCHER, ROOT, TINY, finish, start_process


@cache
def composed(name: str, *choices: str) -> DictConfig:
    return compose_config(name, [*choices])


def changed(name: str, *overrides: str) -> DictConfig:
    """As composed with them; what chooses no group is set afterwards, which is faster."""
    choices = [text for text in overrides if text.partition("=")[0] in ("dataset", "loss")]
    cfg = composed(name, *choices).copy()
    cfg.merge_with_dotlist([text for text in overrides if text not in choices])
    return cfg


def demo(folder: Path, *overrides: str) -> DictConfig:
    return changed("demo", f"output_dir={folder}", "epochs=2", "resume=True", *overrides)


def evaluation(name: str, folder: Path, pretrained: Path, *overrides: str) -> DictConfig:
    places = [f"output_dir={folder}", f"pretrained={pretrained}"]
    return changed(name, "dataset=digits", *places, *overrides)


def probe(folder: Path, pretrained: Path, *overrides: str) -> DictConfig:
    own = ["epochs=2", "warmup_epochs=0", "batch_size=100", "resume=True"]
    return evaluation("linear_probe", folder, pretrained, *own, *overrides)


def leave(cfg: DictConfig, per_step: int, result: dict | None = None, **others) -> Path:
    """What a run of two epochs leaves. -> its checkpoint"""
    job = Path(cfg.output_dir) / cfg.job_name
    images = build_dataset(cfg.dataset.name, "train", cfg.data_path, {})
    images = LabelledImages(images) if "backbone" in others else images
    contents = {
        "state_dict": OrderedDict(weight=torch.ones(3)),
        "config": OmegaConf.to_container(cfg),
        "step": 2 * (len(images) // per_step),
        "steps_per_epoch": len(images) // per_step,
        "made_from": describe(images, cfg.batch_size, per_step),
        "format": FORMAT,
        **others,
    }
    path = job / "checkpoints" / checkpoint_name(contents["step"], 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, path)
    if result is not None:
        (job / "results").mkdir(exist_ok=True)
        (job / "results" / f"{cfg.job_name}.json").write_text(json.dumps(result))
    return path


def refusal(cfg: DictConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        is_finished(cfg)
    return str(caught.value).partition("differences: ")[2]


# ---- Finished? -----------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["True", "False"])
def test_the_same_settings_are_finished_and_others_are_refused(tmp_path, capfd, resume):
    path = leave(demo(tmp_path), 128, {"steps": 20})
    same = demo(tmp_path, f"resume={resume}", "print_freq=3", "num_workers=1", "accum_iter=2")
    same.batch_size = 64
    assert is_finished(same)
    assert capfd.readouterr().out == f"demo: already finished ({path})\n"
    other = demo(tmp_path, f"resume={resume}", "seed=5", "loss=l2")
    assert refusal(other) == "seed 0 -> 5, loss.name infonce_patches -> l2"
    with pytest.raises(ConfigError, match="epochs=1: expected at least 2, which are trained"):
        is_finished(demo(tmp_path, f"resume={resume}", "epochs=1"))
    assert refusal(demo(tmp_path, f"resume={resume}", "env.ngpu=2")).startswith("images_per_step")


@pytest.mark.parametrize("key", ["resume=changed", "overwrite=True", "epochs=3"])
def test_what_is_to_train_is_not_finished(tmp_path, key):
    leave(demo(tmp_path), 128, {"steps": 20})
    cfg = demo(tmp_path, key, "seed=1")
    before = cfg.copy()
    assert not is_finished(cfg) and resumes(cfg) == before.resume and cfg == before


@pytest.mark.parametrize(
    ("result", "others"),
    [(None, {}), ({"steps": 10}, {}), ({"steps": 20}, {"unfinished": {"sums": []}})],
    ids=["no result", "of fewer epochs", "its evaluation failed"],
)
def test_without_its_result_or_its_evaluation_it_is_not_finished(tmp_path, result, others):
    leave(demo(tmp_path), 128, result, **others)
    cfg = demo(tmp_path, f"resume={bool(others)}")
    assert not is_finished(cfg)
    assert resumes(cfg) is True, "the run would have refused to start over"


def test_a_trial_is_finished_at_its_own_end(tmp_path):
    cfg = demo(tmp_path, "max_steps=14")
    leave(cfg, 128, {"steps": 14}, step=14)
    assert is_finished(cfg)
    assert not is_finished(demo(tmp_path, "max_steps=15")) and not is_finished(demo(tmp_path))


def test_a_damaged_checkpoint_is_for_the_run_to_name(tmp_path):
    path = leave(demo(tmp_path), 128, {"steps": 20})
    path.write_bytes(path.read_bytes()[:200])
    assert not is_finished(demo(tmp_path))


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    cfg = demo(tmp_path)
    leave(cfg, 128, {"steps": 20}, made_from={})
    assert is_finished(cfg)
    assert refusal(demo(tmp_path, "seed=1")) == "seed 0 -> 1"


def test_the_images_are_compared(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8)).save(photos / f"{number}.png")
    own = ["dataset=folder", "batch_size=4"]
    leave(demo(tmp_path, *own, f"data_path={photos}"), 4, {"steps": 4})
    assert is_finished(demo(tmp_path, *own, f"data_path={photos}"))
    photos = photos.rename(tmp_path / "moved")
    assert is_finished(demo(tmp_path, *own, f"data_path={photos}"))
    renamed = tmp_path / "renamed"
    (photos / "7.png").rename(photos / "8.png")
    photos.rename(renamed)
    assert refusal(demo(tmp_path, *own, f"data_path={renamed}")).startswith("image_list ")
    for elsewhere in ("$SLURM_TMPDIR/photos", str(tmp_path / "of another machine")):
        cfg = demo(tmp_path, *own, f"data_path={elsewhere}", "resume=False")
        assert not is_finished(cfg) and resumes(cfg) is True, "the run itself compares"
        cfg = demo(tmp_path, *own, f"data_path={elsewhere}", "seed=1")
        assert refusal(cfg) == "seed 0 -> 1"


def test_the_probe_of_another_backbone_does_not_answer(tmp_path):
    first = digits_checkpoint(tmp_path).rename(tmp_path / "first.pth")
    second = digits_checkpoint(tmp_path, seed=1).rename(tmp_path / "second.pth")
    cfg, sha256 = probe(tmp_path, first), sha256_of(first)
    leave(cfg, 100, backbone={"sha256": sha256})
    assert not is_finished(probe(tmp_path, first)), "there is no result"
    path = result_path(cfg, "linear_probe", sha256, processes=1)
    path.parent.mkdir()
    path.write_text('{"evaluation": "linear_probe"}')
    assert is_finished(probe(tmp_path, first))
    with pytest.raises(CheckpointError, match=f"another backbone .sha256 {sha256} is now"):
        is_finished(probe(tmp_path, second))
    assert not is_finished(probe(tmp_path, first, "resume=changed", "weight_decay=1"))
    assert refusal(probe(tmp_path, first, "random_init=True")) == "random_init False -> True"


def test_the_outline_of_a_checkpoint_is_all_but_its_tensors(tmp_path):
    path = leave(demo(tmp_path), 128, backbone={"sha256": "a"}, optimizer={"lr": [0.5, None]})
    contents = torch.load(path, weights_only=True)
    contents["state_dict"] = OrderedDict(weight=None)
    assert read_outline(path) == contents

    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save(contents | {"state_dict": Harmful()}, path)
    assert read_outline(path)["state_dict"] is None and not (tmp_path / "ran").exists()


def test_the_launcher_answers_without_torch(tmp_path):
    leave(demo(tmp_path, "warmup_epochs=0"), 128, {"steps": 20})
    given = ["--config-name=demo", f"output_dir={tmp_path}", "epochs=2", "warmup_epochs=0"]
    command = [sys.executable, "-X", "importtime", *LAUNCHER[1:], *given]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "demo: already finished (" in result.stdout
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "launch.results" in loaded and not {"torch", "timm"} & loaded


# ---- Names. --------------------------------------------------------------------------------------


def test_a_result_is_named_by_what_it_is_of(tmp_path):
    def path_of(*overrides: str, name: str = "nn", sha256: str = "a", processes: int = 1) -> Path:
        checkpoint = tmp_path / "demo" / "checkpoints" / "step-00000003.pth"
        cfg = evaluation(name, tmp_path, checkpoint, *overrides)
        return result_path(cfg, name, sha256, processes)

    first = path_of()
    assert first.parent == tmp_path / "nn" / "results"
    begin = "nn-paper-digits-demo-step-00000003-"
    assert first.name.startswith(begin) and len(first.stem) == len(begin) + 8
    same = ["batch_size=7", "num_workers=3", "env.ngpu=0", f"cache_dir={tmp_path}"]
    assert path_of(*same, processes=2) == first
    others = [
        path_of("protocol=knn"),
        path_of("protocol=knn", "neighbours=[3]"),
        path_of("dataset=textures"),
        path_of("dataset=textures", "dataset.options.seed=4"),
        path_of("dataset=folder", "data_path=/a"),
        path_of("dataset=folder", "data_path=/b"),
        path_of(sha256="b"),
        path_of("random_init=True"),
        path_of("layer=2"),
        path_of("seed=1"),
        path_of(name="few_shot"),
    ]
    assert len({first, *others}) == 1 + len(others)
    trained = [path_of("accum_iter=2", name="linear_probe", processes=n) for n in (1, 2)]
    assert trained[0] != trained[1], "of other images per step"
    longest = path_of(f"pretrained=timm:{'x' * 300}")
    assert len(longest.name) < 180


# ---- Whole runs. ---------------------------------------------------------------------------------

SHORT = [*TINY, "epochs=2", "eval_freq=1", "eval_at_start=True", "watch_images=20"]


@pytest.mark.slow
def test_a_sweep_of_other_settings_is_refused(tmp_path):
    sweep = [*LAUNCHER, *SHORT, f"output_dir={tmp_path}", "job_name=sw", "resume=False", "-m"]
    sweep += ["tau=0.2,0.3"]
    assert finish(start_process(sweep))[0] == 0
    code, output = finish(start_process(sweep))
    assert code == 0 and output.count("already finished") == output.count("\n") == 2
    code, output = finish(start_process([*sweep, "seed=5", "loss=l2"]))
    assert code == 2 and output.startswith("error: job_name=sw-tau0.2: expected the settings and ")
    assert output.endswith("; differences: seed 0 -> 5, loss.name infonce_patches -> l2\n")
    result = tmp_path / "sw-tau0.3" / "results" / "sw-tau0.3.json"
    before = json.loads(result.read_text())
    result.unlink()
    code, output = finish(start_process(sweep))
    assert code == 0 and output.count("already finished (") == 1
    after = json.loads(result.read_text())
    assert after.pop("made_on_resume") and after.pop("seconds") <= before.pop("seconds")
    assert after == before and before["after"] is not None


@pytest.mark.slow
def test_killed_between_the_last_checkpoint_and_the_result(tmp_path):
    command, job = [*LAUNCHER, *SHORT, f"output_dir={tmp_path}"], tmp_path / "demo"
    killed = start_process([*command, "worker=tests.failing"], FAIL="0 20 killed")
    assert finish(killed)[0] != 0
    assert [path.name for path in job.glob("checkpoints/*")] == ["epoch-0002-step-00000020.pth"]
    assert not [*job.glob("results/*")]
    code, output = finish(start_process(command))
    assert code == 0 and "already finished: nothing is left to train\n" in output
    made = json.loads((job / "results" / "demo.json").read_text())
    undisturbed = [*LAUNCHER, *SHORT, f"output_dir={tmp_path}", "job_name=undisturbed"]
    assert finish(start_process(undisturbed))[0] == 0
    wanted = json.loads((tmp_path / "undisturbed/results/undisturbed.json").read_text())
    assert made.pop("made_on_resume") is True
    assert made.pop("seconds") > 0 and wanted.pop("seconds") > 0
    assert made == wanted
    code, output = finish(start_process(command))
    assert code == 0 and output.startswith("demo: already finished (")


@pytest.mark.slow
def test_a_result_that_a_full_disk_has_refused(small_disk):
    """The rest of the disk is filled when the last checkpoint is written."""
    command, job = [*LAUNCHER, *SHORT, f"output_dir={small_disk}"], small_disk / "demo"
    process = start_process([*command, "worker=tests.failing"], FAIL=f"0 20 {small_disk}")
    code, output = finish(process)
    assert code in (1, 2) and "No space left on device" in output and "Traceback" not in output
    assert not [*job.glob("results/*.json")]
    (small_disk / "filler").unlink()
    code, output = finish(start_process(command))
    assert code == 0, output
    assert json.loads((job / "results" / "demo.json").read_text())["steps"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_probe", "finetune"])
def test_the_result_of_a_probe_that_is_lost_is_made_again(tmp_path, name):
    checkpoint = digits_checkpoint(tmp_path)
    own = ["epochs=1", "warmup_epochs=0", "batch_size=100", "resume=True"]
    assert launch(name, checkpoint, tmp_path, *own)[0] == 0
    before = results(tmp_path, name)
    code, output = launch(name, checkpoint, tmp_path, *own)
    assert code == 0 and output.startswith(f"{name}: already finished (")
    (path,) = (tmp_path / name / "results").glob("*.json")
    path.unlink()
    code, output = launch(name, checkpoint, tmp_path, *own)
    assert code == 0 and "nothing is left to train" in output
    after = results(tmp_path, name)
    assert after.pop("made_on_resume") is True
    assert after.pop("seconds") > 0 and before.pop("seconds") > 0
    assert after == before
    shown = [*(tmp_path / name / "tensorboard" / path.stem).iterdir()]
    assert len(shown) == 1


@pytest.mark.slow
def test_results_of_one_folder_do_not_replace_each_other(tmp_path):
    checkpoint = digits_checkpoint(tmp_path)
    found = {}
    for protocol in ("paper", "knn", "paper"):
        code, output = launch("nn", checkpoint, tmp_path, f"protocol={protocol}", "neighbours=[5]")
        assert code == 0, output
        (path,) = (tmp_path / "nn/results").glob(f"nn-{protocol}-digits-digits-*.json")
        found[protocol] = json.loads(path.read_text())["results"]
        (folder,) = (tmp_path / "nn/tensorboard").glob(f"nn-{protocol}-*")
        assert folder.name == path.stem and len([*folder.iterdir()]) == 1
    assert len([*(tmp_path / "nn/results").iterdir()]) == len(found) == 2
    assert found["paper"].keys() == {"top1"} and found["knn"].keys() == {"k5_top1", "k5_top5"}


def test_a_folder_belongs_to_one_worker(tmp_path, capsys, monkeypatch):
    """Found before anything is imported, and again where another has been faster."""
    config_file = tmp_path / "demo" / "config.yaml"
    config_file.parent.mkdir()
    config_file.write_text("worker: main_lmim\n")
    checkpoint = digits_checkpoint(tmp_path)
    expected = (
        f"job_name=demo: expected another name for eval.nn, because {tmp_path}/demo belongs to "
        "main_lmim"
    )
    monkeypatch.setattr(
        sys, "argv", ["nn", *arguments("nn", checkpoint, tmp_path, "job_name=demo")]
    )
    code = run_command_line(lambda configs: pytest.fail("it has run"), "", "nn")
    assert code == 2 and capsys.readouterr().err == f"error: {expected}\n"
    for name in ("nn", "linear_probe"):
        cfg = config(name, checkpoint, tmp_path, "job_name=demo")
        with pytest.raises(ConfigError, match=f"expected another name for eval.{name}, because"):
            importlib.import_module(cfg.worker).main(cfg)
    assert config_file.read_text() == "worker: main_lmim\n"
    config_file.write_text("worker: eval.nn\n")
    with pytest.raises(ConfigError, match="another name for main_lmim, because .* eval.nn"):
        prepare_job_directory(demo(tmp_path))
