"""The launcher in a process that is forked from one which has imported everything, and so are the
processes that it starts: each is there at once."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from launch import command, local
from tests.forked import ROOT, SERVER
from util.signals import STOP_SIGNALS


class Launched:
    """What it prints is in folder/stdout and folder/stderr. Modules are looked for in folder, too.
    nobody: "closed" or "gone" instead. spawns: the processes that it starts are new ones after all.
    threads: OMP_NUM_THREADS, None: not set. variables: of launch.local and launch.command"""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        nobody: str = "",
        spawns: bool = False,
        threads: str | None = "1",
        **variables: float,
    ):
        self.output, self.errors = folder / "stdout", folder / "stderr"
        how = {"nobody": nobody, "spawns": spawns, "threads": threads, "variables": variables}
        self._process = SERVER.Process(target=become_launcher, args=(folder, arguments), kwargs=how)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """-> exit code, what it printed on stdout and stderr"""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        texts = [path.read_text() if path.exists() else "" for path in (self.output, self.errors)]
        return self.poll(), *texts

    def kill(self) -> None:
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


def become_launcher(
    folder: Path,
    arguments: list[str],
    nobody: str,
    spawns: bool,
    threads: str | None,
    variables: dict[str, float],
) -> None:
    assert "main_lmim" in sys.modules, "nothing has been imported before the fork"
    os.setsid()
    leave_streams(folder, nobody)
    os.environ.pop("OMP_NUM_THREADS")
    os.environ |= {"OMP_NUM_THREADS": threads} if threads else {}
    os.environ |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""}
    os.chdir(ROOT)
    sys.path.append(str(folder))
    for name, value in variables.items():
        module = next(module for module in (local, command) if hasattr(module, name))
        setattr(module, name, value)
    if not spawns:
        fork = multiprocessing.get_context("fork")
        given = multiprocessing.get_context
        multiprocessing.get_context = lambda name=None: fork if name == "spawn" else given(name)
        os.register_at_fork(after_in_child=handle_no_signals)
    sys.argv = ["launcher.py", *arguments]
    runpy.run_path(str(ROOT / "launcher.py"), run_name="__main__")


def leave_streams(folder: Path, nobody: str) -> None:
    if nobody == "closed":
        for descriptor in range(3):
            os.close(descriptor)
        sys.stdin = sys.stdout = sys.stderr = None  # as Python does when it starts
        return
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        reader, place = os.pipe()
        os.close(reader)
        if nobody != "gone":
            place = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(place, descriptor)


def handle_no_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
