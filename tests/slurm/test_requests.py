"""What is asked of Slurm, what it answers, and what reaches the node."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import slurm
from tests.runs import (
    LAUNCHER,
    ROOT,
    TINY,
    assert_same_state,
    environment,
    final_state,
    run,
    succeed,
    succeed_together,
)
from tests.slurm.cluster import cancel, job_info, squeue, wait_for
from tests.slurm.jobs import HELD, ON_SLURM, error_text, ids, submit, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]

# A worker that tells what has reached it.
WORKER = """
import json, os
from util.distributed import join_processes

def main(cfg):
    ranks = join_processes()
    seen = [ranks.world_size, cfg.data_path, *map(os.environ.get, ("OF_SETUP", "OF_PYTHON"))]
    print(f"seen {json.dumps(seen)}", flush=True)
    os.write(2, b"an error\\n")
"""


def batch_script(job_id: str) -> str:
    return Path(wait_for(lambda: job_info(job_id).get("Command"), 10, "the script")).read_text()


def test_options_of_sbatch_are_sent_once(tmp_path):
    places = [f"output_dir={tmp_path}", "env.ngpu=2", HELD]
    nccl = "+env.nccl.NCCL_DEBUG=INFO"
    one = submit(*places, "job_name=one", "env.gres=gpu:fake:2", "env.mem=0", nccl)
    two = submit(*places, "job_name=two", "+env.slurm_extra.gpus-per-node=fake:2")
    extra = ["+env.slurm_extra.cpus-per-task=3", "+env.slurm_extra.requeue=False"]
    three = submit(*places, "job_name=three", "env.gres=none", *extra)
    script = batch_script(one)
    assert "--gres=gpu:fake:2\n" in script and "--gpus-per-node" not in script
    assert "--mem=0GB" in script and "--wckey" not in script and "--requeue\n" in script
    assert "export NCCL_DEBUG=INFO\n" in script
    script = batch_script(two)
    assert "--gres" not in script and script.count("--gpus-per-node") == 1
    assert "--gpus-per-node=fake:2\n" in script
    script = batch_script(three)
    assert "--gres" not in script and "--gpus-per-node" not in script
    assert script.count("--cpus-per-task") == 1 and "--requeue" not in script
    assert job_info(three)["CPUs/Task"] == "3"


def test_what_reaches_the_node(tmp_path):
    """From inside another job, on a node whose name does not resolve; an array for each shape."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "probe.py").write_text(WORKER)
    settings = [
        *("-m", "seed=1,2", "env.tasks_per_node=1,2", "worker=probe", "data_path=$OF_SETUP/photos"),
        *(
            "env.setup=['export OF_SETUP=/disk']",
            f"env.python='env OF_PYTHON=yes {sys.executable}'",
        ),
        *("env.srun_args=['--comment=mine']", "env.partition=nameless", f"output_dir={tmp_path}"),
    ]
    surrounding = {"SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "100", "SLURM_JOB_ID": "1"}
    own_path = f"{ROOT}:{tmp_path / 'own'}"
    ran = subprocess.run(
        [*LAUNCHER, *TINY, *ON_SLURM, *settings],
        cwd=ROOT,
        env=environment(PYTHONPATH=own_path, **surrounding),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    jobs = ids(ran.stdout)
    assert len({job_id.split("_")[0] for job_id in jobs}) == 2 and len(jobs) == 4
    assert "--comment=mine" in batch_script(jobs[0])
    for job_id in jobs:
        assert wait_for_end(job_id, 90) == "COMPLETED", error_text(tmp_path)
    seen = []
    for log in (tmp_path / "sweeps").glob("*/*_0_log.out"):
        lines = log.read_text().splitlines()
        assert "an error" in lines
        seen += [json.loads(line[5:]) for line in lines if line.startswith("seen ")]
    same = ["/disk/photos", "/disk", "yes"]
    assert sorted(seen) == [[1, *same], [1, *same], [2, *same], [2, *same]]


def test_of_a_sweep_only_what_is_missing_is_submitted(tmp_path):
    arguments = ["-m", "seed=1,2,3", HELD]
    jobs = ids(succeed(LAUNCHER, *ON_SLURM, *arguments, f"output_dir={tmp_path / 'a'}"))
    cancel(jobs[1])
    again = succeed(LAUNCHER, *ON_SLURM, *arguments, f"output_dir={tmp_path / 'a'}")
    assert again.count("nothing submitted") == 2
    assert "demo-seed2: submitted" in again and len(ids(again)) == 1
    # Jobs of one name in two folders are two jobs.
    elsewhere = succeed(LAUNCHER, *ON_SLURM, *arguments, f"output_dir={tmp_path / 'b'}")
    assert len(ids(elsewhere)) == 3


def test_a_job_may_wait_for_one_of_its_own_name(tmp_path):
    first = submit(f"output_dir={tmp_path}", HELD)
    after = [f"output_dir={tmp_path}", HELD, "+env.slurm_extra.dependency=afterany:"]
    second = submit(*after[:2], f"{after[2]}{first}")
    third = submit(*after[:2], f"{after[2]}{second}")
    assert {job.id for job in squeue("demo")} == {first, second, third}


def test_a_request_that_cannot_start(tmp_path):
    settings = [f"output_dir={tmp_path}", "env.partition=short", "env.timeout=100"]
    output = succeed(LAUNCHER, *ON_SLURM, *settings)
    (job_id,) = ids(output)
    assert f"job {job_id} does not start: Slurm says PartitionTimeLimit" in output
    (tmp_path / "damaged" / "logs").mkdir(parents=True)
    (tmp_path / "damaged" / "logs" / "slurm.json").write_text('{"job_id')
    command = [*LAUNCHER, "--config-name=status", f"output_dir={tmp_path}"]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "PENDING (PartitionTimeLimit)" in ran.stdout and "damaged" in ran.stdout
    waiting = submit(f"output_dir={tmp_path}", "job_name=held", HELD)
    started = time.monotonic()
    slurm.say_if_stuck(waiting)
    assert time.monotonic() - started < slurm.FIRST_WORD_SECONDS - 1


def test_names_of_signs_that_slurm_reads(tmp_path):
    for name in ("""x%A_%a %j 'a' "b" 100%""", "語" * 66 + "x"):
        settings = [
            *ON_SLURM,
            f"output_dir={tmp_path}",
            HELD,
            f"job_name={json.dumps(name, ensure_ascii=False)}",
        ]
        (job_id,) = ids(succeed(LAUNCHER, *settings))
        assert job_info(job_id)["StdOut"].endswith(f"/{job_id}_0_log.out")
        code, output = run(LAUNCHER, *settings)
        assert code == 2 and f"job {job_id} of this name is queued" in output


def test_srun_in_a_script_of_ones_own(tmp_path):
    """Two processes on one node or on two; what is started without srun is alone."""
    succeed_together(2, f"output_dir={tmp_path / 'by-hand'}")
    expected = final_state(tmp_path / "by-hand" / "demo")
    program = [sys.executable, "main_lmim.py", *TINY]
    alone = " ".join([*program, "max_steps=1", f"output_dir={tmp_path / 'alone'}"])
    jobs = {}
    for nodes in (1, 2):
        folder = tmp_path / f"{nodes}-nodes"
        together = " ".join(["srun", *program, f"output_dir={folder}"])
        script = f"cd {ROOT}; {alone if nodes == 1 else ':'} && {together}"
        shape = [f"--nodes={nodes}", "--ntasks=2", f"--output={folder}.log", f"--wrap={script}"]
        command = ["sbatch", "--parsable", *shape]
        jobs[folder] = subprocess.check_output(command, text=True, env=environment()).strip()
    for folder, job_id in jobs.items():
        log = Path(f"{folder}.log")
        assert wait_for_end(job_id, 180) == "COMPLETED", log.read_text()
        assert "on 2 x cpu" in log.read_text()
        assert_same_state(final_state(folder / "demo"), expected)
        steps = [json.loads(line)["step"] for line in (folder / "demo" / "log.txt").open()]
        assert steps == list(range(1, 16))
    assert "on 1 x cpu" in (tmp_path / "1-nodes.log").read_text()
