"""Whole runs of the worker: what they print, leave behind, and how they stop."""

import io
import json
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from eval import nn
from eval.features import Features
from launch.status import last_number
from tests.failing import train_here
from tests.runs import final_state, read_board, records, succeed_together
from util.checkpoint import list_checkpoints
from util.distributed import Ranks
from util.files import read_records
from util.metrics import readable_time
from util.record import RunLog, keep_until_step

SHORT = ("epochs=1", "warmup_epochs=0", "batch_size=128")


def test_a_run_leaves_what_the_readme_says(tmp_path, capfd):
    settings = [*SHORT, "eval_freq=1", "eval_at_start=True", "seed=4"]
    assert train_here(tmp_path, *settings) == 0
    output, job = capfd.readouterr().out, tmp_path / "demo"
    assert sorted(path.name for path in job.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "log.txt",
        "logs",
        "results",
        "tensorboard",
    ]
    result = json.loads((job / "results" / "demo.json").read_text())
    assert result["seed"] == 4
    assert f"{result['before']:.2f} % -> {result['after']:.2f} %" in output
    assert 0 < result["seconds"] == records(job)[-1]["seconds"] < 300
    versions = json.loads((job / "environment.json").read_text())["packages"]
    assert versions["torch"] == torch.__version__.split("+")[0]
    train = [record for record in records(job) if "loss" in record]
    assert [record["step"] for record in train] == list(range(1, 11))
    expected = {
        *("epoch step loss chance sim_pred sim_vis sim_trg sim_goal grad_norm lr momentum".split()),
        *("images_per_second data_wait eta_seconds memory_gb seconds".split()),
    }
    assert set(train[0]) == expected
    assert f"loss {train[-1]['loss']:.4f}" in output

    board = read_board(job / "tensorboard")
    losses = board.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 11))
    assert [event.value for event in losses] == pytest.approx([r["loss"] for r in train])
    assert [event.step for event in board.Scalars("eval/nn_accuracy")] == [0, 10]

    state = final_state(job)
    assert set(state) == {
        *("state_dict optimizer loss_scaler epoch step".split()),
        *("steps_per_epoch config format made_from".split()),
    }
    assert (state["epoch"], state["step"]) == (1, 10)
    assert not any(key.startswith("module.") for key in state["state_dict"])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_everything(tmp_path, capfd):
    """A learning rate beyond all measure, after a checkpoint has been written."""
    arguments = (*SHORT, "blr=1e30", "save_minutes=1e-9")
    assert train_here(tmp_path, *arguments, "print_freq=5") == 3
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: the loss or gradient is not finite at step 1 (epoch 0.10), lr 4.880e+29"
    )
    newest = list_checkpoints(tmp_path / "demo" / "checkpoints")[0]
    assert f"last good checkpoint: {newest}" in error
    weights = final_state(tmp_path / "demo")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    tolerant = ["resume=False", "overwrite=True", "max_bad_steps=9"]
    assert train_here(tmp_path, *arguments, *tolerant) == 0, "that many were tolerated"


@pytest.mark.slow
def test_evaluation_on_two_processes_gives_the_same_number(tmp_path):
    arguments = ["max_steps=1", "warmup_epochs=0", "eval_at_start=True"]
    assert train_here(tmp_path / "1", *arguments) == 0
    succeed_together(2, *arguments, f"output_dir={tmp_path / '2'}")
    before = [
        json.loads((tmp_path / name / "demo/results/demo.json").read_text())["before"]
        for name in ("1", "2")
    ]
    assert before[0] == before[1] > 10


