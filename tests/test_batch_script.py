"""The batch script of a job, line by line; what it does when bash runs it, and what a submission
leaves, between programs that answer as Slurm's do (with a real Slurm: tests/slurm/)."""

import copy
import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from launch import slurm
from launch.config import ConfigError
from launch.validate import check_config
from tests.runs import fill
from tests.test_protocols import composed


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder first on PATH; srun is there, as submitit wants it."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    write_program(folder / "srun", "exit 0")
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def script_of(cfg: DictConfig, folder: Path) -> str:
    executor = slurm.build_executor(cfg, folder)._executor
    return executor._make_submission_file_text(executor._submitit_command_str, "id")


def test_every_key_is_asked_for(programs, tmp_path):
    """No two of the values are alike, and none is a default."""
    folder = tmp_path / "my logs"
    cfg = composed(
        "demo",
        "env=slurm",
        *("job_name=other", "env.ngpu=2", "env.gres=gpu:a100:2", "env.world_size=3"),
        *("env.partition=fast", "env.account=payer", "env.qos=urgent", "env.constraint=big"),
        *("env.nodelist=n1", "env.exclude=n2", "env.comment=words", "env.mem=17"),
        *("env.timeout=77", "env.signal_delay=55", "env.workers=6", "env.max_restarts=4"),
        *("env.array_parallelism=5", "env.nccl.NCCL_DEBUG=INFO", "env.snapshot=False"),
        *("env.slurm_extra.reservation=booked", "env.slurm_extra.requeue=False"),
        *("env.setup=['module load cuda','export A=1']", "env.srun_args=['--mpi=none']"),
        "env.python='env B=2 /opt/bin/python'",
    )
    text = script_of(cfg, folder)
    code, marks = slurm.REPOSITORY, shlex.quote(str(folder))
    srun = f"srun --unbuffered --output '{folder}/%j_%t_log.out' --kill-on-bad-exit=1 --mpi=none"
    assert [line for line in text.splitlines() if line] == [
        "#!/bin/bash",
        "# Parameters",
        "#SBATCH --account=payer",
        "#SBATCH --comment=words",
        "#SBATCH --constraint=big",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --exclude=n2",
        "#SBATCH --gres=gpu:a100:2",
        "#SBATCH --job-name=other",
        "#SBATCH --mem=17GB",
        "#SBATCH --nodelist=n1",
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output='{folder}/%j_0_log.out'",
        "#SBATCH --partition=fast",
        "#SBATCH --qos=urgent",
        "#SBATCH --reservation=booked",
        "#SBATCH --signal=USR2@55",
        "#SBATCH --time=77",
        "# setup",
        *filter(None, slurm.BATCH.read_text().splitlines()),
        f"begin_job {marks}",
        "trap 'setup_failed $? $LINENO ${#BASH_SOURCE[@]}' ERR",
        "module load cuda",
        "export A=1",
        "trap - ERR; set +eu",
        f"use_code {code}",
        "export NCCL_DEBUG=INFO",
        "# command",
        "export SUBMITIT_EXECUTOR=slurm",
        f"{srun} env B=2 /opt/bin/python -u -m submitit.core._submit {marks}",
        "# teardown",
        "end_job $? 4",
    ]


def test_what_is_asked_for_without_being_set(programs, tmp_path):
    text = script_of(composed("demo", "env=slurm", "env.ngpu=2"), tmp_path)
    assert "#SBATCH --requeue\n" in text and "#SBATCH --gpus-per-node=2\n" in text
    assert f" {sys.executable} -u -m submitit" in text
    (code,) = tmp_path.glob("code-*")  # the snapshot
    assert f"\nuse_code {code}\n" in text and (code / "launcher.py").exists()
    for key in ("account", "partition", "qos", "gres", "mem", "wckey", "nodelist", "exclude"):
        assert f"--{key}" not in text


def test_a_sweep_is_an_array_with_so_many_at_a_time(programs, tmp_path):
    cfg = composed("demo", "env=slurm", "env.array_parallelism=5", "env.snapshot=False")
    executor = slurm.build_executor(cfg, tmp_path)._executor
    executor.parameters["map_count"] = 9  # as submitit does for an array
    text = executor._make_submission_file_text("true", "id")
    assert "#SBATCH --array=0-8%5\n" in text and f"--output={tmp_path}/%A_%a_0_log.out\n" in text


