"""Programs of the project in processes that are forked from one which has imported everything: each
in a process of its own, but its start takes a moment where Python's takes five seconds."""

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

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        reader, writer = SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=become, args=[arguments, environment, writer])
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid

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

    def communicate(self, timeout: float) -> tuple[str, None]:
        output = []
        reading = Thread(target=lambda: output.append(self.stdout.read()), daemon=True)
        reading.start()
        reading.join(timeout)
        if reading.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        self.wait()
        self.stdout.close()
        return output[0], None


def become(arguments: list[str], environment: dict[str, str], output: Connection) -> None:
    assert "main_lmim" in sys.modules, "nothing has been imported before the fork"
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = list(arguments)
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
