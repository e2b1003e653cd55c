"""What ends a run from inside or by surprise: the last whole step is saved, and the same command
goes on from there as if nothing had happened."""

import json
import os
import pty
import shutil
import signal
import sys
import threading
import time

import pytest
from PIL import Image

import util.signals
from launch.job import list_checkpoints
from tests.failing import train_here
from tests.kills import log_without_times
from tests.runs import (
    TINY,
    assert_same_state,
    final_state,
    finish,
    records,
    shared,
    start_in_terminal,
    start_together,
    succeed_together,
    undisturbed,
)
from util.checkpoint import load_file


def newest_step(job) -> int:
    return load_file(list_checkpoints(job / "checkpoints")[0])["step"]


def assert_continues(job, processes: int, saved: int) -> None:
    assert newest_step(job) == saved
    output = succeed_together(processes, *shared(processes), f"output_dir={job.parent}")
    assert f"from step {saved}\n" in output
    assert_same_state(final_state(job), undisturbed(processes))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_step_loses_no_other(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("FAIL", f"{rank} 13 bug")
    settings = [*TINY, *shared(2), f"output_dir={tmp_path}", "worker=tests.failing"]
    failing = start_together(2, *settings)
    ended = [finish(process) for process in failing]
    assert [code for code, _ in ended] == [1, 1]
    assert "RuntimeError: a bug" in ended[rank][1]
    job = tmp_path / "demo"
    assert f"step 14 has failed; step 13 is saved in {job}/checkpoints\n" in ended[rank][1]
    assert_continues(job, 2, 13)


@pytest.mark.slow
def test_out_of_memory_names_the_ways_out(tmp_path, capfd):
    assert train_here(tmp_path, *shared(1), fail="0 9 memory") == 3
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)")
    assert "batch_size below 32, with accum_iter above 2" in error
    assert "recompute=True" in error and "vit_nano" in error
    assert_continues(tmp_path / "demo", 1, 9)


def test_a_step_that_fails_inside_the_optimiser_is_not_saved(tmp_path, capfd):
    assert train_here(tmp_path, fail="0 2 inside") == 1
    said = capfd.readouterr().err
    assert "step 3 has failed; 2 steps are lost: there is no checkpoint" in said
    assert "ZeroDivisionError" in said
    assert not list_checkpoints(tmp_path / "demo" / "checkpoints")


