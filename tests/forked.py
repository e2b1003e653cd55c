"""Programs of the project in processes that are forked from one which has imported everything: each
in a process of its own, but its start takes a moment where Python's takes five seconds."""

import faulthandler
import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("main_lmim", "launch.local", "launch.slurm"),
        *("eval.nn", "eval.finetune", "eval.linear_probe", "eval.segmentation", "eval.video"),
        *("sklearn.datasets", "sklearn.linear_model", "torch.utils.tensorboard"),
    ]
)


class Forked:
    """As subprocess.Popen([python, *arguments], stdout=PIPE, stderr=STDOUT, text=True,
    start_new_session=True), as far as the tests use it."""

    def __init__(self, arguments: list[str], environment: dict[str, str], terminal: str = ""):
        """terminal: in place of the pipe, and as its controlling terminal"""
        reader, writer = SERVER.Pipe(duplex=False)
        given = (arguments, environment, writer, terminal)
        self._process = SERVER.Process(target=become, args=given)
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid
        self._output: list[str] = []
        self._reading: Thread | None = None

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def _read(self) -> None:
        self._output.append(self.stdout.read())

    def communicate(self, timeout: float) -> tuple[str, None]:
        if self._reading is None:
            self._reading = Thread(target=self._read, daemon=True)
            self._reading.start()
        self._reading.join(timeout)
        if self._reading.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        self.wait()
        self.stdout.close()
        return self._output[0], None


def become(
    arguments: list[str], environment: dict[str, str], output: Connection, terminal: str
) -> None:
    assert "main_lmim" in sys.modules, "nothing has been imported before the fork"
    os.setsid()
    # Of a process without a terminal the first that it opens is the one that controls it.
    place = os.open(terminal, os.O_RDWR) if terminal else output.fileno()
    for descriptor in (1, 2):
        os.dup2(place, descriptor)
    output.close()
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = list(arguments)
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
