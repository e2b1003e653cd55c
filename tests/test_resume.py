"""A run that was killed at any moment and started again ends with the weights of a run that
was never disturbed."""

import json
import random
import re
import socket

import pytest

from tests.kills import KILLS, kill_and_compare
from tests.runs import (
    LAUNCHER,
    assert_same_state,
    final_state,
    kill_at_step,
    records,
    run,
    start,
    succeed,
    succeed_together,
    torchrun,
    undisturbed_runs,
)
from util.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

# A checkpoint about every second step: kills fall inside an epoch and between two checkpoints.
OFTEN = "save_minutes=0.0005"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return undisturbed_runs(tmp_path_factory.mktemp, lambda n: [*share(n), "num_workers=0"])


def command(processes: int) -> list[str]:
    return LAUNCHER if processes == 1 else torchrun(processes)


def share(processes: int) -> list[str]:
    """Ten steps per epoch whatever the number of processes."""
    return [f"batch_size={128 // processes}"]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed, processes):
    """Each start with another number of loader processes: that changes nothing either."""
    arguments = (*share(processes), f"output_dir={tmp_path}", OFTEN)
    job = tmp_path / "demo"
    chance = random.Random(processes)
    for workers, lowest in ((2, 3), (0, 14)):  # in the first epoch, then in the second
        process = start(command(processes), *arguments, f"num_workers={workers}")
        kill_at_step(process, job, lowest + chance.randrange(5))
    newest, before = list_checkpoints(job / "checkpoints")[:2]
    newest.write_bytes(newest.read_bytes()[:5000])  # as a full disk or a lost node leaves it
    output = succeed_together(processes, *arguments, "num_workers=2")
    assert f"{newest} cannot be read" in output
    assert f"from step {int(before.stem.rpartition('-')[2])}\n" in output
    assert_same_state(final_state(job), undisturbed(processes))
    steps = [record["step"] for record in records(job)]
    assert steps == list(range(1, 31)), "the log has lost or doubled a step"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    arguments = ("epochs=1", "warmup_epochs=0", f"output_dir={tmp_path}")
    succeed(LAUNCHER, *arguments)
    before = final_state(tmp_path / "demo")
    succeed(LAUNCHER, *arguments)
    assert_same_state(final_state(tmp_path / "demo"), before)


def test_a_trial_ends_like_a_run_and_can_be_continued(tmp_path, undisturbed):
    """Inside an epoch, on two processes."""
    arguments = (*share(2), f"output_dir={tmp_path}", "eval_freq=2")
    output = succeed_together(2, *arguments, "max_steps=14")
    job = tmp_path / "demo"
    (name,) = [path.name for path in list_checkpoints(job / "checkpoints")]
    assert name == "step-00000014.pth" and final_state(job)["step"] == 14
    evaluated = [r for r in records(job) if "nn_accuracy" in r]
    assert [(r["step"], r["epoch"]) for r in evaluated] == [(14, 1.4)]
    assert json.loads((job / "results" / "demo.json").read_text())["steps"] == 14
    last = [r for r in records(job) if "loss" in r][-1]
    size = (job / "checkpoints" / name).stat().st_size / 1e9
    nodes = re.escape(f"{socket.gethostname()}: 2 x cpu; ")
    speed = f"{last['images_per_second']:.0f} images/s, waiting for data {last['data_wait']:.0%}"
    assert re.search(f"nodes +{nodes}[0-9.]+ GB at most per process\n", output)
    assert re.search(f"speed +{speed}, at the end\n", output)
    assert re.search(rf"checkpoint .*{name} \({size:.3g} GB; [0-9.e+]+ GB are free\)\n", output)
    code, refused = run(LAUNCHER, f"output_dir={tmp_path}", "resume=False")
    assert code == 2 and f"already holds {name}" in refused
    output = succeed_together(2, *arguments, "print_freq=10")
    assert "30 steps, from step 14\n" in output
    assert "step 20/30  (mean of 6 steps)  " in output and output.count("mean of") == 1
    assert_same_state(final_state(job), undisturbed(2))
    assert [r["step"] for r in records(job) if "loss" in r] == [*range(1, 15), 20, 30]


def test_kills_while_checkpoints_are_written(tmp_path):
    assert KILLS >= 12
    kill_and_compare(tmp_path)
