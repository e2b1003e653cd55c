"""What Slurm says about jobs. Never through a shell: job names are free text."""

import re
import subprocess
from pathlib import Path

from launch.config import ConfigError
from util.files import read_json

OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED"}
OVER |= {"BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY"}
# Reasons for which a job waits without anybody having to do something.
USUAL = {"None", "Priority", "Resources", "Dependency", "BeginTime", "JobHeldUser"}
USUAL |= {"JobArrayTaskLimit", "Licenses", "Reservation", "Cleaning", "Prolog"}


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
    """Slurm's record of a job: forgotten some minutes after its end; unknown if nobody answers."""
    try:
        text = slurm_command("scontrol", "show", "job", job_id)
    except subprocess.CalledProcessError as error:
        return {"JobState": "forgotten" if "Invalid job id" in error.stderr else "unknown"}
    except (OSError, subprocess.TimeoutExpired):
        return {"JobState": "unknown"}
    # One element of an array has the array's own number, which stands for all of them here.
    records = text.strip().split("\n\n")
    text = next((own for own in records if own.startswith(f"JobId={job_id} ")), records[-1])
    # A job's name, which may look like anything, comes first: of two values the last one counts.
    record = {"JobState": "unknown"}
    record |= dict(word.split("=", 1) for word in text.split() if "=" in word)
    return record | dict(re.findall(r"^ *(StdOut)=(.*)$", text, re.MULTILINE))


def why_waiting(record: dict[str, str]) -> str | None:
    """Slurm's reason, if the job may wait for ever unless somebody does something."""
    reason = record.get("Reason", "None")
    return None if record["JobState"] != "PENDING" or reason in USUAL else reason


def read_note(job: Path) -> dict[str, str]:
    """What was noted at the last submission; nothing if that cannot be read."""
    note = read_json(job / "logs" / "slurm.json")
    return note if all(isinstance(note.get(key), str) for key in ("job_id", "log")) else {}


def has_ended(job_id: str) -> bool:
    """False too where Slurm cannot be asked."""
    return job_state(job_id)["JobState"] in {*OVER, "forgotten"}
