"""One writer per job folder: real processes that hold it, die, fork, and come together."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.lock import JobBusy, Owner, lock, this_process, unlock


class Holder:
    """A process that takes the folder when it is told to, and says `held`, or why it is busy."""

    def __init__(self, job: Path, forks: bool = False):
        said, writer = os.pipe()
        reader, told = os.pipe()
        self.said, self.told = said, told
        self.pid = os.fork()
        if self.pid == 0:
            try:
                hold(job, reader, writer, forks)
            finally:
                os._exit(1)
        os.close(writer)
        os.close(reader)

    def answer(self) -> str:
        os.write(self.told, b".")
        return os.read(self.said, 1000).decode()

    def kill(self) -> None:
        """And leave it a zombie, which still has its number."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


def hold(job: Path, told: int, said: int, forks: bool) -> None:
    os.read(told, 1)
    try:
        lock(job)
        answer = "held"
    except JobBusy as error:
        answer = str(error)
    if forks and os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.write(said, answer.encode())
    time.sleep(60 if answer == "held" else 0)


@pytest.fixture
def job(tmp_path) -> Iterator[Path]:
    (tmp_path / "job" / "logs").mkdir(parents=True)
    yield tmp_path / "job"
    unlock(tmp_path / "job")


@contextmanager
def held(job: Path, forks: bool = False) -> Iterator[Holder]:
    holder = Holder(job, forks)
    try:
        assert holder.answer() == "held"
        yield holder
    finally:
        holder.kill()
        os.waitpid(holder.pid, 0)


def test_a_living_owner_is_named_and_a_dead_one_is_followed_at_once(job, monkeypatch):
    with held(job) as owner:
        with pytest.raises(JobBusy) as caught:
            lock(job)
        sentence = str(caught.value)
        assert f"process {owner.pid} on {socket.gethostname()} is running in {job}" in sentence
        file = Path(sentence.rpartition("remove ")[2])
        assert json.loads(file.read_text())["pid"] == owner.pid
        owner.kill()
        monkeypatch.setattr("launch.lock.ATTEMPTS", 1)
        lock(job)
        assert not file.exists()


def test_a_forked_child_does_not_keep_it(job):
    """As loader workers do, which live on when their parent is killed."""
    with held(job, forks=True) as owner:
        owner.kill()
        lock(job)


def test_it_is_given_back(job):
    lock(job)
    unlock(job)
    with held(job):
        assert len(list((job / "logs").glob("running-*"))) == 1


@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["of its first process", "of this process"])
def test_an_owner_in_a_container_cannot_be_seen_and_is_not_followed(job, monkeypatch, pid):
    """Its number may be that of another process here, or of this one."""
    monkeypatch.setattr("launch.lock.ATTEMPTS", 1)
    file = leave_file(job, replace(this_process(), pid=pid, started="a", namespace="pid:[7]"))
    with pytest.raises(JobBusy, match="is running in"):
        lock(job)
    assert file.exists()
    file.unlink()
    lock(job)


def leave_file(job: Path, owner: Owner) -> Path:
    file = job / "logs" / f"running-{owner.host}-{owner.pid}-x.json"
    file.write_text(json.dumps(asdict(owner)))
    return file


def test_a_file_that_says_nothing_is_named(job):
    (job / "logs" / "running-elsewhere-1.json").write_text("{")
    with pytest.raises(JobBusy, match="running-elsewhere-1.json does not say who is running"):
        lock(job)


def test_a_later_process_of_the_same_number_is_not_the_owner(job):
    init = replace(this_process(), pid=1)
    for namespace in (init.namespace, ""):  # "": of an earlier version
        file = leave_file(job, replace(init, namespace=namespace))
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
    monkeypatch.setattr("launch.lock.ATTEMPTS", 1)
    owner = replace(this_process(), host="elsewhere", slurm_job=slurm_job, restarts=restarts)
    file = leave_file(job, owner)
    if is_refused:
        with pytest.raises(JobBusy, match="on elsewhere"):
            lock(job)
    else:
        lock(job)
    assert file.exists() == is_refused


def test_of_many_that_come_together_one_goes_on(job):
    """Over what a dead process has left."""
    leave_file(job, replace(this_process(), started="long ago", pid=12))
    holders = [Holder(job) for _ in range(6)]
    for holder in holders:
        os.write(holder.told, b".")
    answers = [os.read(holder.said, 1000).decode() for holder in holders]
    with pytest.raises(JobBusy):
        lock(job)
    for holder in holders:
        holder.kill()
        os.waitpid(holder.pid, 0)
    assert answers.count("held") == 1
    assert sum("is running in" in answer for answer in answers) == len(holders) - 1
