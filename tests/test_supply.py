"""What the first steps say about the images: how many they need, and whether loaders give them."""

import re
import time
from pathlib import Path

import pytest
import torch

import main_lmim
from data.loader import TrainLoader
from launch.command import call
from launch.job import list_checkpoints, step_of
from tests.runs import configured_here
from util.metrics import Speed, memory_in_use, warn_of_supply


class Clock:
    """In place of the real one: moved by what is said to take time."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def slowly(self, function, seconds: float):
        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow

    def slow_batches(self, seconds: float, first: float = 0.0):
        stream = TrainLoader.stream

        def slow(*args):
            self.now += first
            for batch in stream(*args):
                self.now += seconds
                yield batch

        return slow


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def console_of_a_run(folder, *changes: str) -> list[str]:
    assert call(main_lmim.main, configured_here(folder, "max_steps=12", *changes)) == 0
    lines = (folder / "demo" / "logs" / "console.txt").read_text().splitlines()
    return [line[21:] for line in lines]


def test_a_slow_data_set_is_a_warning_that_names_the_key(clock, monkeypatch, tmp_path):
    """8 images come in 160 ms, and a step takes 40."""
    monkeypatch.setattr(TrainLoader, "stream", clock.slow_batches(0.16))
    monkeypatch.setattr(main_lmim, "train_step", clock.slowly(main_lmim.train_step, 0.04))
    said = console_of_a_run(tmp_path, "num_workers=1", "print_freq=4")
    (place,) = (i for i, line in enumerate(said) if line.startswith("warning: "))
    assert "step 10/12" in said[place - 1], "after ten steps"
    assert said[place] == (
        "warning: 1 x 1 loader processes give 40.0 images/s where steps could take 200.0; "
        "more of them are num_workers, on Slurm env.workers (cores of a process)"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fast_data_set_is_none(workers, clock, monkeypatch, tmp_path):
    """Although its first batch is slow: a worker has to start."""
    monkeypatch.setattr(TrainLoader, "stream", clock.slow_batches(0.001, first=5))
    monkeypatch.setattr(main_lmim, "train_step", clock.slowly(main_lmim.train_step, 0.3))
    said = console_of_a_run(tmp_path, f"num_workers={workers}", "max_steps=11")
    assert any("step 11/11" in line for line in said)
    assert not any("warning" in line or "loader" in line for line in said)


def test_save_minutes_are_minutes(clock, monkeypatch, tmp_path):
    """Of steps that take 20 seconds each: one checkpoint more than a minute after the other."""
    monkeypatch.setattr(main_lmim, "train_step", clock.slowly(main_lmim.train_step, 20))
    console_of_a_run(tmp_path, "save_minutes=1")
    saved = {step_of(path) for path in list_checkpoints(tmp_path / "demo" / "checkpoints")}
    assert saved == {8, 12}


def test_what_steps_could_take_is_without_the_waiting():
    speed = {"images_per_second": 600.0, "data_wait": 0.25}
    text = warn_of_supply(speed, 8, 9)
    assert text.startswith("warning: 8 x 9 loader processes give 600.0 images/s where steps could ")
    assert "could take 800.0;" in text
    assert "give 1.2 images/s where steps could take 1.6" in warn_of_supply(
        speed | {"images_per_second": 1.2}, 1, 1
    )


def test_where_loaders_give_enough_there_is_nothing_to_say():
    speed = {"images_per_second": 600.0, "data_wait": 0.05}
    assert warn_of_supply(speed, 8, 9) is None
    assert warn_of_supply(speed | {"data_wait": 0.051}, 8, 9)


def test_speed_is_that_of_training_and_of_waiting_for_data(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def loader():
        nonlocal now
        for seconds in (1, 3):
            now += seconds
            yield

    speed = Speed()
    then = speed.clock()
    for _ in speed.timed(loader()):
        now += 2  # a step
    with speed.pause():
        now += 50
    expected = {"images_per_second": 2 * 64 / 8, "data_wait": 4 / 8, "eta_seconds": 10 * 8 / 2}
    assert speed.since(then, steps=2, images_per_step=64, left=10) == expected
    then = speed.clock()
    now += 4
    expected = {"images_per_second": 16, "data_wait": 0, "eta_seconds": 36}
    assert speed.since(then, steps=1, images_per_step=64, left=9) == expected


def test_memory_of_a_process_is_its_peak():
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    assert memory_in_use(torch.device("cpu")) == pytest.approx(kibibytes * 1024e-9, rel=0.02)
