"""What ends a run from inside or by surprise: the last whole step is saved, and the same command
goes on from there as if nothing had happened."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

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
    succeed_together,
    undisturbed_runs,
    wait_until,
)
from util.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

SETTINGS = ["accum_iter=2", "batch_size=32", "epochs=6", "save_minutes=60", "print_freq=1"]


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


def test_a_loader_worker_that_is_killed(tmp_path, undisturbed):
    settings = [*SETTINGS, f"output_dir={tmp_path}", "num_workers=1"]
    job = tmp_path / "demo"
    process = start(LAUNCHER, *settings)
    wait_until(lambda: any(r["step"] >= 5 for r in records(job)), process)
    (worker,) = descendants(process.pid)
    os.kill(worker, signal.SIGKILL)
    code, output = finish(process, timeout=30)
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
    settings = [*stalled, f"num_workers={workers}", "data_timeout=3"]
    began = time.monotonic()
    code, output = finish(start(LAUNCHER, *settings))
    assert code == 1 and time.monotonic() - began < 40
    assert f"error: waited in vain for {tmp_path}/photos/17.jpg (data_timeout)\n" in output
    assert "Traceback" not in output


def test_a_stop_is_answered_while_a_file_is_waited_for(tmp_path, stalled):
    process = start(LAUNCHER, *stalled, "num_workers=2", "data_timeout=0")
    job = tmp_path / "demo"
    wait_until(lambda: (job / "log.txt").exists(), process)
    time.sleep(3)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process, timeout=30)
    assert code == 128 + signal.SIGTERM, output
    assert time.monotonic() - began < 20 and "Traceback" not in output
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
