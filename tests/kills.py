"""Runs that are ended again and again, and started again: kill -9 while checkpoints are written (in
the suite, too), and, by hand, kill -9 at any moment, closed terminals, killed loader workers:

python -m tests.kills FOLDER     # about ten minutes
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.job import checkpoint_name
from tests.forked import Forked
from tests.runs import (
    LAUNCHER,
    assert_same_state,
    descendants,
    final_state,
    finish,
    kill,
    records,
    start,
    succeed,
    wait_until,
)
from util.checkpoint import list_checkpoints, load_file

# A checkpoint after each step, large enough that writing it takes a while.
SETTINGS = ["epochs=3", "proj.mlp_dim=512", "save_minutes=1e-6", "watch_images=40", "eval_freq=1"]
TIMES = {"seconds", "images_per_second", "data_wait", "eta_seconds", "memory_gb"}


def kill_while_writing(folder: Path, kills: int) -> None:
    """One run that is killed again and again, and then left to its end."""
    checkpoints = folder / "demo" / "checkpoints"
    chance = random.Random(0)
    last_step = half_written = 0
    for _ in range(kills):
        process = start(LAUNCHER, *SETTINGS, f"output_dir={folder}")
        for _ in range(1 + chance.randrange(2)):
            wait_for_write(checkpoints, process)
        time.sleep(chance.uniform(0, 0.003))
        kill(process)
        half_written += any(checkpoints.glob("*.writing"))
        last_step = check_newest(checkpoints, last_step)
    succeed(LAUNCHER, *SETTINGS, f"output_dir={folder}")
    assert half_written >= kills / 4, f"only {half_written} kills fell into a write"


def wait_for_write(checkpoints: Path, process: Forked) -> None:
    """Until a file is being written that was not there before."""
    before = {path.name for path in checkpoints.glob("*.writing")}
    deadline = time.monotonic() + 60
    while not {path.name for path in checkpoints.glob("*.writing")} - before:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint is written"
        time.sleep(0.0002)


def check_newest(checkpoints: Path, at_least: int) -> int:
    """It is whole, and no step is lost that was saved before. -> its step"""
    newest = list_checkpoints(checkpoints)[0]
    step = load_file(newest)["step"]
    assert newest.name == checkpoint_name(step) or newest.name.startswith("epoch-")
    assert step >= at_least
    return step


def kill_and_compare(folder: Path, kills: int) -> None:
    kill_while_writing(folder / "killed", kills)
    succeed(LAUNCHER, *SETTINGS, f"output_dir={folder / 'whole'}")
    assert_same_state(final_state(folder / "killed/demo"), final_state(folder / "whole/demo"))
    logs = [log_without_times(folder / name / "demo") for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0] if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in logs[0] if "rankme" in line] == [0, 4, 8, 10, 20, 30]


def log_without_times(job: Path) -> list[dict]:
    return [{name: line[name] for name in line if name not in TIMES} for line in records(job)]


# ---- By hand: at any moment, with one process and with two. --------------------------------------


def end_again_and_again(folder: Path, processes: int, times: int, end: Callable) -> None:
    """Half of the ends come some steps after the start, the others at a random time, the first of
    them before there is a step. What is then left to its end equals a run that was never ended."""
    settings = [f"epochs={2 * times}", "num_workers=1", "save_minutes=1e-4"]
    settings += [f"batch_size={128 // processes}"]
    command = [*LAUNCHER, f"env.tasks_per_node={processes}"]
    job, chance = folder / "demo", random.Random(processes * times)
    without_any = 0
    for number in range(times):
        process = start(command, *settings, f"output_dir={folder}")
        if number % 2 or end is kill_worker:
            until = last_step(job) + chance.randrange(1, 5)
            wait_until(lambda until=until: last_step(job) >= until, process)
        else:
            time.sleep(chance.uniform(0, min(2.5, number / 10)))
        end(process, job)
        without_any += not list_checkpoints(job / "checkpoints")
    for place in (folder, folder / "whole"):
        last = start(command, *settings, "save_minutes=10", f"output_dir={place}")
        code, output = finish(last, timeout=1200)
        assert code == 0, output
    assert_same_state(final_state(job), final_state(folder / "whole" / "demo"))
    steps = [record["step"] for record in records(job)]
    assert steps == list(range(1, len(steps) + 1)), "the log has lost or doubled a step"
    what = f"{end.__name__}, {processes} processes: {times} times"
    print(f"{what}, {without_any} of them before the first checkpoint", flush=True)


def last_step(job: Path) -> int:
    return max((record["step"] for record in records(job)), default=0)


def kill_all(process: Forked, job: Path) -> None:
    kill(process)


def hang_up(process: Forked, job: Path) -> None:
    """As a terminal that is closed."""
    wait_until(lambda: os.getpgid(process.pid) == process.pid, process)
    os.killpg(process.pid, signal.SIGHUP)
    check_all_saved(process, job, {128 + signal.SIGHUP, -signal.SIGHUP})


def kill_worker(process: Forked, job: Path) -> None:
    workers = [pid for pid in descendants(process.pid) if is_loader_worker(pid)]
    os.kill(random.choice(workers), signal.SIGKILL)
    check_all_saved(process, job, {1})


def is_loader_worker(pid: int) -> bool:
    """A rank has descendants, and the tracker of multiprocessing another command line."""
    command = Path(f"/proc/{pid}/cmdline").read_text()
    return not descendants(pid) and "resource_tracker" not in command


def check_all_saved(process: Forked, job: Path, codes: set[int]) -> None:
    code, output = finish(process, timeout=90)
    assert code in codes, output
    if step := last_step(job):
        assert final_state(job)["step"] >= step, output


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kill_and_compare(folder / "writing", kills=12)
    for processes in (1, 2):
        end_again_and_again(folder / f"killed-{processes}", processes, 50, kill_all)
        end_again_and_again(folder / f"hung-up-{processes}", processes, 10, hang_up)
        end_again_and_again(folder / f"workers-{processes}", processes, 10, kill_worker)
