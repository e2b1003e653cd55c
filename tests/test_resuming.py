"""A resumed job goes on with the settings and the images it was made with, or says what differs."""

import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import eval.finetune
import eval.linear_probe
import main_lmim
from data.datasets import build_dataset
from eval.common import Classification
from launch.command import call
from launch.config import CONFIG_DIR, ConfigError, choices_in, compose_config, read_yaml
from launch.job import list_checkpoints
from launch.results import CHANGE_NO_RESULT, FORMAT, CheckpointError, accept, describe
from tests.backbones import digits_checkpoint
from tests.evaluations import config
from tests.failing import train_here
from tests.kills import log_without_times
from tests.runs import assert_same_state, configured_here, final_state

FACTS = {"images": 1400, "image_list": "a", "images_per_step": 128, "steps_per_epoch": 10}
FACTS |= {"batch_size": 128}


def configured(*overrides: str):
    return compose_config("demo", ["epochs=3", "resume=True", *overrides])


def made(*overrides: str, **contents) -> dict:
    """What a checkpoint of 20 steps says."""
    cfg = configured(*overrides)
    known = {"step": 20, "format": FORMAT, "steps_per_epoch": 10, "made_from": FACTS}
    return {"config": OmegaConf.to_container(cfg), **known, **contents}


def refusal(tmp_path, contents: dict, *overrides: str, error=CheckpointError, **facts) -> str:
    """The sentence, which names the checkpoint and the way out."""
    with pytest.raises(error) as caught:
        accept(tmp_path / "c.pth", contents, configured(*overrides), FACTS | facts)
    message = str(caught.value)
    assert "\n" not in message
    if error is CheckpointError:
        begin = "resume=True: expected the settings and images of "
        assert message.startswith(f"{begin}{tmp_path}/c.pth, or resume=changed; differences: ")
    return message.partition("differences: ")[2] or message


def keys_that_change_no_result(path) -> dict[str, bool]:
    """Of a shipped config, by its headings."""
    text, found = path.read_text(), {}
    is_free = "Changes no result" in text.splitlines()[1]
    for line in text.splitlines():
        if line.startswith("# ---"):
            is_free = "no result" in line or "none of these changes results" in line
        if key := re.match(r"(\w+):", line):
            found[key[1]] = is_free
    return found


def test_the_keys_that_may_differ_are_those_of_the_configs():
    free = set()
    for name in ("lmim", "linear_probe", "finetune"):
        path, keys = CONFIG_DIR / f"{name}.yaml", {}
        for group in choices_in(read_yaml(path)).keys() & {"log", "backbone"}:
            for file in (CONFIG_DIR / group).glob("*.yaml"):
                keys |= keys_that_change_no_result(file)
        keys |= keys_that_change_no_result(path)
        free |= {key for key, is_free in keys.items() if is_free}
    paths = {"pretrained", "pretrained_weights", "dataset.options.index_folder"}
    assert free - {"defaults"} == CHANGE_NO_RESULT - paths


def test_what_changes_no_result_may_differ(tmp_path):
    free = "data_path=/x output_dir=/y print_freq=7 max_steps=25 recompute=True num_workers=3 "
    free += "env.ngpu=4 overwrite=True job_name=moved save_minutes=1 eval_at_start=False"
    cfg = configured(*free.split(), "accum_iter=4")
    assert accept(tmp_path, made("accum_iter=2", "env.ngpu=8"), cfg, FACTS) == []


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=1", "seed 0 -> 1"),
        ("loss=norm_l2", "loss.name infonce_patches -> norm_l2"),
        ("encoder.depth=2", "encoder.depth 4 -> 2"),
        ("dataset.mean=[0,0,0]", "dataset.mean [0.306, 0.306, 0.306] -> [0, 0, 0]"),
        ("epochs=2", "epochs 3 -> 2"),
        ("clip_grad=1", "clip_grad None -> 1"),
    ],
)
def test_any_other_setting_may_not(tmp_path, override, change):
    assert refusal(tmp_path, made(), override) == change
    changed = configured(override, "resume=changed")
    assert accept(tmp_path, made(), changed, FACTS) == [f"resume=changed: {change}"]


def test_all_differences_are_one_message(tmp_path):
    facts = {"images": 1401, "image_list": "b", "images_per_step": 64, "steps_per_epoch": 21}
    found = refusal(tmp_path, made(), "seed=1", "batch_size=64", "tau=0.5", **facts)
    assert set(found.split(", ")) == {
        *("seed 0 -> 1", "tau 0.2 -> 0.5", "images 1400 -> 1401", "image_list a -> b"),
        *("images_per_step 128 -> 64", "steps_per_epoch 10 -> 21"),
    }


