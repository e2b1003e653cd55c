"""The test cluster does what the launcher's tests rely on."""

import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.slurm.cluster import cancel, job_info, squeue, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]


@pytest.fixture
def submit(tmp_path) -> Iterator[Callable[..., str]]:
    """sbatch a script with options; what it prints is in tmp_path/NAME.log -> number of the job"""
    jobs = []

    def sbatch(name: str, script: str, *options: str) -> str:
        path = tmp_path / f"{name}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        log = ["--parsable", f"--output={tmp_path}/{name}.log", "--open-mode=append"]
        result = subprocess.run(
            ["sbatch", f"--job-name={name}", f"--chdir={tmp_path}", *log, *options, str(path)],
            timeout=30,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        jobs.append(result.stdout.strip())
        return jobs[-1]

    yield sbatch
    cancel(*jobs)


def state(job: str) -> str:
    return job_info(job)["JobState"]


def wait_for_state(job: str, wanted: str, timeout: float) -> None:
    wait_for(lambda: state(job) == wanted, timeout, f"job {job} is {wanted}")


def test_tasks_on_two_nodes_with_their_gpus(submit, tmp_path):
    task = "echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    wanted = ["--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=16"]
    job = submit("ranks", f"srun bash -c '{task}'", "--mem=128G", *wanted)
    wait_for_state(job, "COMPLETED", 20)
    lines = (tmp_path / "ranks.log").read_text().splitlines()
    assert sorted(lines) == ["0 0 lmim0 0,1", "1 1 lmim0 0,1", "2 0 lmim1 0,1", "3 1 lmim1 0,1"]
    assert socket.gethostbyname("lmim0") == "127.0.0.1"  # a job's MASTER_ADDR


def test_a_requeued_job_starts_again(submit, tmp_path):
    job = submit("again", '[ "$SLURM_RESTART_COUNT" ] || sleep 300; echo $SLURM_RESTART_COUNT')
    wait_for_state(job, "RUNNING", 10)
    subprocess.run(["scontrol", "requeue", job], timeout=30, check=True)
    [waiting] = squeue("again")
    assert (waiting.id, waiting.restarts, waiting.name) == (job, 1, "again")
    wait_for_state(job, "COMPLETED", 40)
    assert (tmp_path / "again.log").read_text().splitlines()[-1] == "1"
    assert squeue("again") == []


def test_preemption_signals_requeues_and_resumes(submit, tmp_path):
    """With a job that does as ours: on USR2, rank 0 waits for the other and asks for a requeue."""
    (tmp_path / "task.sh").write_text("""
        [ -z "$SLURM_RESTART_COUNT" ] || { echo "$SLURM_PROCID resumed"; exit; }
        leave() {
            touch signalled$SLURM_PROCID  # srun drops what is printed just before a requeue
            until [ -e signalled0 ] && [ -e signalled1 ]; do sleep 0.1; done
            [ $SLURM_PROCID = 1 ] || scontrol requeue $SLURM_JOB_ID
            exit 1
        }
        trap leave USR2
        touch running$SLURM_PROCID
        while :; do sleep 0.1; done
    """)
    nodes = ["--nodes=2", "--ntasks-per-node=1"]
    signal = ["--signal=USR2@90"]
    meek = submit("meek", "srun bash task.sh", "--partition=scavenge", *signal, *nodes)
    wait_for(lambda: len(list(tmp_path.glob("running?"))) == 2, 15, "both tasks run")

    urgent = submit("urgent", "srun sleep 1", "--exclusive", *nodes)
    wait_for_state(urgent, "COMPLETED", 30)
    assert job_info(meek)["Restarts"] == "1"
    wait_for_state(meek, "COMPLETED", 40)
    lines = (tmp_path / "meek.log").read_text().splitlines()
    assert {"0 resumed", "1 resumed"} <= {*lines}
    assert {path.name for path in tmp_path.glob("signalled?")} == {"signalled0", "signalled1"}
