"""Signals: one step more, everything saved, and the right exit code."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
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
    shared,
    start,
    start_process,
    start_together,
    succeed_together,
    torchrun,
    undisturbed,
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


def test_under_nohup_a_closed_terminal_is_no_reason_to_stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = StopFlag(CPU_ALONE)
    os.kill(os.getpid(), signal.SIGHUP)
    assert flag.agreed() == 0
    flag.close()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


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


@pytest.mark.slow
def test_signals_save_and_the_same_command_goes_on(tmp_path):
    """To one process and its loader worker, as a terminal does: the other hears of it
    at the end of the step."""
    settings = [*shared(2), "num_workers=1", f"output_dir={tmp_path}"]
    job, stopped_at = tmp_path / "demo", 0
    for number, told in ((signal.SIGINT, 1), (signal.SIGTERM, 0)):
        processes = start_together(2, *TINY, *settings)
        until = stopped_at + 5
        wait_until(lambda until=until: any(r["step"] >= until for r in records(job)), processes[0])
        os.killpg(processes[told].pid, number)
        ended = [finish(process, timeout=60) for process in processes]
        output = "".join(output for _, output in ended)
        assert (f"from step {stopped_at}\n" in output) == (stopped_at > 0), output
        assert "everything is saved; the same command with resume=True goes on from here" in output
        assert [code for code, _ in ended] == [128 + number] * 2 and "Traceback" not in output
        stopped_at = final_state(job)["step"]
        assert until <= stopped_at < 42
    resumed = succeed_together(2, *settings)
    assert f"from step {stopped_at}\n" in resumed
    assert resumed.count("epoch 2.00/2") == 1  # the first process alone prints
    assert_same_state(final_state(job), undisturbed(2))


@pytest.mark.slow
def test_a_torchrun_that_starts_its_processes_again_and_is_killed_itself(tmp_path):
    """One of two processes is killed: torchrun starts both again, and they resume, also without
    resume=True. Then torchrun is killed: they save and end with it."""
    settings = [*TINY, *shared(2), "resume=False", "save_minutes=1e-4", "epochs=500"]
    command = [*torchrun(2), *settings, f"output_dir={tmp_path}"]
    command.insert(command.index("--standalone"), "--max-restarts=1")
    job = tmp_path / "demo"
    process = start_process(command)
    wait_until(lambda: any(r["step"] >= 5 for r in records(job)), process)
    first = ranks_of(process.pid)
    os.kill(first[1], signal.SIGKILL)
    wait_until(lambda: len({*ranks_of(process.pid).values()} - {*first.values()}) == 2, process)
    console = job / "logs" / "console.txt"
    resumed = "images per step, 10500 steps, from step [1-9]"
    wait_until(lambda: re.search(resumed, console.read_text()), process)
    before = records(job)[-1]["step"]
    wait_until(lambda: records(job)[-1]["step"] > before + 2, process)
    ranks = [*ranks_of(process.pid).values()]
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/environ").exists() for pid in ranks):
        assert time.monotonic() < deadline, "they train on"
        time.sleep(0.1)
    assert final_state(job)["step"] == records(job)[-1]["step"] > before


def ranks_of(torchrun: int) -> dict[int, int]:
    """The processes that it has started, by rank."""
    found = {}
    for pid in descendants(torchrun):
        with suppress(OSError):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    found[int(variable.removeprefix(b"RANK="))] = pid
    return found


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path):
    """Whatever starts the second: two processes, or one in an allocation of Slurm. What was
    killed is followed at once, though its loader workers live on for some seconds."""
    job, settings = tmp_path / "demo", [f"output_dir={tmp_path}", "epochs=500", "save_minutes=1e-6"]
    process = start(LAUNCHER, *settings, "num_workers=1")
    wait_until(lambda: list_checkpoints(job / "checkpoints"), process)
    in_allocation = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}
    starts = [
        *start_together(2, *TINY, *settings),
        start_process([*LAUNCHER, *TINY, *settings, "overwrite=True"], **in_allocation),
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
from util.signals import Signals
signals = Signals()
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)  # at once: the same one, passed on
print("still here", flush=True)
time.sleep(1.2)
os.kill(os.getpid(), signal.SIGINT)
print("survived")
"""


def test_a_second_interrupt_leaves_at_once():
    command = [sys.executable, "-c", IMPATIENT]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ran.stdout == "still here\n"
    assert ran.returncode == -signal.SIGINT
