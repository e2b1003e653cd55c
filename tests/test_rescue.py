"""What ends a run from inside or by surprise: the last whole step is saved, and the same command
goes on from there as if nothing had happened."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
from PIL import Image

from tests.kills import log_without_times
from tests.runs import (
    LAUNCHER,
    ROOT,
    TINY,
    assert_same_state,
    descendants,
    environment,
    final_state,
    finish,
    records,
    start,
    start_together,
    succeed,
    succeed_together,
    undisturbed_runs,
    wait_until,
)
from util.checkpoint import list_checkpoints, load_file

pytestmark = pytest.mark.slow

SETTINGS = ["accum_iter=2", "batch_size=32", "epochs=6", "save_minutes=60", "print_freq=1"]


# What follows the steps falls on others than the log lines.
LOOKS = ["print_freq=4", "epochs=4", "eval_freq=2", "eval_at_start=True", "watch_images=40"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return undisturbed_runs(tmp_path_factory.mktemp, settings_of)


def settings_of(processes: int) -> list[str]:
    return [*SETTINGS, f"batch_size={32 // processes}"]


def assert_continues(job, processes: int, saved: int, expected: dict) -> None:
    assert final_state(job)["step"] == saved
    output = succeed_together(processes, *settings_of(processes), f"output_dir={job.parent}")
    assert f"from step {saved}\n" in output
    assert_same_state(final_state(job), expected)


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 0), (2, 1)])
def test_a_failed_step_loses_no_other(tmp_path, monkeypatch, undisturbed, processes, rank):
    monkeypatch.setenv("FAIL", f"{rank} 13 bug")
    settings = [*settings_of(processes), f"output_dir={tmp_path}", "worker=tests.failing"]
    ended = [finish(p) for p in start_together(processes, *TINY, *settings)]
    assert [code for code, _ in ended] == [1] * processes
    assert "RuntimeError: a bug" in ended[rank][1]
    assert re.search("step 14 has failed; the newest .*/step-00000013.pth\n", ended[rank][1])
    assert_continues(tmp_path / "demo", processes, 13, undisturbed(processes))


def test_out_of_memory_names_the_ways_out(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setenv("FAIL", "0 9 memory")
    settings = [*SETTINGS, f"output_dir={tmp_path}", "worker=tests.failing"]
    code, output = finish(start(LAUNCHER, *settings))
    assert code == 3 and "Traceback" not in output
    error = output.splitlines()[-1]
    assert error.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)")
    assert "batch_size below 32" in error and "recompute=True" in error and "vit_nano" in error
    assert_continues(tmp_path / "demo", 1, 9, undisturbed(1))


def test_a_step_that_fails_inside_the_optimiser_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "0 13 inside")
    settings = [*SETTINGS, f"output_dir={tmp_path}", "worker=tests.failing"]
    code, output = finish(start(LAUNCHER, *settings))
    assert code == 1 and "ZeroDivisionError" in output and "newest" not in output
    assert not list_checkpoints(tmp_path / "demo" / "checkpoints")


@pytest.fixture(scope="module")
def undisturbed_log(tmp_path_factory):
    """By number of processes: the log of a run that looks at itself now and then."""

    @cache
    def log(processes: int) -> list[dict]:
        folder = tmp_path_factory.mktemp("undisturbed")
        succeed_together(processes, *settings_of(processes), *LOOKS, f"output_dir={folder}")
        return log_without_times(folder / "demo")

    return log


@pytest.mark.parametrize(
    "processes, rank, step, kind",
    [
        (1, 0, 0, "evaluate"),
        (1, 0, 30, "watch"),
        (1, 0, 42, "evaluate"),
        (1, 0, 42, "picture"),
        (1, 0, 44, "log_line"),
        (1, 0, 84, "evaluate"),
        (2, 1, 42, "evaluate"),
        (2, 1, 44, "log_line"),
        (2, 0, 84, "evaluate"),
    ],
)
def test_what_fails_between_two_steps_is_done_again(
    tmp_path, monkeypatch, undisturbed_log, processes, rank, step, kind
):
    """Also by a run that fails there itself, and saves again what the next one needs."""
    monkeypatch.setenv("FAIL", f"{rank} {step} {kind}")
    job = tmp_path / "demo"
    settings = [*settings_of(processes), *LOOKS, f"output_dir={tmp_path}"]
    for _ in range(2 if kind == "log_line" else 1):
        failing = start_together(processes, *TINY, *settings, "worker=tests.failing")
        code, output = [finish(process) for process in failing][rank]
        assert code == 3 and "error: out of memory (planted): expected batch_size below" in output
        saved = list_checkpoints(job / "checkpoints")
        assert bool(saved) == (step > 0) and (not saved or load_file(saved[0])["step"] == step)
    assert not list((job / "checkpoints").glob("epoch-0004-*"))
    output = succeed_together(processes, *settings)
    assert (f"from step {step}\n" if step else "from the beginning\n") in output
    assert log_without_times(job) == undisturbed_log(processes)
    assert list((job / "checkpoints").glob("epoch-0004-step-00000084.pth"))
    result = json.loads((job / "results" / "demo.json").read_text())
    assert result["after"] == undisturbed_log(processes)[-2]["nn_accuracy"]


def test_the_check_images_are_gone(tmp_path, monkeypatch):
    """For a while, as on a file server: the same command may succeed later."""
    photos, val = tmp_path / "photos", tmp_path / "photos" / "val"
    for number in range(60):
        path = photos / ("val" if number >= 40 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (4 * number, 9, 9)).save(path)
    shutil.copytree(val, tmp_path / "val")
    settings = ["dataset=imagefolder", f"data_path={photos}", "batch_size=8", "num_workers=0"]
    settings += ["eval_freq=1", "epochs=2", "print_freq=2"]
    monkeypatch.setenv("FAIL", "0 3 gone")
    monkeypatch.setenv("VAL", str(val))
    failing = ["worker=tests.failing", f"output_dir={tmp_path}"]
    code, output = finish(start(LAUNCHER, *settings, *failing))
    assert code == 1 and "Traceback" not in output
    assert "what follows step 5 has failed; the newest checkpoint is" in output
    shutil.copytree(tmp_path / "val", val)
    assert "from step 5\n" in succeed(LAUNCHER, *settings, f"output_dir={tmp_path}")
    succeed(LAUNCHER, *settings, f"output_dir={tmp_path / 'undisturbed'}")
    assert log_without_times(tmp_path / "demo") == log_without_times(tmp_path / "undisturbed/demo")


def test_a_loader_worker_that_is_killed(tmp_path, undisturbed):
    settings = [*SETTINGS, f"output_dir={tmp_path}", "num_workers=1"]
    job = tmp_path / "demo"
    process = start(LAUNCHER, *settings)
    wait_until(lambda: any(r["step"] >= 5 for r in records(job)), process)
    (worker,) = descendants(process.pid)
    os.kill(worker, signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output  # with the error that torch meets first
    saved = records(job)[-1]["step"]
    assert 5 <= saved < 126 and f"step-{saved:08d}.pth\n" in output
    assert_continues(job, 1, saved, undisturbed(1))


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
    return [f"data_path={photos}", "dataset=folder", "batch_size=8", f"output_dir={tmp_path}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_does_not_come_is_named(tmp_path, stalled, workers):
    """Well before data_timeout's default, which is longer than the test waits."""
    settings = [*stalled, f"num_workers={workers}", "data_timeout=3"]
    code, output = finish(start(LAUNCHER, *settings))
    assert code == 1
    assert f"error: waited in vain for {tmp_path}/photos/17.jpg (data_timeout)\n" in output
    assert "Traceback" not in output


