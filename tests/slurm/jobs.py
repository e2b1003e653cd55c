"""Trainings as jobs on the test cluster: submit them, wait for them, compare what they end with."""

from pathlib import Path

from tests.runs import LAUNCHER, assert_same_state, final_state, records, succeed
from tests.slurm.cluster import job_info, wait_for
from util.checkpoint import list_checkpoints

# Long enough to be interrupted: 588 steps, 294 of two processes. Checkpoints every second.
LONG = ["epochs=14", "batch_size=32", "print_freq=5", "save_minutes=0.02", "save_freq=1000"]
ON_SLURM = ["env.slurm=True", "env.ngpu=0", "env.workers=1", "env.timeout=60"]
HELD = "+env.slurm_extra.hold=True"  # queued, and never started


def submit(*overrides: str) -> str:
    """-> job id"""
    (job_id,) = ids(succeed(LAUNCHER, *ON_SLURM, *overrides))
    return job_id


def ids(output: str) -> list[str]:
    """Of the jobs that the launcher says it has submitted."""
    return [line.split("job ")[1] for line in output.splitlines() if "submitted as job" in line]


def wait_for_end(job_id: str, timeout: float) -> str:
    """-> the state in which it ended"""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def state():
        found = job_info(job_id)["JobState"]
        return found if found in over else None

    try:
        return wait_for(state, timeout, f"job {job_id} to end")
    except AssertionError as error:  # is it slow, or does it hang?
        log = Path(job_info(job_id)["StdOut"])
        error.add_note(log.read_text()[-3000:] if log.exists() else "it has no log")
        raise


def wait_for_step(job: Path, step: int) -> None:
    """And for a checkpoint: a job that has none would rightly start over."""
    wait_for(lambda: any(r["step"] >= step for r in records(job)), 90, f"step {step}")
    wait_for(lambda: list_checkpoints(job / "checkpoints"), 60, "a checkpoint")


def last_step(job: Path) -> int:
    return max(record["step"] for record in records(job))


def log_text(job: Path, job_id: str) -> str:
    """What its first process printed, in all its starts."""
    return (job / "logs" / f"{job_id}_0_log.out").read_text()


def error_text(job: Path) -> str:
    """All logs of a job, for a failing assertion."""
    logs = sorted((job / "logs").glob("*.out"))
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs)


def assert_undisturbed(job: Path, job_id: str, expected: dict) -> None:
    assert wait_for_end(job_id, 180) == "COMPLETED", error_text(job)
    assert "from step" in log_text(job, job_id)
    assert_same_state(final_state(job), expected)
    steps = [record["step"] for record in records(job)]
    assert steps == sorted(set(steps)), "the log has doubled a step"
    assert set(range(5, last_step(job), 5)) <= set(steps), "the log has lost a step"
