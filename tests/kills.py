"""kill -9 while checkpoints are being written, many times in one run:

python -m tests.kills FOLDER
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from tests.runs import TINY, assert_same_state, final_state, records
from util.checkpoint import list_checkpoints, load_file
from util.command import run_configured_worker
from util.config import compose_config
from util.job import checkpoint_name

KILLS = 20
# A checkpoint after each step, large enough that writing it takes a while.
SETTINGS = ["epochs=6", "proj.mlp_dim=512", "save_minutes=1e-6"]


def train(folder: Path) -> None:
    overrides = [*TINY[1:], *SETTINGS, f"output_dir={folder}"]
    cfg = compose_config("demo", overrides)
    sys.exit(run_configured_worker(OmegaConf.to_container(cfg)))


def kill_while_writing(folder: Path) -> None:
    """One run that is killed again and again, and then left to its end."""
    # Processes that have imported everything already: a start takes a moment and not seconds.
    starter = multiprocessing.get_context("forkserver")
    starter.set_forkserver_preload(["main_lmim"])
    checkpoints = folder / "demo" / "checkpoints"
    chance = random.Random(0)
    last_step = half_written = 0
    for _ in range(KILLS):
        process = starter.Process(target=train, args=[folder])
        process.start()
        for _ in range(1 + chance.randrange(2)):
            wait_for_write(checkpoints, process)
        time.sleep(chance.uniform(0, 0.003))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        half_written += any(checkpoints.glob("*.writing"))
        last_step = check_newest(checkpoints, last_step)
    process = starter.Process(target=train, args=[folder])
    process.start()
    process.join()
    assert process.exitcode == 0
    assert half_written >= KILLS / 4, f"only {half_written} kills fell into a write"
    print(f"{KILLS} kills, {half_written} of them left a half-written file")


def wait_for_write(checkpoints: Path, process: multiprocessing.Process) -> None:
    """Until a file is being written that was not there before."""
    before = {path.name for path in checkpoints.glob("*.writing")}
    deadline = time.monotonic() + 60
    while not {path.name for path in checkpoints.glob("*.writing")} - before:
        assert process.is_alive(), f"ended with exit code {process.exitcode}"
        assert time.monotonic() < deadline, "no checkpoint is written"


def check_newest(checkpoints: Path, at_least: int) -> int:
    """It is whole, and no step is lost that was saved before. -> its step"""
    newest = list_checkpoints(checkpoints)[0]
    step = load_file(newest)["step"]
    assert newest.name == checkpoint_name(step) or newest.name.startswith("epoch-")
    assert step >= at_least
    return step


def run_and_check(folder: Path) -> None:
    kill_while_writing(folder / "killed")
    train_process = multiprocessing.get_context("forkserver").Process(
        target=train, args=[folder / "whole"]
    )
    train_process.start()
    train_process.join()
    assert_same_state(final_state(folder / "killed/demo"), final_state(folder / "whole/demo"))
    assert [r["step"] for r in records(folder / "killed/demo")] == list(range(1, 61))


if __name__ == "__main__":
    run_and_check(Path(sys.argv[1]))