def test_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    training = composed("lmim", "output_dir=out", "data_path=photos")
    slurm.make_paths_absolute(training)
    assert training.output_dir == f"{tmp_path}/out" and training.data_path == f"{tmp_path}/photos"
    for given, absolute in (
        ("mae:weights.pth", f"mae:{tmp_path}/weights.pth"),
        ("weights.pth", f"{tmp_path}/weights.pth"),
        ("timm:vit_small_patch16_224", "timm:vit_small_patch16_224"),
    ):
        paths = ["data_path=$TMPDIR/photos", "cache_dir=cache", "pretrained_weights=own.pth"]
        evaluation = composed("nn", f"pretrained={given}", *paths)
        slurm.make_paths_absolute(evaluation)
        assert evaluation.pretrained == absolute and evaluation.data_path == "$TMPDIR/photos"
        assert evaluation.cache_dir == f"{tmp_path}/cache"
        assert evaluation.pretrained_weights == f"{tmp_path}/own.pth"
    several = composed("visualize", "pretrained=[a.pth,timm:b]", "images=photos/*.jpg")
    slurm.make_paths_absolute(several)
    assert several.pretrained == [f"{tmp_path}/a.pth", "timm:b"]
    assert several.images == f"{tmp_path}/photos/*.jpg"
    tars = composed("lmim", "dataset=tar", "dataset.options.index_folder=index")
    slurm.make_paths_absolute(tars)
    assert tars.dataset.options.index_folder == f"{tmp_path}/index"


@functools.cache
def on_slurm() -> DictConfig:
    return composed("demo", "env=slurm", "env.snapshot=False")


