"""The launcher as a user meets it: quick answers, readable errors, several processes."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from launch.config import compose_config, parse_command_line
from launch.local import exit_code_of
from tests.runs import LAUNCHER, ROOT, descendants, environment, kill, torchrun, wait_until
from tests.test_config import CHOICES, CONFIGS, PUBLISHED

TINY = (
    "--config-name=demo epochs=1 warmup_epochs=0 encoder.depth=1 encoder.embed_dim=24 "
    "decoder_depth=1 decoder_embed_dim=24 proj.mlp_depth=0 batch_size=140 eval_freq=0 "
    "eval_at_start=False watch_images=0"
).split()
ANSWERS = {"help": ["--help"], "cfg": [*PUBLISHED, "--cfg", "job"]}
# A worker that tells how it was started, and fails in the way that `data_path` asks for.
WORKER = """
import os, signal, sys
from launch.config import ConfigError
from util.distributed import join_processes, leave_processes

def main(cfg):
    import torch
    ranks = join_processes()
    line = f"rank {ranks.rank} of {ranks.world_size}: {torch.get_num_threads()} threads"
    os.write(1, f"{line}\\n".encode())  # at once: lines of two processes must not mix
    leave_processes()
    if cfg.data_path == "bad input":
        raise ConfigError("all of us found this")
    if cfg.data_path == "bad input of the last" and ranks.rank == ranks.world_size - 1:
        raise ConfigError("only the last one found this")
    if cfg.data_path == "bug":
        raise ZeroDivisionError("a bug")
    if cfg.data_path == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(command: list[str], *folders) -> subprocess.CompletedProcess:
    """folders: where else to look for modules."""
    path = os.pathsep.join(map(str, [ROOT, *folders]))
    # OMP_NUM_THREADS of the test's own surroundings would hide who sets it.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def run_own_worker(tmp_path):
    (tmp_path / "own_worker.py").write_text(WORKER)

    def run_it(*overrides: str) -> subprocess.CompletedProcess:
        arguments = [*TINY, "worker=own_worker", f"output_dir={tmp_path}", *overrides]
        return run([*LAUNCHER, *arguments], tmp_path)

    return run_it


# ---- Answers. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_come_at_once(answer):
    """Seconds of the processor: other tests are running."""
    spent = [sum(os.times()[2:4])]  # by children that have ended
    for _ in range(3):
        assert run([*LAUNCHER, *ANSWERS[answer]]).returncode == 0
        spent.append(sum(os.times()[2:4]))
    assert min(np.diff(spent)) < 2.0


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_need_neither_torch_nor_the_models(answer):
    result = run([sys.executable, "-X", "importtime", "launcher.py", *ANSWERS[answer]])
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert {"hydra", "launch"} <= imported
    assert not imported & {"torch", "torchvision", "timm", "models", "data", "main_lmim", "numpy"}


def test_help_shows_what_can_be_chosen():
    text = run([*LAUNCHER, "--help"]).stdout
    words = set(text.split())
    assert set(CONFIGS) <= words
    assert {word for pair in CHOICES for word in pair} <= words
    assert "python launcher.py --config-name=demo" in text


def test_cfg_job_prints_the_config_as_yaml():
    printed = run([*LAUNCHER, *PUBLISHED, "--cfg", "job"]).stdout
    expected = OmegaConf.to_container(compose_config("lmim", PUBLISHED[1:]))
    assert yaml.safe_load(printed) == expected
    assert expected["blr"] == 1.5e-4 and expected["env"]["ngpu"] == 8
    assert OmegaConf.load(io.StringIO(printed)) == expected


@pytest.mark.parametrize(
    "line",
    [
        "--config-name lmim epochs=3 --cfg job tau=1",
        "--config-name=lmim --cfg=job epochs=3 tau=1",
        "epochs=3 tau=1 -c job -cn lmim.yaml",
    ],
)
def test_flags_and_overrides_come_in_any_order(line):
    command = parse_command_line(line.split(), "")
    assert command.cfg == "job" and command.overrides == ["epochs=3", "tau=1"]
    assert compose_config(command.config_name, command.overrides).epochs == 3


