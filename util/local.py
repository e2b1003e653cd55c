"""Run a worker on this machine: in this process, or in several through torchrun's API."""

import logging
import os
import signal
import sys

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from util.command import leave, run_configured_worker
from util.config import ConfigError, processes_per_node
from util.validate import check_gpus


def run_here(cfg: DictConfig) -> int:
    """-> exit code"""
    if cfg.env.world_size > 1:
        raise ConfigError(
            f"env.world_size={cfg.env.world_size}: valid without Slurm is 1 (this machine); on "
            f"more nodes start torchrun main_lmim.py by hand"
        )
    if cfg.env.ngpu == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update({name: str(value) for name, value in cfg.env.nccl.items()})
    check_gpus(cfg.env.ngpu, torch.cuda.device_count())
    if processes_per_node(cfg) == 1:
        return run_configured_worker(OmegaConf.to_container(cfg))
    return run_processes(cfg, processes_per_node(cfg))


def run_processes(cfg: DictConfig, processes: int) -> int:
    # The threads are shared among the processes before any of them loads torch.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The process that fails says why; torchrun would add a page about that it did.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=cfg.job_name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, run_and_exit)(OmegaConf.to_container(cfg))
    except ChildFailedError as error:
        return exit_code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as interruption:  # the processes have saved and said so
        return 128 + interruption.sigval
    return 0


def run_and_exit(config: dict) -> None:
    """What each of several processes does."""
    if exit_code := run_configured_worker(config):
        leave(exit_code)


def exit_code_of(failed: dict[int, int]) -> int:
    """Exit code of the whole, from those of the processes that failed. One that a signal ended
    (negative: out of memory, a crash) could not say so itself."""
    said = [exit_code for exit_code in failed.values() if exit_code > 0]
    if said:
        return min(said)
    for rank, exit_code in failed.items():
        name = signal.Signals(-exit_code).name
        print(f"[rank {rank}] error: ended by {name}", file=sys.stderr, flush=True)
    return 1
