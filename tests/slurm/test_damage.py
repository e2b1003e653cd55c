"""On a real Slurm: what happens to the files of a job, and what the next start makes of them."""

import re

import pytest

from tests.runs import LAUNCHER, assert_same_state, final_state, records, succeed
from tests.slurm.cluster import cancel, wait_for
from tests.slurm.jobs import (
    LONG,
    assert_undisturbed,
    error_text,
    log_text,
    submit,
    wait_for_end,
    wait_for_step,
)
from tests.test_full_disk import fill
from util.job import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]


def wait_for_two_checkpoints(job) -> None:
    wait_for(lambda: len(list_checkpoints(job / "checkpoints")) == 2, 60, "two checkpoints")


def wait_for_attempt(checkpoints) -> None:
    """Until one more file has been begun, or removed, there."""
    before = checkpoints.stat().st_mtime_ns
    wait_for(lambda: checkpoints.stat().st_mtime_ns != before, 60, "a checkpoint to be tried")


def test_a_truncated_newest_checkpoint(tmp_path, undisturbed_pair):
    settings = [*LONG, "env.tasks_per_node=2", f"output_dir={tmp_path}"]
    job_id = submit(*settings)
    job = tmp_path / "demo"
    wait_for_two_checkpoints(job)
    cancel(job_id)
    newest, before = list_checkpoints(job / "checkpoints")[:2]
    newest.write_bytes(newest.read_bytes()[:5000])
    job_id = submit(*settings)
    assert_undisturbed(job, job_id, undisturbed_pair)
    assert f"{newest} cannot be read" in log_text(job, job_id)
    resumed_step = int(before.stem.rpartition("-")[2])
    assert f"from step {resumed_step}\n" in log_text(job, job_id)


def test_a_full_disk(tmp_path, small_disk):
    """Logs, code and checkpoints of the job are all on it."""
    settings = [*LONG, "epochs=10", "save_minutes=0.01"]
    succeed(LAUNCHER, *settings, f"output_dir={tmp_path}")
    job_id = submit(*settings, f"output_dir={small_disk}")
    job = small_disk / "demo"
    wait_for_step(job, 20)
    wait_for_two_checkpoints(job)
    filler = fill(small_disk)
    wait_for_attempt(job / "checkpoints")  # it may have been under way, and be whole
    wait_for_attempt(job / "checkpoints")
    there = list_checkpoints(job / "checkpoints")
    wait_for_attempt(job / "checkpoints")
    wait_for_attempt(job / "checkpoints")
    assert list_checkpoints(job / "checkpoints") == there
    filler.unlink()
    assert wait_for_end(job_id, 120) == "COMPLETED", error_text(job)
    # What was said while the disk was full went to a log on that disk: Slurm drops it.
    assert re.search(r"is written; \d+ before it could not be", log_text(job, job_id))
    assert_same_state(final_state(job), final_state(tmp_path / "demo"))
    steps = [record["step"] for record in records(job)]
    assert steps == [record["step"] for record in records(tmp_path / "demo")]
