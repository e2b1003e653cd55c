"""Signals: one step more, everything saved, and the right exit code."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main_lmim
from launch.command import call
from launch.job import list_checkpoints
from tests.runs import (
    LAUNCHER,
    ROOT,
    TINY,
    assert_same_state,
    configured_here,
    descendants,
    environment,
    final_state,
    finish,
    kill,
    records,
    start,
    start_process,
    succeed,
    torchrun,
    undisturbed_runs,
    wait_until,
)
from util.distributed import Ranks
from util.preemption import StopFlag
from util.signals import STOP_SIGNALS

CPU_ALONE = Ranks(0, 1, None)


@pytest.fixture
def stop_flag():
    flag = StopFlag(CPU_ALONE)
    yield flag
    flag.close()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_handler_only_sets_a_flag(stop_flag, number):
    assert stop_flag.agreed() == 0
    os.kill(os.getpid(), number)
    assert stop_flag.agreed() == number


def test_a_requeue_is_not_forgotten_because_of_a_later_term(stop_flag):
    for number in (signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert stop_flag.agreed() == signal.SIGUSR2


def test_forked_children_ignore_what_their_parent_handles(stop_flag):
    child = os.fork()
    if child == 0:
        handlers = {signal.getsignal(number) for number in STOP_SIGNALS}
        os._exit(0 if handlers == {signal.SIG_IGN} else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_close_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    StopFlag(CPU_ALONE).close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_what_could_not_be_saved_is_said_with_the_newest_checkpoint(
    tmp_path, monkeypatch, capsys, number
):
    """The folder is gone in the step in which the signal comes. A requeue is asked for as well."""
    checkpoints = tmp_path / "demo" / "checkpoints"

    def requeue(*_):
        print("to be started again", file=sys.stderr)
        sys.exit(75)

    train_step = main_lmim.train_step

    def step(training, batches, draw_views, step: int, epoch: float):
        train_step(training, batches, draw_views, step, epoch)
        if step == 4:
            shutil.rmtree(checkpoints)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(main_lmim, "train_step", step)
    before = signal.signal(signal.SIGUSR2, requeue)
    code = call(main_lmim.main, configured_here(tmp_path, "epochs=1"))
    signal.signal(signal.SIGUSR2, before)
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}: 5 steps are lost: there is no" in said
    assert "everything is saved" not in said
    is_requeue = number == signal.SIGUSR2
    assert code == (75 if is_requeue else 143) and ("started again" in said) == is_requeue


def settings_of(processes: int) -> list[str]:
    """Loader workers are running too. About forty steps."""
    return ["num_workers=1", f"batch_size={64 // processes}", "epochs=2"]


COMMANDS = {  # and what stops them
    "launcher": (LAUNCHER, [signal.SIGINT, signal.SIGTERM]),
    "launcher, two": ([*LAUNCHER, "env.ngpu=2"], [signal.SIGINT, signal.SIGTERM]),
    "torchrun": (torchrun(2), [signal.SIGTERM]),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return undisturbed_runs(tmp_path_factory.mktemp, settings_of)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_signals_save_and_the_same_command_goes_on(tmp_path, undisturbed, name):
    """To the whole process group, as a terminal does."""
    processes = 1 if name == "launcher" else 2
    settings = [*settings_of(processes), f"output_dir={tmp_path}"]
    job = tmp_path / "demo"
    stopped_at = 0
    command, signals = COMMANDS[name]
    for number in signals:
        stopped_at = stop_and_check(name, number, settings, job, stopped_at)
    resumed = succeed(command, *settings)
    assert f"from step {stopped_at}" in resumed
    assert resumed.count("epoch 2.00/2") == 1  # the first process alone prints
    assert_same_state(final_state(job), undisturbed(processes))


def stop_and_check(name: str, number: int, settings: list[str], job: Path, stopped_at: int) -> int:
    """Start again where it was stopped before, and stop it some steps later. -> the step"""
    process = start(COMMANDS[name][0], *settings)
    wait_until(lambda: any(r["step"] >= stopped_at + 5 for r in records(job)), process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=25)
    assert (f"from step {stopped_at}" in output) == (stopped_at > 0), output
    assert "everything is saved; the same command with resume=True goes on from here" in output
    if name == "torchrun":  # which has its own way of saying that it was told to stop
        assert process.returncode != 0
    else:
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output
    step = final_state(job)["step"]
    assert stopped_at + 5 <= step < 40
    return step


@pytest.mark.slow
def test_processes_end_with_a_torchrun_that_was_killed(tmp_path):
    process = start(torchrun(2), f"output_dir={tmp_path}", "epochs=500", "batch_size=32")
    job = tmp_path / "demo"
    wait_until(lambda: records(job), process)
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/environ").exists() for pid in workers):
        assert time.monotonic() < deadline, "they train on"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path):
    """Whatever starts the second: here, several processes, in an allocation of Slurm, over it. What
    was killed is followed at once, though its loader workers live on for some seconds."""
    job, settings = tmp_path / "demo", [f"output_dir={tmp_path}", "epochs=500", "save_minutes=1e-6"]
    process = start(LAUNCHER, *settings, "num_workers=1")
    wait_until(lambda: list_checkpoints(job / "checkpoints"), process)
    in_allocation = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}
    starts = [
        start([*LAUNCHER, "env.ngpu=2"], *settings),
        start(LAUNCHER, *settings, "resume=False", "overwrite=True"),
        start_process([*LAUNCHER, *TINY, *settings], **in_allocation),
    ]
    for refused in starts:
        code, output = finish(refused)
        assert code == 4, output
        assert f"process {process.pid} on {socket.gethostname()} is running in {job}" in output
    assert descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    done = records(job)[-1]["step"]
    again = start(LAUNCHER, *settings)
    wait_until(lambda: records(job)[-1]["step"] > done + 5, again)
    for started in (again, process):
        kill(started)


IMPATIENT = """
import os, signal, time
from tests.test_preemption import CPU_ALONE
from util.preemption import StopFlag
flag = StopFlag(CPU_ALONE)
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)  # at once: the same one, passed on
print("still here", flush=True)
time.sleep(1.2)
os.kill(os.getpid(), signal.SIGINT)
print("survived")
"""


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once():
    command = [sys.executable, "-c", IMPATIENT]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ran.stdout == "still here\n"
    assert ran.returncode == -signal.SIGINT


@pytest.mark.slow
def test_what_torchrun_starts_again_resumes(tmp_path, undisturbed):
    """Without resume=True: one of two processes is killed once."""
    command = [*torchrun(2), *TINY, *settings_of(2), "resume=False", "save_minutes=1e-4"]
    command = [*command, f"output_dir={tmp_path}"]
    command.insert(command.index("--standalone"), "--max-restarts=1")
    job = tmp_path / "demo"
    process = start_process(command)
    wait_until(lambda: any(r["step"] >= 5 for r in records(job)), process)
    ranks = [pid for pid in descendants(process.pid) if b"RANK=1" in environment_of(pid)]
    os.kill(ranks[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert re.search("from step [1-9]", output), output
    assert_same_state(final_state(job), undisturbed(2))


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
