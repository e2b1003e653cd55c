"""One line per job: by what Slurm says of it, or by its folder."""

import json
import os
import pickle
import re
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import status
from launch.lock import Owner, this_process


def write_checkpoint(path: Path) -> None:
    """As much of one of these steps as is read, ten of which are an epoch."""
    step = int(path.stem.rpartition("-")[2])
    contents = {"step": step, "steps_per_epoch": 10, "config": {"batch_size": 1}}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(contents))


@pytest.fixture
def make(tmp_path):
    """A job's folder, with checkpoints of these names, and with a result unless there is none."""

    def make_job(
        name: str, *checkpoints: str, owner: Owner | None = None, job_id="", has_result=True
    ) -> Path:
        job = tmp_path / "jobs" / name
        for folder in ("logs", "checkpoints", "results"):
            (job / folder).mkdir(parents=True)
        (job / "config.yaml").write_text("epochs: 3\n")
        for checkpoint in checkpoints:
            write_checkpoint(job / "checkpoints" / checkpoint)
        if has_result:
            (job / "results" / f"{name}.json").write_text('{"before": 1}')
        if owner is not None:
            (job / "logs" / "running-x-1.json").write_text(json.dumps(asdict(owner)))
        if job_id:
            note = {"job_id": job_id, "log": f"{job}/logs/{job_id}_0_log.out"}
            (job / "logs" / "slurm.json").write_text(json.dumps(note))
        return job

    return make_job


@pytest.fixture
def rows(tmp_path, capsys):
    """The cells of each job's line, by the job's name."""

    def read() -> dict[str, list[str]]:
        status.main(OmegaConf.create({"output_dir": str(tmp_path / "jobs")}))
        header, *lines = capsys.readouterr().out.splitlines()
        first = header.index("slurm")
        assert all(line[first - 1] == " " != line[first] for line in lines), "not aligned"
        return {cells[0]: cells[1:] for line in lines for cells in [re.split(r" {2,}", line)]}

    return read


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Let `scontrol` be a program of these lines. -> the file in which it notes its arguments"""

    def install(lines: str) -> Path:
        programs, asked = tmp_path / "programs", tmp_path / "asked"
        programs.mkdir()
        program = programs / "scontrol"
        program.write_text(f"#!/bin/sh\necho $@ >>{asked}\n{lines}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return asked

    return install


def test_of_what_runs_without_slurm(make, rows):
    """By who has the folder, and by the last checkpoint; the newest one is shown."""
    me = this_process()
    make("a", "step-00000007.pth", "step-00000012.pth", "epoch-0001-step-00000010.pth", owner=me)
    make("b", "step-00000007.pth", owner=replace(me, started="long ago"))
    make("c")
    d = make("d", "epoch-0002-step-00000020.pth", "epoch-0003-step-00000030.pth")
    elsewhere = replace(me, host="elsewhere", slurm_job=None)
    make("e", "epoch-0003-step-00000030.pth", owner=elsewhere)
    (d / "log.txt").write_text('{"step": 30, "nn_accuracy": 61.25}\n')
    (d / "results" / "nn.json").write_text('{"evaluation": "nn"}')
    make("f", "epoch-0003-step-00000030.pth", has_result=False)
    found = rows()
    states = {name: cells[1] for name, cells in found.items()}
    here = {"a": "running", "b": "dead", "c": "stopped", "d": "finished"}
    assert states == here | {"e": "running on elsewhere", "f": "stopped"}
    assert found["d"][5:8] == ["61.25", "-", "nn"]
    newest = {name: cells[8] for name, cells in found.items()}
    last = "epoch-0003-step-00000030.pth"
    own = {"a": "step-00000012.pth", "b": "step-00000007.pth", "c": "-"}
    assert newest == own | {"d": last, "e": last, "f": last}


def test_of_jobs_that_slurm_has_forgotten(make, rows, scontrol):
    scontrol(
        """case $3 in
        7) echo 'JobId=7 JobName=x JobState=PENDING Reason=QOSMaxJobs Restarts=2' ;;
        *) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
        esac"""
    )
    gone = replace(this_process(), host="elsewhere", slurm_job="3")
    make("known", "epoch-0003-step-00000030.pth", job_id="7")
    make("finished", "epoch-0003-step-00000030.pth", job_id="1")
    make("stopped", "step-00000007.pth", job_id="2")
    make("dead", "step-00000007.pth", job_id="3", owner=gone)
    make("here", "step-00000007.pth", job_id="4", owner=this_process())
    found = {name: (cells[0], cells[1], cells[-1]) for name, cells in rows().items()}
    assert found == {
        "known": ("7", "PENDING (QOSMaxJobs)", "2"),
        "finished": ("1", "finished", "-"),
        "stopped": ("2", "stopped", "-"),
        "dead": ("3", "dead", "-"),
        "here": ("4", "running", "-"),
    }


def test_slurm_that_does_not_answer_is_asked_once(make, rows, scontrol):
    asked = scontrol("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    make("a", job_id="1")
    make("b", "epoch-0003-step-00000030.pth", job_id="2")
    make("c")
    states = {name: cells[1] for name, cells in rows().items()}
    assert states == {"a": "unknown", "b": "finished", "c": "stopped"}
    assert asked.read_text() == "show job 1\n"


def test_a_row_is_printed_before_the_next_is_known(make, tmp_path, capfd, monkeypatch):
    printed, describe = [], status.describe_job

    def remember(job: Path, *arguments) -> list[str]:
        printed.append(capfd.readouterr().out)
        return describe(job, *arguments)

    monkeypatch.setattr(status, "describe_job", remember)
    for name in "abc":
        make(name)
    status.main(OmegaConf.create({"output_dir": str(tmp_path / "jobs")}))
    assert [text.split(" ")[0] for text in printed] == ["job", "a", "b"]


@pytest.mark.parametrize("text", ["epochs: [", "epochs: three", "", "\x00", "- 1"])
def test_a_config_that_is_none_hides_no_other_job(make, rows, text):
    (make("broken", "step-00000007.pth") / "config.yaml").write_text(text)
    make("whole", "epoch-0003-step-00000030.pth")
    states = {name: cells[1] for name, cells in rows().items()}
    assert states == {"broken": "stopped", "whole": "finished"}


def test_what_ended_before_its_last_epoch_or_has_no_number(make, rows):
    """A trial of some steps, one that has gone on since, and features on the disk."""
    configs = {
        "trial": "epochs: 60\nmax_steps: 30\n",
        "more": "epochs: 60\n",
        "features": "worker: eval.features\n",
    }
    for name, config in configs.items():
        checkpoints = ["step-00000030.pth"] if name != "features" else []
        (make(name, *checkpoints) / "config.yaml").write_text(config)
    states = {name: cells[1] for name, cells in rows().items()}
    assert states == {"features": "finished", "more": "stopped", "trial": "finished"}
