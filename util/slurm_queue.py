"""What Slurm says about jobs. Never through a shell: job names are free text."""

import subprocess

from util.config import ConfigError

OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED"),
    *("BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY"),
}


def slurm_command(*arguments: str) -> str:
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    return run.stdout


def read_queue() -> dict[str, str]:
    """My jobs that are queued or running: id -> name; array elements one by one."""
    try:
        lines = slurm_command("squeue", "--noheader", "--me", "--array", "--format=%i %j")
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"squeue failed: {' '.join(error.stderr.split())}") from error
    return dict(line.split(" ", 1) for line in lines.splitlines() if " " in line)


def job_state(job_id: str) -> dict[str, str]:
    """Slurm's record of a job; empty if it has forgotten it."""
    try:
        line = slurm_command("scontrol", "--oneliner", "show", "job", job_id)
    except subprocess.CalledProcessError:
        return {}
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def has_ended(job_id: str) -> bool:
    """False too where Slurm cannot be asked."""
    try:
        lines = slurm_command("scontrol", "--oneliner", "show", "job", job_id).splitlines()
    except subprocess.CalledProcessError as error:
        return "Invalid job id" in error.stderr  # it is forgotten some minutes after its end
    except (OSError, subprocess.TimeoutExpired):
        return False
    # One element of an array has the array's own number, which stands for all of them here.
    own = [line.split() for line in lines if line.startswith(f"JobId={job_id} ")]
    return any(f"JobState={state}" in words for words in own for state in OVER)
