"""One writer per job folder, whatever started it: here, torchrun, or one or more Slurm jobs.

A process that is about to write leaves a file that says who it is, and then looks for other such
files: of two that start together, at least one sees the other. The file outlives a process that was
killed, so its reader finds out whether the owner is alive: on this machine by its number and start,
elsewhere by what Slurm says of its job. Where neither tells, the owner is taken to live. (Locks of
the kernel would free themselves, but not all network file systems have them, and of those that do
some have them on each machine by itself.)
"""

import json
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.config import UserError
from launch.queue import OVER, job_state
from util.files import write_json

ATTEMPTS = 5
HELD: dict[Path, Path] = {}  # job -> the file of this process


class JobBusy(UserError):
    """Another process is writing there: the same command may succeed later."""

    exit_code = 4


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int
    started: str  # tells a process from a later one with the same number
    slurm_job: str | None
    restarts: int  # how often Slurm has started that job again
    namespace: str = ""  # in which it has this number: that of a container is of its own

    def __str__(self) -> str:
        job = f" of Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process() -> Owner:
    pid, slurm_job = os.getpid(), os.environ.get("SLURM_JOB_ID")
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    namespace = os.readlink("/proc/self/ns/pid")
    return Owner(socket.gethostname(), pid, start_of(pid), slurm_job, restarts, namespace)


def start_of(pid: int) -> str:
    """When a process of this machine was started; empty if there is none of this number."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{fields[18]} ticks after boot {boot}"


def lives(owner: Owner, me: Owner) -> bool:
    if owner.host == me.host and owner.namespace in ("", me.namespace):  # "": an earlier version
        return start_of(owner.pid) == owner.started
    if owner.slurm_job is None:
        return True  # as far as can be told from here
    if owner.slurm_job == me.slurm_job:
        return owner.restarts >= me.restarts
    return job_state(owner.slurm_job)["JobState"] not in OVER  # unknown: Slurm cannot be asked


def lock(job: Path) -> None:
    """Raises JobBusy if another process has it. Held until unlock, or the end of the process."""
    unlock(job)
    me = this_process()
    number = "".join(filter(str.isdecimal, me.namespace))
    file = job / "logs" / f"running-{me.host}-{me.pid}-{number}.json"
    for _ in range(ATTEMPTS):
        reason = why_busy(job, me)
        if reason is None:
            write_json(file, asdict(me))
            reason = why_busy(job, me)
            if reason is None:
                HELD[job] = file
                return
            file.unlink()  # another started at the same moment: give way and try again
        time.sleep(random.uniform(0, 0.3))
    raise JobBusy(f"job_name={job.name}: {reason}")


def unlock(job: Path) -> None:
    """For a process that goes on with something else."""
    if job in HELD:
        # On a disk that is gone. A file that is left names a process that does not live.
        with suppress(OSError):
            HELD.pop(job).unlink(missing_ok=True)


def why_busy(job: Path, me: Owner) -> str | None:
    """None if nobody else is writing; the files of dead processes are then removed."""
    others = {path: owner for path, owner in owners_in(job / "logs") if owner != me}
    for path, owner in others.items():
        if lives(owner, me):
            return f"{owner} is running in {job}; if it no longer exists, remove {path}"
    for path in others:
        path.unlink(missing_ok=True)
    return None


def owners_in(folder: Path) -> Iterator[tuple[Path, Owner]]:
    for path in folder.glob("running-*.json"):
        try:
            owner = Owner(**json.loads(path.read_text()))
        except OSError:  # it has just ended
            continue
        except (ValueError, TypeError) as error:
            raise JobBusy(f"{path} does not say who is running: remove it if nobody is") from error
        yield path, owner
