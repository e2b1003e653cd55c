"""What Slurm says about jobs. Never through a shell: job names are free text."""

import subprocess
from pathlib import Path

from util.files import read_json

OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED"}
OVER |= {"BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY", "forgotten"}
# Reasons for which a job waits without anybody having to do something.
USUAL = {"None", "Priority", "Resources", "Dependency", "BeginTime", "JobHeldUser"}
USUAL |= {"JobArrayTaskLimit", "Licenses", "Reservation", "Cleaning", "Prolog"}


def job_state(job_id: str) -> dict[str, str]:
    """Slurm's record of a job: forgotten some minutes after its end; unknown if nobody answers."""
    question = ["scontrol", "show", "job", job_id]
    try:
        ran = subprocess.run(question, capture_output=True, text=True, check=True, timeout=60)
    except subprocess.CalledProcessError as error:
        return {"JobState": "forgotten" if "Invalid job id" in error.stderr else "unknown"}
    except (OSError, subprocess.TimeoutExpired):
        return {"JobState": "unknown"}
    # One element of an array has the array's own number, which stands for all of them here.
    records = ran.stdout.strip().split("\n\n")
    text = next((own for own in records if own.startswith(f"JobId={job_id} ")), records[-1])
    # A job's name, which may look like anything, comes first: of two values the last one counts.
    record = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return {"JobState": "unknown"} | record


def why_waiting(record: dict[str, str]) -> str | None:
    """Slurm's reason, if the job may wait for ever unless somebody does something."""
    reason = record.get("Reason", "None")
    return None if record["JobState"] != "PENDING" or reason in USUAL else reason


def noted_job(job: Path) -> str:
    """The id of the last job that was submitted for this folder; empty if none can be read."""
    return str(read_json(job / "logs" / "slurm.json").get("job_id", ""))