# What follows the steps falls on others than the log lines, and on the same.
LOOKS = ["batch_size=64", "epochs=2", "print_freq=4", "eval_freq=1", "eval_at_start=True"]
LOOKS += ["watch_images=20"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that looks at itself now and then."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_here(folder, *LOOKS) == 0
    return folder / "demo"


@pytest.mark.parametrize(
    "step, kind",
    [
        *((0, "evaluate"), (6, "watch"), (21, "evaluate"), (21, "picture"), (24, "log_line")),
        *((42, "log_line"), (42, "evaluate"), (42, "watch")),
    ],
)
def test_what_fails_between_two_steps_is_done_again(tmp_path, whole, step, kind):
    """Also by a run that fails there itself, and saves again what the next one needs. A log line is
    of the steps since the last start, as after each stop; one that fails is left out."""
    job = tmp_path / "demo"
    for _ in range(2 if kind == "watch" else 1):
        assert train_here(tmp_path, *LOOKS, fail=f"0 {step} {kind}") == 3
        saved = list_checkpoints(job / "checkpoints")
        assert bool(saved) == (step > 0) and (not saved or newest_step(job) == step)
    assert not list((job / "checkpoints").glob("epoch-0002-*"))
    assert train_here(tmp_path, *LOOKS) == 0
    begun = {(step + 4) // 4 * 4} if step % 4 else set()
    failed = {step} if kind == "log_line" else set()
    log, wanted = log_without_times(job), log_without_times(whole)
    assert {line["step"] for line in wanted if "loss" in line} == {*range(4, 44, 4), 42}
    assert without_losses(log, begun) == without_losses(wanted, begun | failed)
    assert_same_state(final_state(job), final_state(whole))
    names = [[path.name for path in list_checkpoints(j / "checkpoints")] for j in (job, whole)]
    assert names[0][0] == names[1][0] == "epoch-0002-step-00000042.pth"
    result, expected = (json.loads((j / "results/demo.json").read_text()) for j in (job, whole))
    assert result["after"] == expected["after"] and result["before"] == expected["before"]


def without_losses(log: list[dict], steps: set[int]) -> list[dict]:
    return [line for line in log if line["step"] not in steps or "loss" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank, step", [(1, 21), (0, 42)])
def test_what_fails_in_one_of_two_processes_is_done_again(tmp_path, monkeypatch, rank, step):
    monkeypatch.setenv("FAIL", f"{rank} {step} evaluate")
    settings = [*TINY, *shared(2), "eval_freq=1", f"output_dir={tmp_path}"]
    failing = start_together(2, *settings, "worker=tests.failing")
    code, output = [finish(process) for process in failing][rank]
    assert code == 3 and "error: out of memory (planted): expected batch_size below 16" in output
    assert newest_step(tmp_path / "demo") == step
    assert f"from step {step}\n" in succeed_together(2, *settings)
    assert_same_state(final_state(tmp_path / "demo"), undisturbed(2))
    log = records(tmp_path / "demo")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 43))
    assert [line["step"] for line in log if "nn_accuracy" in line] == [21, 42]


def test_the_check_images_are_gone(tmp_path, monkeypatch, capfd):
    """For a while, as on a file server: the same command may succeed later."""
    photos, val = tmp_path / "photos", tmp_path / "photos" / "val"
    for number in range(60):
        path = photos / ("val" if number >= 40 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (4 * number, 9, 9)).save(path)
    shutil.copytree(val, tmp_path / "val")
    settings = ["dataset=imagefolder", f"data_path={photos}", "eval_freq=1", "epochs=2"]
    settings.append("warmup_epochs=0")
    monkeypatch.setenv("VAL", str(val))
    assert train_here(tmp_path, *settings, fail="0 3 gone") == 1
    assert "what follows step 5 has failed; step 5 is saved in " in capfd.readouterr().err
    shutil.copytree(tmp_path / "val", val)
    assert train_here(tmp_path, *settings) == 0
    assert "from step 5\n" in capfd.readouterr().out
    assert train_here(tmp_path, *settings, "job_name=undisturbed") == 0
    assert log_without_times(tmp_path / "demo") == log_without_times(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_loader_worker_that_is_killed(tmp_path, capfd):
    assert train_here(tmp_path, *shared(1), "num_workers=1", fail="0 5 lost") == 1
    saved = records(tmp_path / "demo")[-1]["step"]
    assert f"; step {saved} is saved in " in capfd.readouterr().err
    assert 5 <= saved < 42
    assert_continues(tmp_path / "demo", 1, saved)


# ---- Files that do not come. ---------------------------------------------------------------------


@pytest.fixture
def stalled(tmp_path):
    """A file of which no byte comes, as from a file server that is gone."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(photos / f"{number}.jpg")
    (photos / "17.jpg").unlink()
    os.mkfifo(photos / "17.jpg")
    return [f"data_path={photos}", "dataset=folder", "batch_size=8"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_does_not_come_is_named(tmp_path, stalled, capfd, workers):
    """Well before data_timeout's default, which is longer than the test waits."""
    settings = [*stalled, f"num_workers={workers}", "data_timeout=2"]
    assert train_here(tmp_path, *settings) == 1
    expected = f"error: waited in vain for {tmp_path}/photos/17.jpg (data_timeout)\n"
    assert expected in capfd.readouterr().err


@pytest.mark.slow
def test_a_stop_is_answered_while_a_file_is_waited_for(tmp_path, stalled, monkeypatch):
    monkeypatch.setattr(util.signals, "WAIT_SECONDS", 1.0)
    told = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
    told.start()
    start = time.monotonic()
    code = train_here(tmp_path, *stalled, "num_workers=2", "data_timeout=0")
    told.cancel()
    assert code == 128 + signal.SIGTERM and 3 < time.monotonic() - start < 60
    job = tmp_path / "demo"
    steps = [record["step"] for record in records(job)]
    assert [p.name for p in list_checkpoints(job / "checkpoints")] == [
        f"step-{step:08d}.pth" for step in steps[-1:]
    ]


# ---- The terminal. -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_that_is_closed(tmp_path):
    job = tmp_path / "demo"
    here, there = pty.openpty()
    command = [sys.executable, "launcher.py", *TINY, *shared(1), f"output_dir={tmp_path}"]
    process = start_in_terminal(command, there)
    deadline = time.monotonic() + 60
    while not any(record["step"] >= 5 for record in records(job)):
        os.read(here, 1 << 16)
        assert time.monotonic() < deadline
    os.close(here)
    assert process.wait() == 128 + signal.SIGHUP
    assert_continues(job, 1, records(job)[-1]["step"])
