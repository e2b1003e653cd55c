"""Run a worker on this machine: in this process, or in several that are started as torchrun would.

torchrun's own agent kills processes 30 seconds after telling them to stop; saving a checkpoint may
take longer.
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

from launch.command import leave, run_configured_worker
from launch.config import ConfigError, job_directory, processes_per_node
from launch.console import open_streams
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


def run_processes(cfg: DictConfig, count: int) -> int:
    """-> exit code"""
    # The threads are shared among the processes before any of them loads torch.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
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
    processes = []
    for rank in range(count):
        variables = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = [OmegaConf.to_container(cfg), variables]
        processes.append(spawn.Process(target=run_and_exit, args=arguments, name=f"rank {rank}"))
    with closing(PassedOn(processes)) as signals:
        for process in processes:
            process.start()
            if signals.received:
                tell(processes, signals.received[-1])  # it came while this one was being started
                break
        return wait_for_all(processes, signals.received)


def run_and_exit(config: dict, variables: dict[str, str]) -> None:
    """What each of several processes does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before training answers it
    open_streams()
    os.environ.update(variables)
    if exit_code := run_configured_worker(config):
        leave(exit_code)


def run_side_by_side(configs: list[DictConfig], at_once: int, modules: Iterable[str] = ()) -> int:
    """So many runs at a time, each in a process of its own. They are forked from one that imports
    their workers, and these modules, once. -> exit code"""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // at_once)))
    multiprocessing.set_forkserver_preload([*{cfg.worker for cfg in configs}, *modules, __name__])
    waiting, exit_codes, begin = list(configs), [], time.monotonic()
    running: dict[int, BaseProcess] = {}  # by place
    processes: list[BaseProcess] = []
    with closing(PassedOn(processes)) as signals:
        while waiting or running:
            for place in range(at_once):
                if waiting and place not in running:
                    running[place] = new_run(waiting.pop(0), place)
                    processes.append(running[place])
                    running[place].start()
                    if signals.received:  # it came while this one was being started
                        tell([running[place]], signals.received[-1])
                if signals.received:  # once: told again, they would leave without saving
                    waiting.clear()
            wait([process.sentinel for process in running.values()], timeout=1)
            for place, process in [*running.items()]:
                if not process.is_alive():
                    del running[place]
                    code = process.exitcode or 0
                    exit_codes.append(code if code >= 0 else 1)
                    took = (time.monotonic() - begin) / len(exit_codes)
                    left = timedelta(seconds=int(took * (len(configs) - len(exit_codes))))
                    what = f"exit code {code}" if code else "done"
                    progress = f"{len(exit_codes)} of {len(configs)}, eta {left}"
                    print(f"{process.name}: {what} ({progress})", flush=True)
    return 128 + signals.received[0] if signals.received else max(exit_codes)


def new_run(cfg: DictConfig, place: int) -> BaseProcess:
    """With a GPU of its own, if it wants one."""
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


def tell(processes: Sequence[BaseProcess], number: int) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


class PassedOn(Signals):
    """Passes signals on to the processes; the same one again kills them and leaves."""

    def __init__(self, processes: Sequence[BaseProcess]):
        self.processes = processes
        super().__init__()

    def handle(self, number: int, frame: FrameType | None) -> None:
        super().handle(number, frame)
        tell(self.processes, number)

    def leave_at_once(self, number: int) -> None:
        tell(self.processes, signal.SIGKILL)
        os._exit(128 + number)


def wait_for_all(processes: Sequence[BaseProcess], received: list[int]) -> int:
    """Until all have ended, or one has failed. -> exit code"""
    told_at = said_at = None
    while running := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in running], timeout=0.5)
        saved = {128 + number for number in received}
        codes = enumerate(process.exitcode for process in processes)
        if failed := {rank: code for rank, code in codes if code and code not in saved}:
            end(running)
            # A process that does not handle signals yet is ended by the one that was passed on.
            unasked = {rank: code for rank, code in failed.items() if -code not in received}
            return exit_code_of(unasked) if unasked else 128 + received[0]
        now = time.monotonic()
        if received and told_at is None:
            told_at = said_at = now
        if received and now - said_at > SAY_SECONDS:
            said_at = now
            print(
                f"waiting for {len(running)} processes to save, for {now - told_at:.0f} s now; "
                f"Ctrl-C again leaves at once, without saving",
                file=sys.stderr,
                flush=True,
            )
    return max(process.exitcode or 0 for process in processes)


def end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def exit_code_of(failed: dict[int, int]) -> int:
    """Of the whole, from those of the processes that failed. One that was ended by a signal
    (negative: out of memory, a crash) could not report it itself."""
    said = [exit_code for exit_code in failed.values() if exit_code > 0]
    if said:
        return min(said)
    rank, exit_code = next(iter(failed.items()))
    name = signal.Signals(-exit_code).name
    print(f"[rank {rank}] error: ended by {name}", file=sys.stderr, flush=True)
    return 1