def test_unknown_flags_are_refused():
    for arguments in (["--confg-name=lmim"], ["--config-name"]):
        result = run([*LAUNCHER, *arguments])
        assert result.returncode == 2 and "usage: launcher.py" in result.stderr
        assert "Traceback" not in result.stderr


def test_an_interrupt_while_modules_load():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "launcher.py", "--cfg=job"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves are started with &, it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any("omegaconf.base" in line for line in process.stderr)  # Hydra comes next
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert output == "" and "Traceback" not in errors and "launch.command" not in errors


# ---- A console that nobody reads. ----------------------------------------------------------------

NOBODY = {"closed": "<&- >&- 2>&-", "gone": "2>&1 | true; exit ${PIPESTATUS[0]}"}


def run_unread(nobody: str, *arguments: str) -> int:
    """-> exit code"""
    line = f"{shlex.join([*LAUNCHER, *arguments])} {NOBODY[nobody]}"
    return run(["bash", "-c", line]).returncode


@pytest.mark.parametrize("nobody", NOBODY)
def test_an_answer_that_nobody_reads(nobody, tmp_path):
    assert run_unread(nobody, "--cfg=job", f"output_dir={tmp_path}") == 0
    assert run_unread(nobody, "-cn=status", f"output_dir={tmp_path}") == 2  # no job is there
    (tmp_path / "one" / "logs").mkdir(parents=True)
    assert run_unread(nobody, "-cn=status", f"output_dir={tmp_path}") == 0


def test_what_is_said_before_nobody_reads_is_whole():
    help_of = shlex.join([*LAUNCHER, "--help"])
    printed = run(["bash", "-c", f"{help_of} | head -1; exit ${{PIPESTATUS[0]}}"])
    assert printed.returncode == 0 and printed.stderr == ""
    assert printed.stdout.startswith("usage: ") and printed.stdout.count("\n") == 1


def test_what_python_does_not_buffer_is_there_at_once():
    program = "import os, launch.console as c; c.open_streams(); print('said'); os._exit(0)"
    assert run([sys.executable, "-u", "-c", program]).stdout == "said\n"


@pytest.mark.slow
@pytest.mark.parametrize("nobody", NOBODY)
def test_a_training_that_nobody_reads(nobody, tmp_path):
    for settings in (
        ["num_workers=1", "job_name=a"],
        ["env.ngpu=0", "env.tasks_per_node=2", "job_name=a", "overwrite=True"],
        ["-m", "seed=0,1", "env.parallel=2", "job_name=a"],
    ):
        assert run_unread(nobody, *TINY, f"output_dir={tmp_path}", *settings) == 0
    for name in ("a", "a-seed1"):
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 1
        assert "epoch" in (tmp_path / name / "logs" / "console.txt").read_text()


# ---- One process. --------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_process_runs_in_the_launcher_itself(run_own_worker):
    result = run_own_worker()
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout == f"rank 0 of 1: {len(os.sched_getaffinity(0))} threads\n"


@pytest.mark.slow
def test_a_bug_shows_its_traceback(run_own_worker):
    result = run_own_worker("data_path=bug")
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: a bug\n")


def test_the_exit_code_of_several_processes(capsys):
    assert exit_code_of({0: 2}) == 2
    assert exit_code_of({0: -15, 1: 2}) == 2
    assert exit_code_of({0: 2, 1: 1}) == 1
    assert capsys.readouterr().err == ""
    assert exit_code_of({3: -9}) == 1
    assert capsys.readouterr().err == "[rank 3] error: ended by SIGKILL\n"


# ---- Several processes. --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mistake_of_one_process_is_said_once(run_own_worker):
    result = run_own_worker("env.ngpu=2", "data_path=bad input of the last")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["[rank 1] error: only the last one found this"]


