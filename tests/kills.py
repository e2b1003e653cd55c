"""kill -9 while checkpoints are being written, many times in one run:

python -m tests.kills FOLDER
"""

import random
import sys
import time
from pathlib import Path

from tests.forked import Forked
from tests.runs import LAUNCHER, assert_same_state, final_state, kill, records, start, succeed
from util.checkpoint import list_checkpoints, load_file
from util.job import checkpoint_name

KILLS = 20
# A checkpoint after each step, large enough that writing it takes a while.
SETTINGS = ["epochs=6", "proj.mlp_dim=512", "save_minutes=1e-6"]


def kill_while_writing(folder: Path) -> None:
    """One run that is killed again and again, and then left to its end."""
    checkpoints = folder / "demo" / "checkpoints"
    chance = random.Random(0)
    last_step = half_written = 0
    for _ in range(KILLS):
        process = start(LAUNCHER, *SETTINGS, f"output_dir={folder}")
        for _ in range(1 + chance.randrange(2)):
            wait_for_write(checkpoints, process)
        time.sleep(chance.uniform(0, 0.003))
        kill(process)
        half_written += any(checkpoints.glob("*.writing"))
        last_step = check_newest(checkpoints, last_step)
    succeed(LAUNCHER, *SETTINGS, f"output_dir={folder}")
    assert half_written >= KILLS / 4, f"only {half_written} kills fell into a write"


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


def kill_and_compare(folder: Path) -> None:
    kill_while_writing(folder / "killed")
    succeed(LAUNCHER, *SETTINGS, f"output_dir={folder / 'whole'}")
    assert_same_state(final_state(folder / "killed/demo"), final_state(folder / "whole/demo"))
    assert [r["step"] for r in records(folder / "killed/demo")] == list(range(1, 61))


if __name__ == "__main__":
    kill_and_compare(Path(sys.argv[1]))
    print(f"{KILLS} kills")
