"""The Slurm cluster of the tests (cluster.sh): reach it, ask it, wait for it."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

SCRIPT = Path(__file__).with_name("cluster.sh")
CLIENT_TIMEOUT = 30  # seconds; a client whose slurmctld is gone tries for a minute
NO_ROOT = "no Slurm cluster is up, and starting one (tests/slurm/cluster.sh up) needs root"
NO_APT = "no Slurm cluster is up, Slurm is not installed, and there is no apt-get to install it"

T = TypeVar("T")


class ClusterError(Exception):
    """No cluster to test on; says why."""


class QueuedJob(NamedTuple):
    id: str  # of an array's element: 12_3
    state: str  # PENDING, RUNNING, COMPLETING, ...
    restarts: int
    name: str


def cluster_environment() -> dict[str, str] | None:
    """The variables that lead clients to the cluster; None if it is not up."""
    try:
        environment = _environment()
        ping = _run("scontrol", "ping", timeout=5)
    except (ClusterError, OSError, subprocess.SubprocessError):
        return None
    return environment if "is UP" in ping else None


def start_cluster() -> dict[str, str]:
    """cluster.sh up -> as cluster_environment()"""
    if os.geteuid() != 0:
        raise ClusterError(NO_ROOT)
    if not (shutil.which("slurmctld") or shutil.which("apt-get")):
        raise ClusterError(NO_APT)
    _script("up", timeout=600)  # it may have to install packages
    environment = cluster_environment()
    if environment is None:
        raise ClusterError(f"{SCRIPT} up has ended well, but the cluster does not answer")
    return environment


def stop_cluster() -> None:
    _script("down", timeout=120)


def send_user_signal_on_preemption(yes: bool) -> None:
    """A setting of the whole cluster; Slurm's default is no."""
    _script("preempt_send_user_signal", "on" if yes else "off", timeout=30)


def squeue(name: str | None = None) -> list[QueuedJob]:
    """My jobs that have not ended, or those of this name."""
    chosen = [] if name is None else ["--name", name]
    fields = "JobArrayID:64,State:32,RestartCnt:16,Name:256"
    table = _run("squeue", "--noheader", "--me", "--array", "--Format", fields, *chosen)
    rows = [line.split(maxsplit=3) for line in table.splitlines()]
    return [QueuedJob(row[0], row[1], int(row[2]), row[3].strip()) for row in rows]


def job_info(job: str | int) -> dict[str, str]:
    """What `scontrol show job` says (JobState, Restarts, ...), for an hour after its end too."""
    line = _run("scontrol", "--oneliner", "show", "job", str(job))
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Za-z:/]+=|\s*$)", line))


def wait_for(condition: Callable[[], T], timeout: float, what: str) -> T:
    """The first true value of the condition; fails with `what` and the queue if there is none."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}; in the queue: {squeue()}")
        time.sleep(0.2)
    return value


def cancel_all() -> None:
    """End all my jobs on the test cluster, those of another test session too."""
    cancel(*{job.id for job in squeue()})


def cancel(*jobs: str) -> None:
    """Returns when they have left the queue."""
    if jobs:
        _run("scancel", *jobs)
        wait_for(lambda: not {job.id for job in squeue()} & {*jobs}, 30, f"{jobs} are cancelled")


def _environment() -> dict[str, str]:
    folder = Path(os.environ.get("LMIM_SLURM_DIR", "/var/lib/lmim-slurm"))
    try:
        words = shlex.split((folder / "env.sh").read_text())
    except OSError as error:
        raise ClusterError(f"no Slurm cluster in {folder}: {error}") from error
    return dict(word.split("=", 1) for word in words if "=" in word)


def _run(*command: str, timeout: float = CLIENT_TIMEOUT) -> str:
    """A client's output. It asks the test cluster, whatever the caller's environment says."""
    result = subprocess.run(
        command,
        env=os.environ | _environment(),
        timeout=timeout,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return result.stdout


def _script(*action: str, timeout: float) -> None:
    command = ["bash", str(SCRIPT), *action]
    try:
        subprocess.run(command, timeout=timeout, check=True, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{shlex.join(command)} took more than {timeout} s") from error
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"{shlex.join(command)} failed:\n{error.stderr}") from error