@pytest.mark.slow
def test_processes_share_the_cores_and_a_bug_shows_its_own_traceback_only(run_own_worker):
    result = run_own_worker("env.ngpu=0", "env.tasks_per_node=2", "data_path=bug")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    lines = [f"rank {rank} of 2: {threads} threads" for rank in range(2)]
    assert sorted(result.stdout.splitlines()) == lines
    assert result.returncode == 1
    assert re.search(r"\[rank [01]\] Traceback", result.stderr)
    assert "ZeroDivisionError: a bug" in result.stderr
    assert "elastic" not in result.stderr and "ChildFailedError" not in result.stderr


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(run_own_worker):
    result = run_own_worker("env.ngpu=2", "data_path=killed")
    assert result.returncode == 1
    assert re.fullmatch(r"\[rank [01]\] error: ended by SIGKILL\n", result.stderr)


@pytest.mark.slow
def test_a_mistake_that_training_finds_is_said_once(tmp_path):
    (tmp_path / "empty").mkdir()
    images = ["dataset=folder", f"data_path={tmp_path}/empty"]
    result = run([*LAUNCHER, "env.ngpu=2", *TINY, f"output_dir={tmp_path}", *images])
    assert result.returncode == 2
    assert re.fullmatch(r"\[rank 0\] error: .+\n", result.stderr)


@pytest.mark.slow
def test_torchrun_shows_the_mistake(tmp_path):
    """torchrun adds its own report and its own exit code, 1."""
    result = run([*torchrun(2), *TINY, f"output_dir={tmp_path}", "epochs=abc"])
    assert result.returncode == 1
    assert result.stderr.count("error: epochs=abc: expected a whole number from 1 to 10**9\n") == 1


# ---- Being told to stop. -------------------------------------------------------------------------

# Saving takes as many seconds as data_path says.
SLOW_WORKER = """
import os, time
from util.distributed import join_processes
from util.preemption import Interrupted, stoppable

def main(cfg):
    with stoppable(join_processes()) as flag:
        os.write(1, b"ready\\n")
        while not flag.received:
            time.sleep(0.05)
        time.sleep(float(cfg.data_path))
        os.write(1, b"saved\\n")
        raise Interrupted(flag.received[0])
"""


@pytest.fixture
def slow_processes(tmp_path):
    """Two of them, once they are running."""
    (tmp_path / "slow_worker.py").write_text(SLOW_WORKER)
    started = []

    def start(seconds: int, settings=("env.ngpu=2",), ready: int = 2) -> subprocess.Popen:
        overrides = [f"output_dir={tmp_path}", "worker=slow_worker", f"data_path='{seconds}'"]
        process = subprocess.Popen(
            [*LAUNCHER, *TINY, *overrides, *settings],
            cwd=ROOT,
            env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert [process.stdout.readline() for _ in range(ready)] == ["ready\n"] * ready
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill(process)


@pytest.mark.slow
def test_processes_that_save_are_waited_for(slow_processes):
    """However long it takes: torchrun's agent kills them after 30 seconds."""
    process = slow_processes(seconds=33)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert output == "saved\n" * 2
    said = re.findall(r"waiting for 2 processes to save, for (\d+) s now; Ctrl-C again", errors)
    assert [int(seconds) // 10 for seconds in said] == [1, 2, 3]


@pytest.mark.slow
def test_runs_side_by_side_that_save_are_told_once(slow_processes, tmp_path):
    """Told again after more than a second, a run leaves without saving."""
    sweep = ["-m", "seed=0,1", "env.parallel=2"]
    process = slow_processes(seconds=4, settings=sweep, ready=0)
    logs = [tmp_path / f"demo-seed{seed}" / "logs" / "output.txt" for seed in (0, 1)]
    wait_until(lambda: all(log.exists() and "ready" in log.read_text() for log in logs), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert [log.read_text().splitlines()[:2] for log in logs] == [["ready", "saved"]] * 2


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once_without_saving(slow_processes):
    process = slow_processes(seconds=600)
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT and output == "" and "Traceback" not in errors
    assert len(workers) >= 2
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/environ").exists() for pid in workers):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.1)
