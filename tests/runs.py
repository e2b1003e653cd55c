"""Real runs for the tests: the project's own commands in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig

from launch.config import compose_config
from tests.forked import ROOT, Forked
from util.checkpoint import list_checkpoints, load_file

# The demo made small: 10 steps an epoch, about 20 ms each.
TINY = (
    "--config-name=demo encoder.embed_dim=24 encoder.depth=2 proj.mlp_dim=32 proj.mlp_depth=2 "
    "decoder_embed_dim=24 decoder_depth=1 epochs=3 warmup_epochs=1 print_freq=1 eval_freq=0 "
    "eval_at_start=False watch_images=0 resume=True"
).split()


def environment(**extra: str) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | ours | extra


def torchrun(processes: int) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, f"--nproc-per-node={processes}", "main_lmim.py"]


LAUNCHER = [sys.executable, "launcher.py"]
STARTED: list[subprocess.Popen | Forked] = []  # by the test that is running (tests/conftest.py)


def configured_here(folder: Path, *overrides: str) -> DictConfig:
    """A small training in the process of the test."""
    tiny = [text for text in TINY if "=" in text and not text.startswith("--")]
    settings = ["batch_size=8", "precision=fp32", "num_workers=0", f"output_dir={folder}"]
    return compose_config("demo", [*tiny, *settings, *overrides])


def start(command: list[str], *overrides: str) -> subprocess.Popen | Forked:
    """A small training."""
    return start_process([*command, *TINY, *overrides])


def start_process(command: list[str], **extra: str) -> subprocess.Popen | Forked:
    """In a process group of its own, so that kill() reaches all of it. extra: variables."""
    if command[0] == sys.executable and command[1].endswith(".py"):
        process = Forked(command[1:], environment(**extra))
    else:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**extra),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    STARTED.append(process)
    return process


def start_in_terminal(command: list[str], terminal: int) -> Forked:
    """With this as its controlling terminal, which is closed here."""
    process = Forked(command[1:], environment(), os.ttyname(terminal))
    STARTED.append(process)
    wait_until(lambda: os.getpgid(process.pid) == process.pid, process)
    return process


def run(command: list[str], *overrides: str, timeout: float = 280) -> tuple[int, str]:
    """-> exit code, everything it printed"""
    return finish(start(command, *overrides), timeout)


def finish(process: subprocess.Popen | Forked, timeout: float = 280) -> tuple[int, str]:
    """-> exit code, everything it printed"""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as hung:
        for pid in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # Python says where each of its threads is
        output, _ = process.communicate(timeout=20)
        raise AssertionError(f"hung: {output}") from hung
    return process.returncode, output


def succeed(command: list[str], *overrides: str) -> str:
    code, output = run(command, *overrides)
    assert code == 0, output
    return output


def succeed_together(processes: int, *overrides: str) -> str:
    """A small training as torchrun(processes) does it."""
    return run_together(processes, *TINY, *overrides)


def run_together(processes: int, *arguments: str, program: str = "launcher.py") -> str:
    """-> what they printed"""
    ended = [finish(rank) for rank in start_together(processes, *arguments, program=program)]
    output = "".join(output for _, output in ended)
    assert [code for code, _ in ended] == [0] * processes, output
    return output


def start_together(processes: int, *arguments: str, program: str = "launcher.py") -> list[Forked]:
    """Processes that know of each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start_process(
            [sys.executable, program, *arguments],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(processes)
    ]


def read_board(folder: Path):
    """What TensorBoard shows of a folder, as its EventAccumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def kill(process: subprocess.Popen | Forked) -> None:
    """kill -9: the process and all that it has started (torchrun's have groups of their own)."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def descendants(ancestor: int) -> list[int]:
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = path.read_text().partition(" (")
            parent = int(rest.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(pid))
    found = list(children.get(ancestor, []))
    for pid in found:
        found += children.get(pid, [])
    return found


def records(job: Path) -> list[dict]:
    path = job / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_until(condition, process: subprocess.Popen | Forked, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.stdout.read()}")
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def kill_at_step(process: subprocess.Popen | Forked, job: Path, step: int) -> None:
    """kill -9 as soon as the log has this step."""
    wait_until(lambda: any(r["step"] >= step for r in records(job)), process)
    kill(process)
    assert process.returncode == -signal.SIGKILL, "it had ended before the kill"


def final_state(job: Path) -> dict:
    return load_file(list_checkpoints(job / "checkpoints")[0])


def shared(processes: int) -> list[str]:
    """Settings of runs that are ended in many ways: 42 steps, however they are split."""
    return ["epochs=2", "accum_iter=2", f"batch_size={32 // processes}", "num_workers=0"]


@cache
def undisturbed(processes: int) -> dict:
    """The final state of such a run, without interruption."""
    with TemporaryDirectory() as folder:
        succeed_together(processes, *shared(processes), f"output_dir={folder}")
        return final_state(Path(folder, "demo"))


def fill(disk: Path) -> Path:
    """Take all the room that is left. -> the file that takes it"""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


def assert_same_state(ours: dict, expected: dict) -> None:
    """Weights, optimiser and step, bit for bit."""
    assert ours["step"] == expected["step"]
    assert ours["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][index][name], value), (index, name)
