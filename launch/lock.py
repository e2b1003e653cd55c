"""One writer per job folder, whatever started it: here, torchrun, or one or more Slurm jobs.

A process that is about to write leaves a file that says who it is, and then looks for other such
files: of two that start together, at least one sees the other. The file outlives a process that was
killed, so its reader checks whether the owner is alive. In addition there is the kernel's lock
(flock), for processes of one machine that cannot see each other (containers); not all network file
systems have it.
"""

import fcntl
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
from launch.queue import has_ended
from util.files import write_json

ATTEMPTS = 5
HELD: dict[Path, tuple[Path, "KernelLock"]] = {}  # job -> the file of this process


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

    def __str__(self) -> str:
        job = f" of Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process() -> Owner:
    pid, slurm_job = os.getpid(), os.environ.get("SLURM_JOB_ID")
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return Owner(socket.gethostname(), pid, start_of(pid), slurm_job, restarts)


def start_of(pid: int) -> str:
    """When a process of this machine was started; empty if there is none of this number."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{fields[18]} ticks after boot {boot}"


def lives(owner: Owner, me: Owner) -> bool:
    if owner.host == me.host:
        return start_of(owner.pid) == owner.started
    if owner.slurm_job is None:
        return True  # as far as can be told from here
    if owner.slurm_job == me.slurm_job:
        return owner.restarts >= me.restarts
    return not has_ended(owner.slurm_job)


def lock(job: Path) -> None:
    """Raises JobBusy if another process has it. Held until unlock, or the end of the process."""
    unlock(job)
    me, folder = this_process(), job / "logs"
    file = folder / f"running-{me.host}-{me.pid}.json"
    kernel_lock = KernelLock(folder / "lock")
    for _ in range(ATTEMPTS):
        kernel_lock.take()
        reason = why_busy(folder, me, kernel_lock)
        if reason is None:
            write_json(file, asdict(me))
            reason = why_busy(folder, me, kernel_lock)
            if reason is None:
                HELD[job] = file, kernel_lock
                return
            file.unlink()  # another started at the same moment: give way and try again
        time.sleep(random.uniform(0, 0.3))
    kernel_lock.close()
    raise JobBusy(f"job_name={job.name}: {reason}")


def unlock(job: Path) -> None:
    """For a process that goes on with something else."""
    if job in HELD:
        file, kernel_lock = HELD.pop(job)
        # On a disk that is gone. A file that is left names a process that does not live.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            kernel_lock.close()


def leave_it_to_the_parent() -> None:
    """In a forked child: loader workers outlive a killed parent by some seconds, and would keep the
    kernel's lock."""
    for _, kernel_lock in HELD.values():
        kernel_lock.close()
    HELD.clear()


os.register_at_fork(after_in_child=leave_it_to_the_parent)


def why_busy(folder: Path, me: Owner, kernel_lock: "KernelLock") -> str | None:
    """None if nobody is writing; the files of dead processes are then removed."""
    others = {path: owner for path, owner in owners_in(folder) if owner != me}
    for path, owner in others.items():
        if lives(owner, me):
            return f"{owner} is running in {folder.parent}; if it no longer exists, remove {path}"
    # A network file system may still hold the lock of a machine that was lost.
    is_elsewhere = any(owner.host != me.host for owner in others.values())
    if kernel_lock.is_taken and not is_elsewhere:
        return f"another process of {me.host} is running in {folder.parent} ({kernel_lock.path})"
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


class KernelLock:
    """Given back by the kernel when this process ends, however it ends."""

    def __init__(self, path: Path):
        self.path, self.is_taken = path, False
        self.file = open(path, "w")  # noqa: SIM115 (held until the process ends)

    def take(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_taken = False
        except BlockingIOError:
            self.is_taken = True
        except OSError:
            pass  # this file system has no such locks

    def close(self) -> None:
        self.file.close()
