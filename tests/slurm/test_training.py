"""Training on a real Slurm: whatever interrupts a job, what finishes is bit for bit the run that
was never disturbed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.runs import (
    LAUNCHER,
    ROOT,
    TINY,
    environment,
    final_state,
    finish,
    start_process,
    succeed,
)
from tests.slurm.cluster import job_info, send_user_signal_on_preemption, wait_for
from tests.slurm.jobs import (
    LONG,
    ON_SLURM,
    assert_undisturbed,
    error_text,
    last_step,
    log_text,
    submit,
    wait_for_end,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]


def test_the_demo_runs_where_the_readme_says(tmp_path):
    """Whatever its name."""
    name = """it's a "name" $(touch harm) `touch harm`; touch harm"""
    settings = ["eval_at_start=True", f"output_dir={tmp_path}", f"job_name={json.dumps(name)}"]
    job_id = submit(*settings)
    job = tmp_path / name
    assert job_info(job_id)["JobName"].startswith("it's a")
    assert wait_for_end(job_id, 120) == "COMPLETED", error_text(job)
    assert not list(tmp_path.rglob("harm")) and not (ROOT / "harm").exists()
    assert "epoch 3.00/3" in log_text(job, job_id)
    assert last_step(job) == 30
    assert list((job / "tensorboard").glob("events.*"))
    assert final_state(job)["step"] == 30
    again = succeed(LAUNCHER, *ON_SLURM, *settings)
    assert "already finished" in again
    assert "submitted" not in again.replace("nothing submitted", "")
    code, output = finish(start_process([*LAUNCHER, "-cn=status", f"output_dir={tmp_path}"]))
    assert code == 0 and "COMPLETED" in output and "epoch-0003-step-00000030.pth" in output


def set_time_left(job_id: str, minutes: int) -> None:
    """From now on, or up to a minute less: Slurm's limits are whole minutes since the start."""
    hours, whole_minutes, _ = map(int, job_info(job_id)["RunTime"].split(":"))
    limit = 60 * hours + whole_minutes + minutes
    subprocess.run(["scontrol", "update", f"JobId={job_id}", f"TimeLimit={limit}"], check=True)


