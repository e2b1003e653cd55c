"""What the launcher says and does before and after sbatch."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from launch.lock import JobBusy, lock, this_process, unlock
from launch.queue import has_ended
from tests.evaluations import launch, results
from tests.runs import LAUNCHER, ROOT, TINY, environment, records, run, succeed
from tests.slurm.cluster import cancel, job_info, squeue, wait_for
from tests.slurm.jobs import LONG, ON_SLURM, error_text, log_text, submit, wait_for_end
from util.checkpoint import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]

HELD = "+env.slurm_extra.hold=True"  # queued, and never started


def refused(*overrides: str) -> str:
    """-> the error sentence"""
    code, output = run(LAUNCHER, *ON_SLURM, *overrides)
    assert code == 2, output
    assert len(output.strip().splitlines()) == 1, output
    return output


def test_a_second_job_of_the_same_name_is_refused_by_name_and_id(tmp_path):
    job_id = submit(f"output_dir={tmp_path}", HELD)
    try:
        error = refused(f"output_dir={tmp_path}", HELD)
        assert f"job_name=demo: job {job_id} of this name is queued or running" in error
    finally:
        cancel(job_id)


def test_slurms_own_words(tmp_path):
    error = refused(f"output_dir={tmp_path}", "env.partition=nowhere")
    assert "invalid partition specified: nowhere" in error
    error = refused(f"output_dir={tmp_path}", "env.nodelist=nowhere")
    assert "error: Slurm refused the job: Batch job submission failed: " in error


def test_no_sbatch_names_the_way_out(tmp_path):
    command = [sys.executable, "launcher.py", *TINY, "env.slurm=True", f"output_dir={tmp_path}"]
    only_python = environment(PATH=os.path.dirname(sys.executable))
    ran = subprocess.run(command, cwd=ROOT, env=only_python, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "there is no sbatch on this machine; expected False" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_name_of_spaces_quotes_and_commands(tmp_path):
    name = """it's a "name" $(touch harm) `touch harm`; touch harm"""
    output = succeed(
        LAUNCHER, *ON_SLURM, "epochs=1", "warmup_epochs=0", f"output_dir={tmp_path}",
        f"job_name={json.dumps(name)}",
    )  # fmt: skip
    job_id = output.split("submitted as job ")[1].split()[0]
    assert job_info(job_id)["JobName"].startswith("it's a")
    assert wait_for_end(job_id, 60) == "COMPLETED"
    assert (tmp_path / name / "log.txt").exists()
    assert not list(tmp_path.rglob("harm"))
    assert not (ROOT / "harm").exists()
    assert "already finished" in succeed(
        LAUNCHER, *ON_SLURM, "epochs=1", "warmup_epochs=0", f"output_dir={tmp_path}",
        f"job_name={json.dumps(name)}",
    )  # fmt: skip


def test_a_sweep_is_one_array(tmp_path):
    arguments = ["-m", "experiment=lab_lejepa", "epochs=1", "warmup_epochs=0"]
    arguments.append(f"output_dir={tmp_path}")
    output = succeed(LAUNCHER, *ON_SLURM, *arguments, "env.array_parallelism=2")
    ids = [line.split("job ")[1] for line in output.splitlines() if "submitted as job" in line]
    assert len({job_id.split("_")[0] for job_id in ids}) == 1
    assert [job_id.split("_")[1] for job_id in ids] == ["0", "1", "2"]
    again = succeed(LAUNCHER, *ON_SLURM, *arguments)
    assert again.count("nothing submitted") == 3
    for job_id in ids:
        assert wait_for_end(job_id, 120) == "COMPLETED"
    folders = sorted(path.parent.name for path in tmp_path.glob("*/log.txt"))
    name = "demo-experiment-lab_lejepa"
    assert folders == [name, f"{name}-seed1", f"{name}-seed2"]
    config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
    assert (config["target"]["name"], config["sigreg"], config["seed"]) == ("joint", 0.05, 0)
    finished = succeed(LAUNCHER, *ON_SLURM, *arguments)
    assert finished.count("already finished") == 3
    assert not squeue("demo")


def test_wait_follows_the_log_and_returns_the_exit_status(tmp_path):
    trial = ["env.wait=True", "max_steps=14", f"output_dir={tmp_path}"]
    code, output = run(LAUNCHER, *ON_SLURM, *trial)
    assert code == 0, output
    assert "epoch 1.40/3" in output and "nodes        lmim0: 1 x cpu; " in output
    failing = ["env.wait=True", f"output_dir={tmp_path / 'bad'}", "batch_size=2000"]
    code, output = run(LAUNCHER, *ON_SLURM, *failing)
    assert code == 2, output


def test_status_lists_jobs(tmp_path):
    finished = submit(f"output_dir={tmp_path}", "job_name=finished")
    assert wait_for_end(finished, 60) == "COMPLETED"
    waiting = submit(f"output_dir={tmp_path}", "job_name=waiting", HELD)
    try:
        command = [sys.executable, "launcher.py", "--config-name=status", f"output_dir={tmp_path}"]
        ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        rows = {line.split()[0]: line for line in ran.stdout.splitlines() if line.strip()}
        assert "COMPLETED" in rows["finished"]
        assert "epoch-0003-step-00000030.pth" in rows["finished"]
        assert "PENDING" in rows["waiting"]
    finally:
        cancel(waiting)


