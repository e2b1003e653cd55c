"""A disk that fills up: training goes on, says so at each save, and nothing that was there is lost.
On a real file system of 4 MB, made for the test (which needs root)."""

import fcntl
import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import main_lmim
from launch.command import call
from launch.job import step_of
from launch.lock import lock, unlock
from tests.failing import train_here
from tests.runs import assert_same_state, configured_here, fill, final_state, read_board, records
from util.checkpoint import list_checkpoints
from util.record import JsonLines, TensorBoardFile

# <linux/ext4.h>
EXT4_IOC_SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2
SETTINGS = ["epochs=2", "batch_size=128", "save_minutes=1e-9"]  # a checkpoint after each step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train_here(folder, *SETTINGS) == 0
    return final_state(folder / "demo")


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


def full(disk: Path, first: int, last: int) -> dict[int, Callable[[], object]]:
    """Also where a checkpoint that is removed leaves room."""
    return dict.fromkeys(range(first, last), partial(fill, disk))


@contextmanager
def during(steps: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Inside, these are called before the steps of these numbers (from 0)."""
    train_step = main_lmim.train_step

    def step_and_call(training, batches, draw_views, step, epoch):
        steps.get(step, lambda: None)()
        train_step(training, batches, draw_views, step, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_lmim, "train_step", step_and_call)
        yield


def test_training_goes_on_and_all_is_there_when_there_is_room_again(small_disk, capfd, undisturbed):
    with during(full(small_disk, 4, 10) | {10: (small_disk / "filler").unlink}):
        assert train_here(small_disk, *SETTINGS) == 0
    job, said = small_disk / "demo", capfd.readouterr().out
    assert said.count("could not be written (No space left on device); training goes on") >= 3
    assert_same_state(final_state(job), undisturbed)
    assert [record["step"] for record in records(job)] == list(range(1, 21))
    assert [step for step, _ in scalars(job / "tensorboard")] == list(range(1, 21))
    console = (job / "logs" / "console.txt").read_text()
    assert all(f"step {step}/20 " in console for step in range(1, 21))


def test_a_stop_on_a_full_disk_says_what_is_lost(small_disk, capfd, undisturbed):
    """What was saved before is still there, and the run goes on from it."""
    with during(full(small_disk, 4, 9) | {9: lambda: os.kill(os.getpid(), signal.SIGTERM)}):
        assert train_here(small_disk, *SETTINGS) == 128 + signal.SIGTERM
    newest = list_checkpoints(small_disk / "demo" / "checkpoints")[0]
    said = capfd.readouterr().err
    lost = re.search(rf"SIGTERM: (\d+) steps are lost: the newest checkpoint is {newest}\n", said)
    assert lost and 10 - step_of(newest) == int(lost[1]) >= 3 and "everything is saved" not in said
    (small_disk / "filler").unlink()
    with during(full(small_disk, 15, 20)):
        assert train_here(small_disk, *SETTINGS) == 3, "without its last checkpoint"
    said = capfd.readouterr()
    assert f"from step {step_of(newest)}\n" in said.out
    assert "error: training has ended, but its last checkpoint" in said.err
    (small_disk / "filler").unlink()
    assert train_here(small_disk, *SETTINGS) == 0
    assert_same_state(final_state(small_disk / "demo"), undisturbed)
    assert [record["step"] for record in records(small_disk / "demo")] == list(range(1, 21))


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