def test_a_stop_is_answered_while_a_file_is_waited_for(tmp_path, stalled):
    process = start(LAUNCHER, *stalled, "num_workers=2", "data_timeout=0")
    job = tmp_path / "demo"
    wait_until(lambda: (job / "log.txt").exists(), process)
    time.sleep(3)
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    steps = [record["step"] for record in records(job)]
    assert [p.name for p in list_checkpoints(job / "checkpoints")] == [
        f"step-{step:08d}.pth" for step in steps[-1:]
    ]


# ---- The terminal. -------------------------------------------------------------------------------


def in_terminal(command: list[str]) -> tuple[subprocess.Popen, int]:
    """-> the process, and the other side of its terminal"""
    here, there = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=ROOT,
        env=environment(),
        stdin=there,
        stdout=there,
        stderr=there,
    )
    os.close(there)
    return process, here


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed(tmp_path, undisturbed, nohup):
    job = tmp_path / "demo"
    command = [sys.executable, "launcher.py", *TINY, *SETTINGS, f"output_dir={tmp_path}"]
    as_nohup = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    process, terminal = in_terminal([*(as_nohup if nohup else []), *command])
    deadline = time.monotonic() + 60
    while not any(record["step"] >= 5 for record in records(job)):
        os.read(terminal, 1 << 16)
        assert time.monotonic() < deadline
    os.close(terminal)
    code = process.wait(timeout=60)
    if nohup:
        assert code == 0
        assert_same_state(final_state(job), undisturbed(1))
    else:
        assert code == 128 + signal.SIGHUP
        assert_continues(job, 1, records(job)[-1]["step"], undisturbed(1))
