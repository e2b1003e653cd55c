"""What the launcher says and does before and after sbatch."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml

from launch.lock import JobBusy, lock, this_process, unlock
from launch.queue import OVER, job_state
from tests.runs import LAUNCHER, ROOT, TINY, environment, records, run, succeed
from tests.slurm.cluster import cancel, job_info, squeue
from tests.slurm.jobs import HELD, LONG, ON_SLURM, error_text, ids, submit, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]


def refused(*overrides: str) -> str:
    """-> the error sentence"""
    code, output = run(LAUNCHER, *ON_SLURM, *overrides)
    assert code == 2, output
    assert len(output.strip().splitlines()) == 1, output
    return output


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


def test_a_sweep_is_one_array(tmp_path):
    arguments = ["-m", "experiment=lab_lejepa", "seed=0,1", "epochs=1", "warmup_epochs=0"]
    arguments.append(f"output_dir={tmp_path}")
    output = succeed(LAUNCHER, *ON_SLURM, *arguments, "env.array_parallelism=2")
    jobs = ids(output)
    assert len({job_id.split("_")[0] for job_id in jobs}) == 1
    assert [job_id.split("_")[1] for job_id in jobs] == ["0", "1"]
    again = succeed(LAUNCHER, *ON_SLURM, *arguments)
    assert again.count("nothing submitted") == 2
    for job_id in jobs:
        assert wait_for_end(job_id, 120) == "COMPLETED"
    folders = sorted(path.parent.name for path in tmp_path.glob("*/log.txt"))
    names = [f"demo-seed{seed}-experiment-lab_lejepa" for seed in (0, 1)]
    assert folders == names
    config = yaml.safe_load((tmp_path / names[1] / "config.yaml").read_text())
    assert (config["target"]["name"], config["sigreg"], config["seed"]) == ("joint", 0.05, 1)
    finished = succeed(LAUNCHER, *ON_SLURM, *arguments)
    assert finished.count("already finished") == 2
    assert not squeue("demo")


def test_wait_follows_the_log_and_returns_the_exit_status(tmp_path):
    trial = ["env.wait=True", "max_steps=14", f"output_dir={tmp_path}"]
    code, output = run(LAUNCHER, *ON_SLURM, *trial)
    assert code == 0, output
    assert "epoch 1.40/3" in output and "nodes        lmim0: 1 x cpu; " in output
    # What is wrong with the images is found out on the node, and not tried again.
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"")
    failing = ["dataset=folder", f"data_path={photos}", "batch_size=2", "job_name=bad"]
    code, output = run(LAUNCHER, *ON_SLURM, *failing, *trial)
    assert code == 2, output
    assert "error: the dataset has 1 images" in output
    assert job_info(ids(output)[0])["Restarts"] == "0"


# ---- One writer per folder. ----------------------------------------------------------------------


def test_of_two_submissions_that_start_together_one_runs(tmp_path):
    """The second has not seen the first in the queue: another name there, and the same folder."""
    job = tmp_path / "one"
    job.mkdir()
    (tmp_path / "two").symlink_to(job)
    settings = [*LONG, "epochs=12", f"output_dir={tmp_path}", HELD, "env.snapshot=False"]
    jobs = []
    for name in ("one", "two"):
        jobs.append(submit(*settings, f"job_name={name}"))
        (job / "logs" / "slurm.json").unlink()
    subprocess.run(["scontrol", "release", *jobs], check=True)
    states = {job_id: wait_for_end(job_id, 120) for job_id in jobs}
    assert sorted(states.values()) == ["COMPLETED", "FAILED"], error_text(job)
    (refused,) = [job_id for job_id, state in states.items() if state == "FAILED"]
    assert job_info(refused)["ExitCode"] == "4:0" and job_info(refused)["Restarts"] == "0"
    (runs,) = set(jobs) - {refused}
    said = (job / "logs" / f"{refused}_0_log.out").read_text()
    assert f"of Slurm job {runs} is running in" in said, said
    assert [r["step"] for r in records(job)] == [*range(5, 516, 5), 516]


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
    assert job_state(job_info(f"{array}_0")["JobId"])["JobState"] in OVER
    assert job_state(array)["JobState"] not in OVER