def test_environment_variables_for_nccl_are_passed_through(tmp_path):
    job_id = submit(f"output_dir={tmp_path}", "+env.nccl.NCCL_DEBUG=INFO", HELD)
    try:
        script = wait_for(lambda: job_info(job_id).get("Command"), 10, "the batch script")
        assert "export NCCL_DEBUG=INFO" in Path(script).read_text()
    finally:
        cancel(job_id)


def test_an_evaluation_waits_for_the_training_that_it_is_to_evaluate(tmp_path):
    """Both are submitted before there is a checkpoint: it is looked for on the node."""
    training = submit(f"output_dir={tmp_path}", "epochs=1", "warmup_epochs=0", HELD)
    after = f"+env.slurm_extra.dependency=afterok:{training}"
    code, output = launch("nn", tmp_path / "demo", tmp_path, *ON_SLURM, after)
    assert code == 0, output
    evaluation = output.split("submitted as job ")[1].split()[0]
    assert not (tmp_path / "demo" / "checkpoints").exists()
    assert job_info(evaluation)["Dependency"].startswith(f"afterok:{training}")
    subprocess.run(["scontrol", "release", training], check=True)
    assert wait_for_end(evaluation, 90) == "COMPLETED", error_text(tmp_path / "nn")
    assert job_info(training)["JobState"] == "COMPLETED"
    assert job_info(training)["EndTime"] <= job_info(evaluation)["StartTime"]
    found = results(tmp_path, "nn")
    last = list_checkpoints(tmp_path / "demo" / "checkpoints")[0]
    assert found["backbone"]["sha256"] == hashlib.sha256(last.read_bytes()).hexdigest()
    assert f"nn: top1 {found['results']['top1']:.4g}" in log_text(tmp_path / "nn", evaluation)


# ---- One writer per folder. ----------------------------------------------------------------------


def test_of_two_submissions_that_start_together_one_runs(tmp_path):
    """The second has not seen the first in the queue: another name there, and the same folder."""
    job = tmp_path / "one"
    job.mkdir()
    (tmp_path / "two").symlink_to(job)
    settings = [*LONG, "epochs=12", f"output_dir={tmp_path}", HELD, "env.snapshot=False"]
    ids = []
    for name in ("one", "two"):
        ids.append(submit(*settings, f"job_name={name}"))
        (job / "logs" / "slurm.json").unlink()
    subprocess.run(["scontrol", "release", *ids], check=True)
    states = {job_id: wait_for_end(job_id, 120) for job_id in ids}
    assert sorted(states.values()) == ["COMPLETED", "FAILED"], error_text(job)
    (refused,) = [job_id for job_id, state in states.items() if state == "FAILED"]
    assert job_info(refused)["ExitCode"] == "4:0" and job_info(refused)["Restarts"] == "0"
    (runs,) = set(ids) - {refused}
    said = (job / "logs" / f"{refused}_0_log.out").read_text()
    assert f"of Slurm job {runs} is running in" in said, said
    assert [r["step"] for r in records(job)] == [*range(5, 516, 5), 516]


def test_of_two_runs_inside_one_allocation_one_runs(tmp_path):
    command = shlex.join([*LAUNCHER, *TINY, *LONG, "epochs=12", f"output_dir={tmp_path}"])
    script = f"cd {ROOT}; {command} & one=$!; {command}; echo $?; wait $one; echo $?"
    options = ["--parsable", f"--output={tmp_path}/log", f"--wrap={script}"]
    job_id = subprocess.check_output(["sbatch", *options], text=True).strip()
    assert wait_for_end(job_id, 120) == "COMPLETED"
    log = (tmp_path / "log").read_text()
    assert {line for line in log.splitlines() if line.isdecimal()} == {"0", "4"}, log
    assert log.count("is running in") == 1
    assert [r["step"] for r in records(tmp_path / "demo")] == [*range(5, 516, 5), 516]


def test_an_owner_on_another_machine_is_followed_when_slurm_says_that_its_job_is_over(tmp_path):
    job = tmp_path / "job"
    (job / "logs").mkdir(parents=True)
    waiting = submit(f"output_dir={tmp_path}", HELD)
    owner = replace(this_process(), host="elsewhere", slurm_job=waiting)
    file = job / "logs" / "running-elsewhere-1.json"
    file.write_text(json.dumps(asdict(owner)))
    with pytest.raises(JobBusy, match=f"of Slurm job {waiting} is running"):
        lock(job)
    cancel(waiting)
    lock(job)
    unlock(job)
    assert not file.exists()


def test_each_element_of_an_array_is_asked_for_by_itself():
    """One of them has the number of the whole array: here the one that is still running."""
    script = "[ $SLURM_ARRAY_TASK_ID = 0 ] || sleep 60"
    options = ["--parsable", "--output=/dev/null", "--array=0-1", f"--wrap={script}"]
    array = subprocess.check_output(["sbatch", *options], text=True).strip()
    assert wait_for_end(f"{array}_0", 30) == "COMPLETED"
    assert job_info(f"{array}_1")["JobId"] == array
    assert has_ended(job_info(f"{array}_0")["JobId"])
    assert not has_ended(array)
