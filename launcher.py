"""Compose the configuration of a run, check it, and run it: here, or on Slurm.

python launcher.py --config-name=demo
python launcher.py --config-name=lmim dataset=imagenet data_path=/path/to/imagenet env.ngpu=8 ...
"""

import importlib
import logging
import os
import signal
import sys
import traceback

from omegaconf import DictConfig, OmegaConf

from util.command import call, stop
from util.config import ConfigError, compose_config, parse_command_line, processes_per_node
from util.validate import check_config, check_gpus


def main() -> None:
    command = parse_command_line(sys.argv[1:], description=__doc__)
    try:
        cfg = compose_config(command.config_name, command.overrides, command.config_dir)
        if command.show_config:
            print(OmegaConf.to_yaml(cfg), end="")
            return
        check_config(cfg)
        exit_code = launch(cfg)
    except ConfigError as error:
        stop(error)
    sys.exit(exit_code)


def launch(cfg: DictConfig) -> int:
    """-> exit code. Torch is imported only where something runs on this machine."""
    if cfg.env.slurm:
        from util.slurm import submit

        return submit(cfg)
    if cfg.env.world_size > 1:
        raise ConfigError(
            f"env.world_size={cfg.env.world_size}: valid without Slurm is 1 (this machine); on "
            f"more nodes start torchrun main_lmim.py by hand"
        )
    if cfg.env.ngpu == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_gpus(cfg.env.ngpu, present_gpus())
    if processes_per_node(cfg) == 1:
        return run_worker(OmegaConf.to_container(cfg))
    return run_processes(cfg, processes_per_node(cfg))


def run_worker(config: dict) -> int:
    """One process of the worker that the config names."""
    cfg = OmegaConf.create(config)
    return call(importlib.import_module(cfg.worker).main, cfg)


def run_worker_and_exit(config: dict) -> None:
    """What each of several processes does. A bug's traceback is printed here, by the process that
    met it: torchrun's own report of it comes wrapped in three others."""
    try:
        exit_code = run_worker(config)
    except Exception:
        print(f"[rank {os.environ['RANK']}]", traceback.format_exc(), file=sys.stderr, flush=True)
        exit_code = 1
    sys.exit(exit_code)


def run_processes(cfg: DictConfig, processes: int) -> int:
    """Several processes on this machine, through torchrun's API."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
        elastic_launch(config, run_worker_and_exit)(OmegaConf.to_container(cfg))
    except ChildFailedError as error:
        return exit_code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


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


def present_gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
