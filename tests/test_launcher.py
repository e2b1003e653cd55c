"""The launcher as a user meets it: quick answers, readable errors, several processes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import launcher
from launch.command import run_command_line
from launch.config import compose_config, parse_command_line
from launch.local import exit_code_of
from tests.launched import Launched
from tests.runs import LAUNCHER, ROOT, descendants, finish, start_together
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
    if cfg.data_path == "prints":
        print("said", flush=True)
        return
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


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def launch(tmp_path):
    """Start the launcher with a small training, or with a worker that stands in tmp_path."""
    started = []

    def start(*arguments: str, **how) -> Launched:
        folder = tmp_path / f"launched-{len(started)}"
        folder.mkdir()
        (folder / "own_worker.py").write_text(WORKER)
        (folder / "slow_worker.py").write_text(SLOW_WORKER)
        started.append(Launched(folder, *TINY, f"output_dir={tmp_path}", *arguments, **how))
        return started[-1]

    yield start
    for process in started:
        process.kill()


# ---- Answers. ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ANSWERS)
def answer(request):
    """-> which one, the seconds of the processor that it took, the process"""
    before = sum(os.times()[2:4])  # of children that have ended
    ended = run([sys.executable, "-X", "importtime", "launcher.py", *ANSWERS[request.param]])
    assert ended.returncode == 0
    return request.param, sum(os.times()[2:4]) - before, ended


def test_answers_come_at_once(answer):
    _, seconds, _ = answer
    assert seconds < 2.0


def test_answers_need_neither_torch_nor_the_models(answer):
    lines = answer[2].stderr.splitlines()
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    assert {"hydra", "launch"} <= imported
    assert not imported & {"torch", "torchvision", "timm", "models", "data", "main_lmim", "numpy"}


def test_what_is_answered(answer):
    name, _, ended = answer
    if name == "help":  # what can be chosen
        words = set(ended.stdout.split())
        assert set(CONFIGS) <= words
        assert {word for pair in CHOICES for word in pair} <= words
        assert "python launcher.py --config-name=demo" in ended.stdout
    else:  # the config as YAML
        expected = OmegaConf.to_container(compose_config("lmim", PUBLISHED[1:]))
        assert yaml.safe_load(ended.stdout) == expected
        assert expected["blr"] == 1.5e-4 and expected["env"]["ngpu"] == 8
        assert ended.stdout == OmegaConf.to_yaml(compose_config("lmim", PUBLISHED[1:]))


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


@pytest.mark.parametrize("flag", ["--confg-name=lmim", "--config-name", "-sc", "--info"])
def test_unknown_flags_are_refused(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["launcher.py", flag])
    with pytest.raises(SystemExit, match="2"):
        run_command_line(launcher.launch, "")
    assert "usage: launcher.py" in capsys.readouterr().err


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


@pytest.mark.parametrize("nobody", NOBODY)
def test_an_answer_that_nobody_reads(nobody, tmp_path):
    """The config, and then what is wrong with it."""
    arguments = shlex.join([*LAUNCHER, "--cfg=job", f"output_dir={tmp_path}", "epochs=abc"])
    assert run(["bash", "-c", f"{arguments} {NOBODY[nobody]}"]).returncode == 2


def test_what_is_said_before_nobody_reads_is_whole():
    help_of = shlex.join([*LAUNCHER, "--help"])
    printed = run(["bash", "-c", f"{help_of} | head -1; exit ${{PIPESTATUS[0]}}"])
    assert printed.returncode == 0 and printed.stderr == ""
    assert printed.stdout.startswith("usage: ") and printed.stdout.count("\n") == 1


def test_what_python_does_not_buffer_is_there_at_once():
    program = "import os, launch.command as c; c.open_streams(); print('said'); os._exit(0)"
    assert run([sys.executable, "-u", "-c", program]).stdout == "said\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nobody", "settings", "jobs"),
    [
        ("closed", ["num_workers=1"], ["demo"]),
        ("gone", ["num_workers=1"], ["demo"]),
        ("closed", ["-m", "seed=0,1", "env.parallel=2"], ["demo-seed0", "demo-seed1"]),
    ],
)
def test_a_training_that_nobody_reads(launch, tmp_path, nobody, settings, jobs):
    assert launch(*settings, nobody=nobody).finish()[0] == 0
    for name in jobs:
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 1
        assert "epoch" in (tmp_path / name / "logs" / "console.txt").read_text()


@pytest.mark.slow
def test_several_processes_that_nobody_reads(launch):
    """New ones: what Python makes of the streams is theirs to find out."""
    own = ["env.ngpu=2", "worker=own_worker", "data_path=prints"]
    assert launch(*own, nobody="gone", spawns=True).finish()[0] == 0


# ---- One process. --------------------------------------------------------------------------------


def test_one_process_runs_in_the_launcher_itself(launch):
    code, output, errors = launch("worker=own_worker", threads=None).finish()
    assert code == 0 and errors == ""
    assert output == f"rank 0 of 1: {len(os.sched_getaffinity(0))} threads\n"


def test_a_bug_shows_its_traceback(launch):
    code, _, errors = launch("worker=own_worker", "data_path=bug").finish()
    assert code == 1 and "Traceback" in errors
    assert errors.endswith("ZeroDivisionError: a bug\n")


def test_the_exit_code_of_several_processes(capsys):
    assert exit_code_of({0: 2}) == 2
    assert exit_code_of({0: -15, 1: 2}) == 2
    assert exit_code_of({0: 2, 1: 1}) == 1
    assert capsys.readouterr().err == ""
    assert exit_code_of({3: -9}) == 1
    assert capsys.readouterr().err == "[rank 3] error: ended by SIGKILL\n"


# ---- Several processes. --------------------------------------------------------------------------


def test_a_mistake_of_one_process_is_said_once(launch):
    own = ["worker=own_worker", "data_path=bad input of the last"]
    code, _, errors = launch("env.ngpu=2", *own, GRACE_SECONDS=1).finish()
    assert code == 2
    assert errors.splitlines() == ["[rank 1] error: only the last one found this"]


@pytest.mark.slow
def test_processes_share_the_cores_and_a_bug_shows_its_own_traceback_only(launch):
    own = ["env.ngpu=0", "env.tasks_per_node=2", "worker=own_worker", "data_path=bug"]
    code, output, errors = launch(*own, spawns=True, threads=None).finish()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    lines = [f"rank {rank} of 2: {threads} threads" for rank in range(2)]
    assert sorted(output.splitlines()) == lines
    assert code == 1
    assert re.search(r"\[rank [01]\] Traceback", errors)
    assert "ZeroDivisionError: a bug" in errors
    assert "elastic" not in errors and "ChildFailedError" not in errors


def test_a_process_that_is_killed_is_named(launch):
    code, _, errors = launch("env.ngpu=2", "worker=own_worker", "data_path=killed").finish()
    assert code == 1
    assert re.fullmatch(r"\[rank [01]\] error: ended by SIGKILL\n", errors)


def test_a_mistake_that_training_finds_is_said_once(launch, tmp_path):
    (tmp_path / "empty").mkdir()
    images = ["dataset=folder", f"data_path={tmp_path}/empty"]
    code, _, errors = launch("env.ngpu=2", *images).finish()
    assert code == 2
    assert re.fullmatch(r"\[rank 0\] error: .+\n", errors)


def test_processes_of_torchrun_show_the_mistake_once(tmp_path):
    """torchrun ends the others when the first has failed."""
    arguments = [*TINY, f"output_dir={tmp_path}", "epochs=abc"]
    first, second = start_together(2, *arguments, program="main_lmim.py")
    said = "[rank 0] error: epochs=abc: expected a whole number from 1 to 10**9\n"
    assert finish(first) == (2, said)
    os.kill(second.pid, signal.SIGTERM)
    assert finish(second, timeout=10) == (-signal.SIGTERM, "")


# ---- Being told to stop. -------------------------------------------------------------------------


@pytest.fixture
def slow(launch):
    """Processes that save for so many seconds, once they are running."""

    def start(seconds: float, *settings: str, **how) -> Launched:
        process = launch("worker=slow_worker", f"data_path='{seconds}'", *settings, **how)
        wait_until(lambda: process.output.exists() and process.output.read_text() == "ready\n" * 2)
        return process

    return start


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_processes_that_save_are_waited_for(slow):
    """However long it takes, which is said; those of a run where one has failed are not."""
    process = slow(1.3, "env.ngpu=2", SAY_SECONDS=0.4, END_SECONDS=0.1)
    process.send_signal(signal.SIGTERM)
    code, output, errors = process.finish()
    assert code == 128 + signal.SIGTERM
    assert output == "ready\n" * 2 + "saved\n" * 2
    said = re.findall(r"waiting for 2 processes to save, for \d+ s now; Ctrl-C again", errors)
    assert 1 <= len(said) <= 3


def test_runs_side_by_side_that_save_are_told_once(launch, tmp_path):
    """Told again after more than a second, a run leaves without saving."""
    sweep = ["-m", "seed=0,1", "env.parallel=2"]
    process = launch("worker=slow_worker", "data_path='2.5'", *sweep)
    logs = [tmp_path / f"demo-seed{seed}" / "logs" / "output.txt" for seed in (0, 1)]
    wait_until(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
    process.send_signal(signal.SIGTERM)
    assert process.finish()[0] == 128 + signal.SIGTERM
    assert [log.read_text().splitlines()[:2] for log in logs] == [["ready", "saved"]] * 2


def test_a_second_interrupt_leaves_at_once_without_saving(slow):
    process = slow(600, "env.ngpu=2")
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, output, errors = process.finish(timeout=20)
    assert code == 128 + signal.SIGINT and "saved" not in output and "Traceback" not in errors
    assert len(workers) >= 2
    wait_until(lambda: not any(map(is_alive, workers)), 20)


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # else nobody has waited for it yet
    return False