class Ran:
    """The batch script, run by bash. Slurm says `state` and `preempted`; srun leaves `marks` and
    ends with `status`."""

    def __init__(self, programs, folder, status=0, marks="started", **given):
        calls, job = programs / "calls", folder / "7"
        answer = f"{given.pop('state', 'RUNNING')} {given.pop('preempted', 'N/A')}"
        touches = [f"touch {job}.{mark}" for mark in marks.split()]
        said = f"echo python: {given.pop('log', 'Input/output error')} >>{job}_0_log.out"
        srun = [f"env >{programs}/environment", *touches, said, f"exit {status}"]
        write_program(programs / "srun", "\n".join(srun))
        write_program(programs / "squeue", f"echo $@ >{programs}/asked; echo {answer}")
        write_program(programs / "scontrol", f"echo $@ >{calls}")
        for file in (calls, programs / "environment"):
            file.unlink(missing_ok=True)
        cfg = copy.deepcopy(on_slurm())
        cfg.env.update(given)
        (programs / "script").write_text(script_of(cfg, folder))
        ran = subprocess.run(
            ["bash", programs / "script"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"},
        )
        self.status, self.said = ran.returncode, ran.stdout
        self.is_requeued = calls.exists() and calls.read_text() == "requeue 7\n"
        crashes = Path(f"{job}.crashes")
        self.crashes = int(crashes.read_text()) if crashes.exists() else None
        self.is_over = Path(f"{job}.ended").exists()


AT = "2026-01-01T00:00:00"


@pytest.mark.parametrize(
    ("answer", "is_requeued", "crashes", "is_over"),
    [
        ({"status": 0}, False, None, True),
        ({"status": 1}, True, 1, False),
        ({"status": 143}, True, 1, False),  # TERM, and nobody preempts
        ({"status": 143, "preempted": AT}, True, None, False),
        ({"status": 1, "preempted": AT, "marks": ""}, True, None, False),  # while it starts
        ({"status": 2, "preempted": AT, "marks": "started final"}, False, None, True),
        ({"status": 143, "state": "COMPLETING", "preempted": AT}, False, None, False),
        ({"status": 143, "state": "COMPLETING"}, False, None, False),  # scancel
        ({"status": 75, "marks": "started again"}, True, None, False),  # USR2
        ({"status": 2, "marks": "started final"}, False, None, True),
        ({"status": 1, "preempted": AT}, True, 1, False),  # a crash after a preemption
        ({"status": 127, "marks": ""}, False, None, True),
        ({"status": 1, "marks": ""}, True, 1, False),  # a node that is not well
        ({"status": 1, "marks": "", "log": "No module named submitit"}, False, None, True),
    ],
)
def test_what_is_started_again(programs, tmp_path, answer, is_requeued, crashes, is_over):
    ran = Ran(programs, tmp_path, **answer)
    assert ran.status == answer["status"]
    assert (ran.is_requeued, ran.crashes, ran.is_over) == (is_requeued, crashes, is_over), ran.said


def test_so_many_restarts_after_crashes(programs, tmp_path):
    """Preemptions between them do not count, and marks of an earlier start do not either."""
    for count in (1, 2):
        ran = Ran(programs, tmp_path, status=1, max_restarts=2)
        assert ran.is_requeued and f"restart {count} of 2" in ran.said
        ran = Ran(programs, tmp_path, status=75, marks="started again", max_restarts=2)
        assert ran.is_requeued and ran.crashes == count
    ran = Ran(programs, tmp_path, status=1, max_restarts=2)
    assert not ran.is_requeued and ran.is_over and ran.crashes == 2
    asked = (programs / "asked").read_text()
    assert asked == "--noheader --array --jobs=7 --states=all --Format=State:30,PreemptTime:30\n"


def setup_lines(folder: Path, *more: str) -> list[str]:
    """Conditions that fail, and commands that fail inside functions and files."""
    (folder / "activate").write_text("set +e\ngrep -q nothing /dev/null\nexport ACTIVE=yes\n")
    return [
        "module() { grep -q nothing /dev/null; [ $1 = load ] && [ $2 != missing ]; }",
        f"source {folder}/activate",
        "[ -e /nowhere ] && source /nowhere",
        "if grep -q nothing /dev/null; then",
        "  false",
        "else",
        "  module load \\",
        "    cuda",
        "fi",
        "for i in 1 2; do false || export TWICE=$i; done",
        *more,
    ]


def test_lines_of_setup_that_succeed_run_in_the_shell_of_the_program(programs, tmp_path):
    ran = Ran(programs, tmp_path, status=1, setup=setup_lines(tmp_path, "set -eu"))
    environment = (programs / "environment").read_text().splitlines()
    assert {"ACTIVE=yes", "TWICE=2", "SRUN_CPUS_PER_TASK=1"} <= {*environment}
    (path,) = [line for line in environment if line.startswith("PYTHONPATH=")]
    assert path.partition("=")[2].split(":")[0] == str(slurm.REPOSITORY)
    assert ran.is_requeued and ran.crashes == 1, ran.said  # `set -e` does not end the script


@pytest.mark.parametrize(
    ("line", "status"),
    [("module load missing", 1), ("nowhere --at all", 127), ("source /nowhere/activate", 1)],
)
def test_a_line_of_setup_that_fails_ends_the_job(programs, tmp_path, line, status):
    lines = setup_lines(tmp_path, line, "export AFTER=1")
    ran = Ran(programs, tmp_path, setup=lines)
    assert (ran.status, ran.is_requeued, ran.is_over) == (2, False, True)
    assert not (programs / "environment").exists(), "the program has begun"
    reason = f"expected lines that succeed, but exit status {status} is that of: {line}"
    assert ran.said.splitlines()[-1] == f"error: env.setup: {reason}"
    assert Ran(programs, tmp_path, setup=lines, preempted=AT).is_requeued


def test_a_job_whose_code_is_gone_runs_no_other(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "REPOSITORY", tmp_path / "gone")
    ran = Ran(programs, tmp_path)
    assert (ran.status, ran.is_requeued, ran.is_over) == (4, False, True)
    assert ran.said.splitlines()[-1].startswith("error: the copy of the code is gone; a later ")
    assert not (programs / "environment").exists(), "the program has begun"


def test_as_many_gpus_as_gres_says():
    cfg = composed("demo", "env=slurm")
    for gres, ngpu in (("gpu:a100:1", 2), ("gpu:2", 1), ("gpu", 2), ("gpu:a100:4", 0)):
        cfg.env.gres, cfg.env.ngpu, cfg.env.slurm = gres, ngpu, True
        with pytest.raises(ConfigError, match=f"^env.gres={gres}: expected .*env.ngpu={ngpu}"):
            check_config(cfg)
        cfg.env.slurm = False  # where the key means nothing, as in a local config
        check_config(cfg)
    cfg.env.slurm = True
    cfg.env.ngpu = 2
    for gres in ("gpu:a100:2", "gpu:2,disk:9", "none", None, "gpu:a100:1,gpu:h100:1"):
        cfg.env.gres = gres
        check_config(cfg)


def submission(programs: Path, folder: Path, sbatch: str, **env) -> DictConfig:
    """A job whose submission these lines of sbatch answer. Its log will be that of job 7."""
    for name, lines in {
        "sbatch": sbatch,
        "scontrol": "echo JobState=RUNNING",
    }.items():
        write_program(programs / name, lines)
    cfg = copy.deepcopy(on_slurm())
    cfg.output_dir = str(folder)
    cfg.env.update({"snapshot": True} | env)
    return cfg


def test_a_refused_submission_leaves_nothing_new(programs, tmp_path):
    cfg = submission(
        programs, tmp_path / "jobs", "echo 'sbatch: error: no such account' >&2; exit 1"
    )
    with pytest.raises(ConfigError, match="^Slurm refused the job: .*no such account"):
        slurm.submit([cfg])
    assert not (tmp_path / "jobs" / "demo").exists()
    checkpoint = tmp_path / "jobs" / "demo" / "checkpoints" / "step-00000007.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    cfg.resume = True
    with pytest.raises(ConfigError, match="no such account"):
        slurm.submit([cfg])
    assert checkpoint.exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_full_disk_is_one_sentence(programs, small_disk, capsys, when):
    """After sbatch has taken the job, its number is said first."""
    filler = "" if when == "before" else f"head -c 9000000 /dev/zero >{small_disk}/filler; "
    cfg = submission(programs, small_disk, f"{filler}echo Submitted batch job 7", snapshot=False)
    if when == "before":
        fill(small_disk)
    with pytest.raises(ConfigError, match=f"^output_dir={small_disk}: expected .*No space left"):
        slurm.submit([cfg])
    assert ("submitted as job 7" in capsys.readouterr().out) == (when == "after")


def test_who_stops_following_is_told_that_the_job_goes_on(programs, tmp_path, capsys, monkeypatch):
    def interrupted(note: dict) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "follow", interrupted)
    cfg = submission(programs, tmp_path, "echo Submitted batch job 7", wait=True, snapshot=False)
    try:
        assert slurm.submit([cfg]) == 130
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("nothing is said")
    log = f"{tmp_path}/demo/logs/7_0_log.out"
    said = ["job 7 goes on", f"  follow  tail -F {log}", "  stop    scancel 7"]
    assert capsys.readouterr().err.splitlines() == said
    ways = "choose .*, scancel 7 first, or .* env.slurm_extra.dependency=afterany:7$"
    with pytest.raises(ConfigError, match=f"^job_name=demo: job 7 of this name .*: {ways}"):
        slurm.submit([cfg])
    for dependency in ("afterany:7", "afterok:5:7", "singleton"):
        cfg.env.slurm_extra = {"dependency": dependency}
        assert slurm.submit([cfg]) == 130
    cfg.env.slurm_extra = {}
    write_program(programs / "scontrol", "echo JobState=COMPLETED")
    assert slurm.submit([cfg]) == 130


def test_following_a_job_through_an_absence_of_the_controller(tmp_path, monkeypatch, capsys):
    log = tmp_path / "7_0_log.out"
    states = ["unknown", "CONFIGURING", "unknown", "RUNNING", "COMPLETED"]
    pieces = iter([b"a \xe8\xaa", b"\x9e b", b" c", b" d", b" e"])

    def answer(job_id: str) -> dict[str, str]:
        with open(log, "ab") as file:
            file.write(next(pieces))
        return {"JobState": states.pop(0), "ExitCode": "0:0"}

    monkeypatch.setattr(slurm, "job_state", answer)
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    assert slurm.follow({"job_id": "7", "log": str(log)}) == 0
    assert capsys.readouterr().out == "a 語 b c d e"