def test_leave_one_out_equals_scikit_learn(monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(500, 8, generator=generator), dim=1)
    labels = torch.randint(4, (500,), generator=generator)
    neighbours = KNeighborsClassifier(n_neighbors=2, metric="cosine").fit(features, labels)
    nearest = neighbours.kneighbors(features, return_distance=False)[:, 1]  # [:, 0] is itself
    expected = int((labels[nearest] == labels).sum())
    images, cpu = Features(features, labels), torch.device("cpu")
    monkeypatch.setattr(nn, "QUERIES", 123)
    for processes in (1, 3):
        parts = [nn.leave_one_out(images, Ranks(r, processes, cpu)) for r in range(processes)]
        assert sum(parts) == pytest.approx(100 * expected / 500, abs=1e-12)


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "los')
    keep_until_step(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_until_step(path, 0)
    assert path.read_text() == ""


def test_damaged_lines_of_a_log_are_dropped(tmp_path):
    path = tmp_path / "log.txt"
    good = b'{"step": 1, "loss": 0.1}\n', b'{"step": 2, "loss": 1e-05}\n'
    bad = [b'\xff\xfe{"step": 1}\n', b"[1]\n", b"3\n", b'{"loss": 1}\n', b"\0\0\n"]
    bad += [b'{"step": %s, "loss": 1}\n' % step for step in (b'"1"', b"null", b"true", b"NaN")]
    path.write_bytes(good[0] + b"".join(bad) + good[1])
    assert last_number(read_records(path), "loss", "step", "d") == "2"
    keep_until_step(path, 2)
    assert path.read_bytes() == b"".join(good)


def test_a_terminal_shows_the_lines_and_a_bar_below(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = RunLog(tmp_path, is_main=True, total_steps=10)
    for step in range(1, 6):
        log.record({"loss": 1.0}, step, f"line {step}")
        log.progress(step, f"loss {step}  ")
        time.sleep(0.03)
    log.close()
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"line {step}" for step in range(1, 6)]
    assert "  0% |" in shown.err and "loss 4   40% |" in shown.err
    said = (tmp_path / "logs" / "console.txt").read_text().splitlines()
    assert [line[21:] for line in said] == [f"line {step}" for step in range(1, 6)]
    assert time.strptime(said[0][:19], "%Y-%m-%d %H:%M:%S")


def test_a_line_is_there_as_soon_as_it_is_said(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    log = RunLog(tmp_path, is_main=True, total_steps=10)
    log.say("here")
    assert written.getvalue() == b"here\n"
    log.close()


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\nepochs: 2\n")
    for resumed_step, loss in ((0, 1.0), (2, 2.0)):
        log = RunLog(tmp_path, is_main=True, total_steps=4, resumed_step=resumed_step)
        for step in range(resumed_step + 1, resumed_step + 4):
            log.record({"loss": loss}, step, "")
        log.close()
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [(line["step"], line["loss"]) for line in read_records(tmp_path / "log.txt")] == expected
    board = read_board(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == expected
    (config,) = board.Tensors("train/config")[0].tensor_proto.string_val
    assert config == b"    seed: 1\n    epochs: 2\n    ", "as code in Markdown"


def test_the_log_of_a_run_whose_checkpoints_are_gone_is_kept(tmp_path, capsys):
    """But not what a run has said that never made a step."""
    for loss, steps in ((1.0, range(3)), (2.0, range(2)), (3.0, [0]), (4.0, range(2))):
        log = RunLog(tmp_path, is_main=True, total_steps=4)
        for step in steps:
            log.record({"loss": loss}, step, "")
        log.close()
    kept = {
        ("logs/log-1.txt", "logs/tensorboard-1"): [1.0] * 3,
        ("logs/log-2.txt", "logs/tensorboard-2"): [2.0] * 2,
        ("log.txt", "tensorboard"): [4.0] * 2,
    }
    for (name, folder), losses in kept.items():
        assert [line["loss"] for line in read_records(tmp_path / name)] == losses
        board = read_board(tmp_path / folder)
        assert [event.value for event in board.Scalars("train/loss")] == losses
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    sentence = f"the log of an earlier run is kept: {tmp_path}/logs/log-%d.txt and tensorboard-%d"
    assert said == [sentence % (1, 1), sentence % (2, 2)]


def test_readable_time():
    assert readable_time(59) == "0:00:59"
    assert readable_time(2 * 86400 + 3661) == "2 days, 1:01:01"


def write_photos(folder, count: int, bad: int) -> None:
    """Class folders of JPEG files, the first `bad` of which are cut off in the middle."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, 40, 50, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for index in range(count):
            path = folder / split / f"class{index % 2}" / f"{index:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)
            if split == "train" and index < bad:
                path.write_bytes(path.read_bytes()[:200])


@pytest.mark.slow
def test_unreadable_images_are_replaced_until_there_are_too_many(tmp_path, capfd):
    write_photos(tmp_path / "photos", count=40, bad=3)
    data = [f"data_path={tmp_path / 'photos'}", "dataset=imagefolder", "batch_size=20"]
    assert train_here(tmp_path / "strict", *SHORT, *data) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "3 of 40 images could not be read, more than max_bad_images=0.001 allows" in error
    assert error.count(".jpg") == 3
    tolerant = [*SHORT, *data, f"output_dir={tmp_path / 'tolerant'}", "max_bad_images=0.1"]
    output = succeed_together(2, *tolerant, "batch_size=10")
    replaced = [line for line in output.splitlines() if line.startswith("unreadable image")]
    assert len(set(replaced)) == 3, "each is named (by two processes, if both met it)"
    assert len(records(tmp_path / "tolerant" / "demo")) == 2
