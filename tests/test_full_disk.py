"""A disk that fills up: training goes on, says so at each save, and nothing that was there is lost.
On a real file system of 4 MB, made for the test (which needs root)."""

import fcntl
import os
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import main_lmim
from launch.command import call
from launch.job import step_of
from launch.lock import lock, unlock
from tests.runs import (
    LAUNCHER,
    assert_same_state,
    configured_here,
    final_state,
    finish,
    read_board,
    records,
    run,
    start,
    undisturbed_runs,
    wait_until,
)
from util.checkpoint import list_checkpoints, load_file
from util.record import JsonLines, TensorBoardFile

# <linux/ext4.h>
EXT4_IOC_SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2
SETTINGS = ["epochs=6", "save_minutes=0.0005"]  # a checkpoint about every second step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return undisturbed_runs(tmp_path_factory.mktemp, lambda processes: SETTINGS)


def fill(disk: Path) -> Path:
    """Take all the room that is left. -> the file that takes it"""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


def scalars(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows of the loss."""
    shown = read_board(folder)
    return [(event.step, event.value) for event in shown.Scalars("train/loss")]


def test_what_a_full_disk_refuses_is_written_later(small_disk):
    lines = JsonLines(small_disk / "log.txt")
    tensorboard = TensorBoardFile(small_disk / "tensorboard", 1)
    for file in (lines, tensorboard):
        file.add({"loss": 1.0}, 1)
    filler = fill(small_disk)
    refused = 0
    for step in range(2, 400):  # more than what is left of the last block
        for file in (lines, tensorboard):
            try:
                file.add({"loss": float(step)}, step)
            except OSError:
                refused += 1
    assert refused > 300
    filler.unlink()
    for file in (lines, tensorboard):
        file.add({"loss": 400.0}, 400)
        file.close()
    expected = [(step, float(step)) for step in range(1, 401)]
    assert [(r["step"], r["loss"]) for r in records(small_disk)] == expected
    assert scalars(small_disk / "tensorboard") == expected


@pytest.mark.slow
def test_training_goes_on_and_all_is_there_when_there_is_room_again(small_disk, undisturbed):
    process = start(LAUNCHER, *SETTINGS, f"output_dir={small_disk}")
    job = small_disk / "demo"
    wait_until(lambda: len(list_checkpoints(job / "checkpoints")) == 2, process)
    filler = fill(small_disk)
    said = ""
    while said.count("could not be written") < 3:
        line = process.stdout.readline()
        assert line, said
        said += line
    assert "No space left on device); training goes on" in said
    assert load_file(list_checkpoints(job / "checkpoints")[0])["step"] > 0
    filler.unlink()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_state(final_state(job), undisturbed(1))
    assert [record["step"] for record in records(job)] == list(range(1, 61))
    assert [step for step, _ in scalars(job / "tensorboard")] == list(range(1, 61))


@pytest.mark.slow
def test_a_stop_on_a_full_disk_says_what_is_lost(small_disk):
    process = start(LAUNCHER, *SETTINGS, f"output_dir={small_disk}")
    job = small_disk / "demo"
    wait_until(lambda: len(list_checkpoints(job / "checkpoints")) == 2, process)
    filler, said = fill(small_disk), ""
    while "could not be written" not in said:
        said += process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    newest = list_checkpoints(job / "checkpoints")[0]
    assert code == 128 + signal.SIGTERM and "everything is saved" not in output
    lost = re.search(rf"SIGTERM: (\d+) steps are lost: the newest checkpoint is {newest}\n", output)
    filler.unlink()
    code, output = run(LAUNCHER, *SETTINGS, f"output_dir={small_disk}")
    assert code == 0 and f"from step {step_of(newest)}\n" in output
    assert lost and 0 < int(lost[1]) < 60


@pytest.fixture
def breakable_disk(tmp_path) -> Iterator[Path]:
    """An ext4 of its own, in a file."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk, image = tmp_path / "disk", tmp_path / "image"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(40 << 20)
    mount = ["mount", "-o", "loop", image, disk]
    made = subprocess.run(["mkfs.ext4", "-q", image]), subprocess.run(mount)
    if any(command.returncode for command in made):
        pytest.skip("there are no loop devices")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def cut_power(disk: Path) -> None:
    """ext4's own way to test this: what is not written is lost, and all that follows is EIO."""
    folder = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
    os.close(folder)


def test_after_a_power_cut_the_log_reaches_as_far_as_the_checkpoint(breakable_disk, tmp_path):
    cfg = configured_here(breakable_disk, "max_steps=4", "save_minutes=1e-9")
    assert call(main_lmim.main, cfg) == 0
    job = breakable_disk / "demo"
    lock(job)
    cut_power(breakable_disk)
    with pytest.raises(OSError, match="Input/output error"):
        (job / "new").touch()
    unlock(job)  # and nothing hides the error that a run ends with
    subprocess.run(["umount", breakable_disk], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "image", breakable_disk], check=True)
    assert final_state(job)["step"] == 4
    assert [record["step"] for record in records(job)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_without_its_last_checkpoint_is_not_finished(small_disk, undisturbed):
    process = start(LAUNCHER, *SETTINGS, f"output_dir={small_disk}")
    job = small_disk / "demo"
    wait_until(lambda: len(list_checkpoints(job / "checkpoints")) == 2, process)
    filler = fill(small_disk)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 3, output
    assert "its last checkpoint" in output
    assert "Traceback" not in output
    filler.unlink()
    code, output = run(LAUNCHER, *SETTINGS, f"output_dir={small_disk}")
    assert code == 0, output
    assert "from step" in output
    assert_same_state(final_state(job), undisturbed(1))
    assert [record["step"] for record in records(job)] == list(range(1, 61))