def test_what_may_differ_and_is_said(tmp_path):
    half = {"made_from": FACTS | {"batch_size": 64}}
    (said,) = accept(tmp_path, made("batch_size=64", **half), configured(), FACTS)
    assert said.startswith("batch_size 64 -> 128: what is per micro-batch gives other numbers")
    (said,) = accept(tmp_path, made(), configured("epochs=5"), FACTS)
    assert said == "epochs 3 -> 5: the schedules are stretched"


def test_what_shrink_batch_has_made_is_compared(tmp_path):
    """An earlier version wrote the smaller batch_size into the config."""
    shrunken = FACTS | {"images": 45, "images_per_step": 40, "batch_size": 40}
    now = configured("batch_size=128")
    before = made("batch_size=40")
    before["made_from"] = {key: shrunken[key] for key in shrunken if key != "batch_size"}
    assert accept(tmp_path, before, now, shrunken) == []
    assert accept(tmp_path, made("batch_size=128", made_from=shrunken), now, shrunken) == []


@pytest.mark.slow
def test_what_fails_in_an_evaluation_that_trains_is_made_as_well(tmp_path, monkeypatch):
    """Its accuracy at step 10, between two log lines."""
    checkpoint = digits_checkpoint(tmp_path)
    settings = ["epochs=2", "warmup_epochs=0", "batch_size=128", "eval_freq=1", "print_freq=5"]
    settings.append("resume=True")
    jobs = (tmp_path / "failed", tmp_path / "whole")
    failed, whole = (config("linear_probe", checkpoint, job, *settings) for job in jobs)
    assert call(eval.linear_probe.main, whole) == 0

    def measure(task):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "measure", measure)
        assert call(eval.linear_probe.main, failed) == 3
    assert call(eval.linear_probe.main, failed) == 0
    job, expected = (job / "linear_probe" for job in jobs)
    assert [line["step"] for line in log_without_times(expected)] == [5, 10, 10, 15, 20, 20]
    assert log_without_times(job) == log_without_times(expected)
    assert_same_state(final_state(job), final_state(expected))


