"""One writer per job folder: real processes that hold it, die, fork, and come together."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.lock import JobBusy, Owner, lock, this_process, unlock
from tests.runs import ROOT, environment

HOLDER = """
import errno, fcntl, os, sys, time
from pathlib import Path
from launch.lock import JobBusy, lock

def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

job, has_flock = Path(sys.argv[1]), sys.argv[2] == "flock"
if not has_flock:
    fcntl.flock = no_locks
print("ready", flush=True)
sys.stdin.readline()
try:
    lock(job)
except JobBusy as error:
    sys.exit(str(error))
if "fork" in sys.argv and os.fork() == 0:
    os.close(1)
    os.close(2)
    os.read(0, 1)  # until the test lets go of it
    os._exit(0)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def job(tmp_path) -> Iterator[Path]:
    (tmp_path / "job" / "logs").mkdir(parents=True)
    yield tmp_path / "job"
    unlock(tmp_path / "job")


def start_holder(job: Path, *options: str) -> subprocess.Popen:
    """It takes the folder when it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(job), *options],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def tell(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


@contextmanager
def held(job: Path, *options: str) -> Iterator[subprocess.Popen]:
    process = start_holder(job, *options)
    tell(process)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_the_end(process: subprocess.Popen) -> None:
    """And leave it a zombie, which still has its number."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def without_flock(monkeypatch) -> None:
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)


@pytest.mark.parametrize("kind", ["flock", "no flock"])
def test_a_living_owner_is_named_and_a_dead_one_is_followed_at_once(job, monkeypatch, kind):
    if kind == "no flock":
        without_flock(monkeypatch)
    with held(job, kind) as owner:
        with pytest.raises(JobBusy) as caught:
            lock(job)
        sentence = str(caught.value)
        assert f"process {owner.pid} on {socket.gethostname()} is running in {job}" in sentence
        file = Path(sentence.rpartition("remove ")[2])
        assert json.loads(file.read_text())["pid"] == owner.pid
        owner.kill()
        wait_for_the_end(owner)
        monkeypatch.setattr("launch.lock.ATTEMPTS", 1)
        lock(job)
        assert not file.exists()


def test_the_kernel_knows_of_a_process_that_cannot_be_seen(job):
    """One in a container has another number there, and may leave no file that is found here."""
    with held(job, "flock"):
        for file in (job / "logs").glob("running-*"):
            file.unlink()
        with pytest.raises(JobBusy, match=f"another process of {socket.gethostname()} is running"):
            lock(job)


def test_a_forked_child_does_not_keep_it(job):
    """As loader workers do, which live on when their parent is killed."""
    with held(job, "flock", "fork") as owner:
        owner.kill()
        wait_for_the_end(owner)
        lock(job)


def test_it_is_given_back(job):
    lock(job)
    unlock(job)
    with held(job, "flock"):
        assert len(list((job / "logs").glob("running-*"))) == 1


def leave_file(job: Path, owner: Owner) -> Path:
    file = job / "logs" / f"running-{owner.host}-{owner.pid}.json"
    file.write_text(json.dumps(asdict(owner)))
    return file


def test_a_file_that_says_nothing_is_named(job):
    (job / "logs" / "running-elsewhere-1.json").write_text("{")
    with pytest.raises(JobBusy, match="running-elsewhere-1.json does not say who is running"):
        lock(job)


def test_a_later_process_of_the_same_number_is_not_the_owner(job):
    init = replace(this_process(), pid=1)
    file = leave_file(job, init)
    lock(job)
    assert not file.exists()


@pytest.mark.parametrize(
    ("slurm_job", "restarts", "is_refused"),
    [(None, 0, True), ("7", 0, False), ("7", 1, True), ("7", 2, True), ("8", 0, True)],
)
def test_an_owner_on_another_machine(job, monkeypatch, slurm_job, restarts, is_refused):
    """This process is the second start of job 7. Of job 8 Slurm does not say that it is over: that
    is tested on a real cluster."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("PATH", "")  # there is no scontrol
    owner = replace(this_process(), host="elsewhere", slurm_job=slurm_job, restarts=restarts)
    file = leave_file(job, owner)
    if is_refused:
        with pytest.raises(JobBusy, match="on elsewhere"):
            lock(job)
    else:
        lock(job)
    assert file.exists() == is_refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flock", "no flock"])
def test_of_many_that_come_together_one_goes_on(job, kind):
    """Over what a dead process has left."""
    leave_file(job, replace(this_process(), started="long ago", pid=12))
    processes = [start_holder(job, kind) for _ in range(6)]
    for process in processes:
        tell(process)
    deadline = time.monotonic() + 30
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (winner,) = [process for process in processes if process.poll() is None]
    assert winner.stdout.readline() == "held\n"
    with pytest.raises(JobBusy):
        lock(job)
    winner.send_signal(signal.SIGKILL)
    for process in processes:
        _, error = process.communicate()
        if process is not winner:
            assert process.returncode == 1 and "is running in" in error
