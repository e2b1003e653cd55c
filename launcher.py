"""Compose the configuration of a run, check it, and run it: here, or on Slurm.

  python launcher.py --config-name=demo
  python launcher.py --config-name=lmim dataset=imagenet data_path=/path/to/imagenet env.ngpu=8 ...
"""

import importlib
import os
import sys

from omegaconf import DictConfig, OmegaConf

from util.command import call, stop
from util.config import ConfigError, compose_config, parse_command_line
from util.validate import check_config


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
            f"env.world_size={cfg.env.world_size}: valid without Slurm is 1 (this machine); on more "
            f"nodes start torchrun main_lmim.py by hand"
        )
    check_gpus(cfg)
    if cfg.env.ngpu == 1:
        return run_worker(OmegaConf.to_container(cfg))
    return run_processes(cfg)


def run_worker(config: dict) -> int:
    """One process of the worker that the config names."""
    cfg = OmegaConf.create(config)
    return call(importlib.import_module(cfg.worker).main, cfg)


def run_worker_and_exit(config: dict) -> None:
    sys.exit(run_worker(config))


def run_processes(cfg: DictConfig) -> int:
    """env.ngpu processes on this machine, through torchrun's API."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The threads are shared among the processes before any of them loads torch.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // cfg.env.ngpu)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cfg.env.ngpu,
        run_id=cfg.job_name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, run_worker_and_exit)(OmegaConf.to_container(cfg))
    except ChildFailedError as error:
        # The process that failed has said why.
        return min(failure.exitcode for failure in error.failures.values()) or 1
    return 0


def check_gpus(cfg: DictConfig) -> None:
    import torch

    present = torch.cuda.device_count()
    if 0 < present < cfg.env.ngpu:
        raise ConfigError(f"env.ngpu={cfg.env.ngpu}: valid is 1 to {present}, the GPUs present")


if __name__ == "__main__":
    main()