@pytest.mark.parametrize("begun, exit_code", [(False, 2), (True, 1)])
def test_data_that_is_gone_after_some_steps_may_come_back(tmp_path, monkeypatch, begun, exit_code):
    """As a file server: Slurm takes 2 for final."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(24):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(photos / f"{number}.png")
    cfg = configured_here(tmp_path, "dataset=folder", f"data_path={photos}", "epochs=1")
    train_step = main_lmim.train_step

    def last_step(*args):
        train_step(*args)
        shutil.rmtree(photos)

    if begun:
        monkeypatch.setattr(main_lmim, "train_step", last_step)
    else:
        prepare = main_lmim.Pretraining.prepare

        def prepare_without_photos(task):
            prepare(task)
            shutil.rmtree(photos)

        monkeypatch.setattr(main_lmim.Pretraining, "prepare", prepare_without_photos)
    assert call(main_lmim.main, cfg) == exit_code
    saved = list_checkpoints(tmp_path / "demo" / "checkpoints")
    assert [path.name for path in saved] == (["step-00000001.pth"] if begun else [])


@pytest.mark.parametrize("folder, exit_code", [("checkpoints", 3), ("results", 1)])
def test_a_folder_of_the_job_that_is_gone(tmp_path, monkeypatch, folder, exit_code):
    """In the last step: a training without its last checkpoint cannot go on as it is."""
    train_step = main_lmim.train_step

    def last_step(*args):
        train_step(*args)
        shutil.rmtree(tmp_path / "demo" / folder)

    monkeypatch.setattr(main_lmim, "train_step", last_step)
    assert call(main_lmim.main, configured_here(tmp_path, "max_steps=1")) == exit_code


def test_checkpoints_of_earlier_versions(tmp_path):
    """No description of the images, fewer keys; the old momentum, the first format."""
    before = made()
    for key in ("made_from", "format"):
        del before[key]
    for key in ("recompute", "compile", "max_steps", "data_timeout"):
        del before["config"][key]
    before["windows_per_epoch"] = before.pop("steps_per_epoch")
    (said,) = accept(tmp_path, before, configured(), FACTS)
    assert said.startswith("the checkpoint is of an earlier version")
    assert refusal(tmp_path, before, "compile=True") == "compile False -> True"
    assert refusal(tmp_path, before, steps_per_epoch=11) == "steps_per_epoch 10 -> 11"
    before["config"]["target_mom"] = 0.996
    assert refusal(tmp_path, before) == "target_mom 0.996 -> 0.99"
    assert len(accept(tmp_path, before, configured("target_mom=0.996"), FACTS)) == 1
    assert len(accept(tmp_path, before, configured("resume=changed"), FACTS)) == 2


def test_fewer_epochs_than_are_trained(tmp_path):
    for mode in ("True", "changed"):
        message = refusal(tmp_path, made(), "epochs=1", f"resume={mode}", error=ConfigError)
        assert message == "epochs=1: expected at least 2, which are trained"


# ---- The images. ---------------------------------------------------------------------------------


def described(dataset: str, root=None) -> dict:
    images = build_dataset(dataset, "train", root, {})
    return describe(images, batch_size=1, images_per_step=6)


def test_the_description_of_images(tmp_path):
    folder = tmp_path / "photos"
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png", "b/4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    first = described("folder", folder)
    assert (first["images"], first["images_per_step"], first["steps_per_epoch"]) == (6, 6, 1)
    shutil.move(folder, tmp_path / "moved")
    assert described("folder", tmp_path / "moved") == first
    (tmp_path / "moved/a/2.png").rename(tmp_path / "moved/a/3.png")
    renamed = described("folder", tmp_path / "moved")
    assert renamed["images"] == 6 and renamed["image_list"] != first["image_list"]
    Image.new("RGB", (8, 8)).save(tmp_path / "moved/b/5.png")
    assert described("folder", tmp_path / "moved")["images"] == 7
    assert described("digits") == described("digits")


def test_changed_labels_are_other_images():
    digits = build_dataset("digits", "train", None, {})
    before = describe(digits, batch_size=1, images_per_step=6)
    digits.labels = digits.labels.copy()
    digits.labels[7] += 1
    assert describe(digits, batch_size=1, images_per_step=6)["image_list"] != before["image_list"]


# ---- Whole runs. ---------------------------------------------------------------------------------


def test_pre_training_compares_and_keeps_the_configs(tmp_path, capfd):
    photos, job = tmp_path / "photos", tmp_path / "demo"
    photos.mkdir()
    for number in range(30):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(photos / f"{number}.png")
    settings = ["dataset=folder", f"data_path={photos}", "batch_size=10", "warmup_epochs=0"]
    assert train_here(tmp_path, *settings, "epochs=1") == 0
    first = (job / "config.yaml").read_text()
    (photos / "7.png").rename(photos / "new.png")
    capfd.readouterr()
    assert train_here(tmp_path, *settings, "epochs=1", "seed=3") == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "differences: seed 0 -> 3, image_list " in said
    assert (job / "config.yaml").read_text() == first, "refused, and written down all the same"
    assert train_here(tmp_path, *settings, "epochs=2", "resume=changed", "seed=3") == 0
    said = "".join(capfd.readouterr())
    assert "resume=changed: seed 0 -> 3, image_list " in said and "epochs 1 -> 2" in said
    assert "6 steps, from step 3\n" in said
    assert (job / "logs" / "config-1.yaml").read_text() == first
    assert "seed: 3" in (job / "config.yaml").read_text()


@pytest.mark.slow
def test_evaluations_that_train_compare_as_well(tmp_path, capfd):
    checkpoint = digits_checkpoint(tmp_path)
    settings = ["epochs=1", "warmup_epochs=0", "batch_size=700", "resume=True"]
    assert call(eval.finetune.main, config("finetune", checkpoint, tmp_path, *settings)) == 0
    settings += ["weight_decay=0.3", "min_crop=0.5"]
    assert call(eval.finetune.main, config("finetune", checkpoint, tmp_path, *settings)) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert re.search("weight_decay [0-9.]+ -> 0.3", said) and "min_crop 0.08 -> 0.5" in said


@pytest.mark.parametrize("before", [False, True, "changed"])
def test_a_restart_resumes(monkeypatch, before):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    cfg = OmegaConf.create({"resume": before})
    assert call(lambda cfg: None, cfg) == 0
    assert cfg.resume == (before or True)


def test_weights_that_do_not_fit_the_optimiser(tmp_path, capfd):
    """As many of them are trained as the config says, and the state of the others is missing."""
    settings = ["warmup_epochs=0", "max_steps=1"]
    assert train_here(tmp_path, *settings) == 0
    capfd.readouterr()
    assert train_here(tmp_path, *settings, "freeze_pe=False", "resume=changed") == 2
    said = capfd.readouterr().err
    assert "resume=changed: freeze_pe True -> False\nerror: resume: expected" in said
    (path,) = list_checkpoints(tmp_path / "demo" / "checkpoints")
    contents = torch.load(path)
    torch.save({key: contents[key] for key in ("state_dict", "step", "config")}, path)
    assert train_here(tmp_path, *settings) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: resume: expected") and said.count("\n") == 1
