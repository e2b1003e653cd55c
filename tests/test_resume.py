"""A run that was killed at any moment and started again ends with the weights of a run that
was never disturbed."""

import json
import os
import re
import signal
import socket

import pytest

from tests.kills import kill_and_compare
from tests.runs import (
    LAUNCHER,
    TINY,
    assert_same_state,
    final_state,
    kill,
    records,
    run,
    shared,
    start_together,
    succeed_together,
    undisturbed,
    wait_until,
)
from util.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow


def test_killed_and_resumed_equals_undisturbed(tmp_path):
    """Two processes, in the first epoch and in the second. Each start has another number of loader
    processes: that changes nothing either."""
    job = tmp_path / "demo"
    # A checkpoint about every second step: kills fall inside an epoch and between two checkpoints.
    settings = [*shared(2), f"output_dir={tmp_path}", "save_minutes=0.0005"]
    for workers, step in ((2, 8), (0, 24)):
        first, second = start_together(2, *TINY, *settings, f"num_workers={workers}")
        wait_until(lambda step=step: any(r["step"] >= step for r in records(job)), first)
        # Left alone it would save the step in which it loses the other, whose log is cut off.
        os.kill(second.pid, signal.SIGSTOP)
        kill(first)
        kill(second)
    newest, before = list_checkpoints(job / "checkpoints")[:2]
    newest.write_bytes(newest.read_bytes()[:5000])  # as a full disk or a lost node leaves it
    output = succeed_together(2, *settings, "num_workers=1")
    assert f"{newest} cannot be read" in output
    assert f"from step {int(before.stem.rpartition('-')[2])}\n" in output
    assert_same_state(final_state(job), undisturbed(2))
    steps = [record["step"] for record in records(job)]
    assert steps == list(range(1, 43)), "the log has lost or doubled a step"


def test_a_trial_ends_like_a_run_and_can_be_continued(tmp_path):
    """Inside an epoch, on two processes."""
    arguments = (*shared(2), f"output_dir={tmp_path}", "eval_freq=2")
    output = succeed_together(2, *arguments, "max_steps=14")
    job = tmp_path / "demo"
    (name,) = [path.name for path in list_checkpoints(job / "checkpoints")]
    assert name == "step-00000014.pth" and final_state(job)["step"] == 14
    evaluated = [r for r in records(job) if "nn_accuracy" in r]
    assert [(r["step"], r["epoch"]) for r in evaluated] == [(14, 14 / 21)]
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
    assert "42 steps, from step 14\n" in output
    assert "step 20/42  (mean of 6 steps)  " in output and "step 42/42  (mean of 2" in output
    assert output.count("mean of") == 2
    assert_same_state(final_state(job), undisturbed(2))
    assert [r["step"] for r in records(job) if "loss" in r] == [*range(1, 15), 20, 30, 40, 42]


def test_kills_while_checkpoints_are_written(tmp_path):
    kill_and_compare(tmp_path, kills=5)