def copy_of_the_project(folder: Path) -> Path:
    project = folder / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
    for name in ("models", "util", "launch", "data", "eval", "configs"):
        subprocess.run(["cp", "-r", f"{ROOT / name}/.", str(project / name)], check=True)
    for name in ("launcher.py", "main_lmim.py", "engine_pretrain.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    (folder / "photos").mkdir()
    (folder / "photos" / "many.txt").write_bytes(bytes(30_000_000))
    (project / "data" / "photos").symlink_to(folder / "photos")
    return project


def test_time_limit_in_the_middle_of_training(tmp_path, undisturbed_pair):
    """Slurm sends the signal up to a minute early, which could be before the first step: so the
    limit is set, and the training held until the signal is there, once the job is in the middle.
    As in a container, the processes cannot call scontrol; no crash is allowed either. The project
    that it was submitted from is edited meanwhile, which must not reach it."""
    project = copy_of_the_project(tmp_path)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    python = f"env PATH={tmp_path}:{os.environ['PATH']} {sys.executable}"
    limits = ["env.timeout=10", "env.signal_delay=120", "env.tasks_per_node=2"]
    inside = [f"env.python='{python}'", "env.max_restarts=0", f"output_dir={tmp_path}"]
    run = subprocess.run(
        [*LAUNCHER, *TINY, *ON_SLURM, *LONG, *limits, *inside],
        cwd=project,
        env=environment(PYTHONPATH=str(project)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    job_id = run.stdout.split("submitted as job ")[1].split()[0]
    assert job_info(job_id)["TimeLimit"] == "00:10:00"
    job = tmp_path / "demo"
    wait_for_step(job, 50)
    (copied,) = (job / "logs").glob("code-*")
    assert (copied / "data" / "digits.npz").exists() and not (copied / "data" / "photos").exists()
    (project / "engine_pretrain.py").write_text("raise RuntimeError('edited')\n")
    ranks = processes_of(job_id)
    assert len(ranks) == 2
    with held(ranks):
        set_time_left(job_id, minutes=2)
        wait_for(lambda: any(map(is_signalled, ranks)), 90, "the signal before the limit")
    wait_for(lambda: job_info(job_id)["Restarts"] == "1", 60, "the requeue")
    set_time_left(job_id, minutes=10)
    assert_undisturbed(job, job_id, undisturbed_pair)
    assert job_info(job_id)["Restarts"] == "1"


@pytest.mark.parametrize("user_signal", [False, True])
def test_preemption_by_a_job_of_higher_priority(tmp_path, undisturbed_pair, user_signal):
    """With and without time to save, which Slurm tells by TERM unless the cluster is set to send
    the signal of sbatch. No crash is allowed."""
    send_user_signal_on_preemption(user_signal)
    settings = [*LONG, "env.world_size=2", "env.max_restarts=0", f"output_dir={tmp_path}"]
    jobs = {}
    try:
        for partition in ("scavenge", "scavenge-at-once")[: 1 if user_signal else 2]:
            where = [f"env.partition={partition}", f"job_name={partition}"]
            jobs[partition] = submit(*settings, *where)
        for name in jobs:
            wait_for_step(tmp_path / name, 50)
        assert wait_for_end(submit_for_both_nodes("sleep 2"), 60) == "COMPLETED"
        for name, job_id in jobs.items():
            assert_undisturbed(tmp_path / name, job_id, undisturbed_pair)
            assert job_info(job_id)["Restarts"] == "1"
            assert not list((tmp_path / name / "logs").glob("*.crashes"))
    finally:
        send_user_signal_on_preemption(False)
    said = log_text(tmp_path / "scavenge", jobs["scavenge"])
    if user_signal:
        assert "SIGUSR2: this job is to be started again" in said
    else:
        assert "stopped by SIGTERM, everything is saved" in said
        assert "exit status 143: Slurm preempts this job, which is to be started again" in said


def submit_for_both_nodes(command: str) -> str:
    options = ["--nodes=2", "--exclusive", "--output=/dev/null", f"--wrap={command}"]
    return subprocess.check_output(["sbatch", "--parsable", *options], text=True).strip()


def test_who_ends_a_job_and_who_has_it_started_again(tmp_path):
    """By hand: scancel and USR1 end it, saved; TERM, when nobody preempts, counts as a crash;
    Slurm's own requeue does not."""
    settings = [*LONG, f"output_dir={tmp_path}"]
    ended = submit(*settings, "job_name=ended")
    job_id = submit(*settings, "env.max_restarts=2")
    job, crashes = tmp_path / "demo", tmp_path / "demo" / "logs" / f"{job_id}.crashes"
    wait_for_step(tmp_path / "ended", 20)
    subprocess.run(["scancel", ended], check=True)
    wait_for_step(job, 20)
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    wait_for(lambda: log_text(job, job_id).count("from step") == 1, 90, "the next start")
    assert not crashes.exists()
    subprocess.run(["scancel", "--signal=TERM", job_id], check=True)
    wait_for(lambda: log_text(job, job_id).count("from step") == 2, 90, "the next start")
    assert crashes.read_text() == "1\n"
    subprocess.run(["scancel", "--signal=USR1", job_id], check=True)
    assert wait_for_end(job_id, 60) == "FAILED"
    assert job_info(job_id)["ExitCode"] == "138:0" and job_info(job_id)["Restarts"] == "2"
    assert crashes.read_text() == "1\n"
    assert "stopped by SIGUSR1, everything is saved" in log_text(job, job_id)
    assert job_info(ended)["JobState"] == "CANCELLED" and job_info(ended)["Restarts"] == "0"
    assert not (tmp_path / "ended" / "logs" / f"{ended}.crashes").exists()


def processes_of(job_id: str) -> list[int]:
    """The training processes of a job, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(
                pair.split("=", 1) for pair in path.read_text().split("\0") if "=" in pair
            )
            command = (path.parent / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        is_task = "submitit.core._submit" in command and "SLURM_PROCID" in variables
        if is_task and variables.get("SLURM_JOB_ID") == job_id:
            found[int(variables["SLURM_PROCID"])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


@contextmanager
def held(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_signalled(pid: int) -> bool:
    """USR2 waits until the process may run again; Slurm may see to that itself."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    pending = int(status.split("ShdPnd:")[1].split()[0], 16)
    return "(stopped)" not in status or bool(pending & 1 << (signal.SIGUSR2 - 1))


def test_one_of_two_processes_is_killed(tmp_path, undisturbed_pair):
    job_id = submit(*LONG, "env.tasks_per_node=2", f"output_dir={tmp_path}")
    job = tmp_path / "demo"
    wait_for_step(job, 20)
    ranks = processes_of(job_id)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    wait_for(lambda: int(job_info(job_id)["Restarts"]) == 1, 60, "the end and the requeue")
    assert_undisturbed(job, job_id, undisturbed_pair)
    assert (job / "logs" / f"{job_id}.crashes").read_text().strip() == "1"


def test_what_cannot_begin_is_not_tried_again(tmp_path):
    """A line of setup that fails; no Python, or one without the packages."""
    wrong = {
        "setup": (["env.setup=['export A=1','nowhere --at all']"], "env.setup", "2:0"),
        "absent": (["env.python=/nowhere/python"], "env.python", "2:0"),
        "bare": (["env.python='env PYTHONPATH= /usr/bin/env python3 -S'"], "env.python", "1:0"),
    }
    jobs = {
        name: submit(f"output_dir={tmp_path}", f"job_name={name}", *overrides)
        for name, (overrides, *_) in wrong.items()
    }
    for name, job_id in jobs.items():
        _, key, exit_status = wrong[name]
        assert wait_for_end(job_id, 60) == "FAILED"
        found = job_info(job_id)
        assert (found["Restarts"], found["ExitCode"]) == ("0", exit_status)
        assert log_text(tmp_path / name, job_id).count(f"error: {key}: expected ") == 1


def test_a_crash_is_tried_again_only_so_often(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "0 0 bug")  # at each start
    failing = ["worker=tests.failing", "accum_iter=2", "batch_size=32", "env.max_restarts=1"]
    job_id = submit(f"output_dir={tmp_path}", *failing)
    assert wait_for_end(job_id, 90) == "FAILED"
    assert "RuntimeError: a bug" in error_text(tmp_path / "demo")
    assert job_info(job_id)["Restarts"] == "1"
