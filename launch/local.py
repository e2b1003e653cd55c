"""Run a worker on this machine: in this process, or in several that are started as torchrun would.

torch's own agent (elastic launch) does not tell what processes that were asked to stop ended with,
does not end those that wait for one which has failed while saving, and does not leave at once when
it is interrupted again.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from launch.command import leave, open_streams, run_configured_worker
from launch.config import ConfigError, job_directory, processes_per_node
from launch.validate import check_processes
from util.signals import Signals

SAY_SECONDS = 10
# After one process has failed the others may be stuck waiting for it, and not answer a signal.
END_SECONDS = 30


def run_here(cfg: DictConfig) -> int:
    """-> exit code"""
    if cfg.env.world_size > 1:
        valid = "1 without Slurm (this machine); on more nodes start torchrun main_lmim.py by hand"
        raise ConfigError(f"env.world_size={cfg.env.world_size}: expected {valid}")
    if cfg.env.ngpu is None:
        present = torch.cuda.device_count()
        cfg.env.ngpu = present if cfg.env.distributed else min(present, 1)
    if cfg.env.ngpu == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update({name: str(value) for name, value in cfg.env.nccl.items()})
    check_processes(cfg, torch.cuda.device_count(), os.cpu_count() or 1)
    if processes_per_node(cfg) == 1:
        return run_configured_worker(OmegaConf.to_container(cfg))
    return run_processes(cfg, processes_per_node(cfg))


def share_threads(processes: int) -> None:
    """Among processes, before any of them loads torch. What the user has set counts."""
    share = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


def run_processes(cfg: DictConfig, count: int) -> int:
    """-> exit code"""
    share_threads(count)
    # Opened here, so that the port is taken before the processes are told of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 need not open one
    }
    spawn = multiprocessing.get_context("spawn")
    with closing(Processes()) as processes:
        for rank in range(count):
            variables = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = [OmegaConf.to_container(cfg), variables]
            processes.start(spawn.Process(target=run_and_exit, args=arguments))
        return processes.wait_for_all()


def run_and_exit(config: dict, variables: dict[str, str]) -> None:
    """What each of several processes does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before training answers it
    open_streams()
    os.environ.update(variables)
    leave(run_configured_worker(config))


def run_side_by_side(configs: list[DictConfig], at_once: int, modules: Iterable[str] = ()) -> int:
    """Run so many at a time, each in a process of its own. They are forked from one that imports
    their workers, and these modules, once. -> exit code"""
    share_threads(at_once)
    multiprocessing.set_forkserver_preload([*{cfg.worker for cfg in configs}, *modules, __name__])
    waiting, exit_codes, begin = list(configs), [], time.monotonic()
    running: dict[int, BaseProcess] = {}  # by place
    with closing(Processes()) as processes:
        while waiting or running:
            for place in range(at_once):
                if waiting and place not in running:
                    running[place] = new_run(waiting.pop(0), place)
                    processes.start(running[place])
                if processes.received:
                    waiting.clear()
            wait([process.sentinel for process in running.values()], timeout=1)
            for place, process in [*running.items()]:
                if process.is_alive():
                    continue
                del running[place]
                code = process.exitcode or 0
                exit_codes.append(code if code >= 0 else 1)
                took = (time.monotonic() - begin) / len(exit_codes)
                left = timedelta(seconds=int(took * (len(configs) - len(exit_codes))))
                what = f"exit code {code}" if code else "done"
                progress = f"{len(exit_codes)} of {len(configs)}, eta {left}"
                print(f"{process.name}: {what} ({progress})", flush=True)
    return 128 + processes.received[0] if processes.received else max(exit_codes)


def new_run(cfg: DictConfig, place: int) -> BaseProcess:
    """Return the process of a run, with a GPU of its own if it wants one."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    own = {"CUDA_VISIBLE_DEVICES": visible[place % count]} if count and cfg.env.ngpu == 1 else {}
    process = multiprocessing.get_context("forkserver").Process
    return process(target=run_into_log, args=[OmegaConf.to_container(cfg), own], name=cfg.job_name)


def run_into_log(config: dict, variables: dict[str, str]) -> None:
    """What each of several runs does. What it prints is in its job's logs/output.txt."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(variables)
    cfg = OmegaConf.create(config)
    path = job_directory(cfg) / "logs" / "output.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    leave(run_here(cfg))


class Processes(Signals):
    """Gets signals and passes them on to the processes; the same one again kills them and leaves.
    (Each of them is told once: told again, it would leave without saving.)"""

    def __init__(self) -> None:
        self.started: list[BaseProcess] = []
        super().__init__()

    def start(self, process: BaseProcess) -> None:
        self.started.append(process)
        process.start()
        if self.received:  # it came while this one was being started
            tell([process], self.received[-1])

    def handle(self, number: int, frame: FrameType | None) -> None:
        super().handle(number, frame)
        tell(self.started, number)

    def leave_at_once(self, number: int) -> None:
        tell(self.started, signal.SIGKILL)
        os._exit(128 + number)

    def wait_for_all(self) -> int:
        """Until all have ended, or one has failed. -> exit code"""
        said = 0
        while running := [process for process in self.started if process.is_alive()]:
            wait([process.sentinel for process in running], timeout=0.5)
            saved = {128 + number for number in self.received}
            codes = enumerate(process.exitcode for process in self.started)
            if failed := {rank: code for rank, code in codes if code and code not in saved}:
                end(running)
                return exit_code_of(failed, self.received)
            waited = int(time.monotonic() - self.received_at)
            if self.received and waited // SAY_SECONDS > said:
                said = waited // SAY_SECONDS
                what = f"waiting for {len(running)} processes to save, for {waited} s now"
                ways = "Ctrl-C again leaves at once, without saving"
                print(f"{what}; {ways}", file=sys.stderr, flush=True)
        return max(process.exitcode or 0 for process in self.started)


def tell(processes: list[BaseProcess], number: int) -> None:
    for process in processes:
        if process.is_alive() and process.pid:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def exit_code_of(failed: dict[int, int], received: Sequence[int] = ()) -> int:
    """Return that of the whole, from those of the processes that failed. One that was ended by a
    signal (negative: out of memory, a crash) could not report it itself; or it was told to stop
    before it handled signals."""
    said = [exit_code for exit_code in failed.values() if exit_code > 0]
    if said:
        return min(said)
    rank, exit_code = next(iter(failed.items()))
    if -exit_code in received:
        return 128 - exit_code
    name = signal.Signals(-exit_code).name
    print(f"[rank {rank}] error: ended by {name}", file=sys.stderr, flush=True)
    return 1
