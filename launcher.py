"""Compose the configuration of a run, check it, and run it: here, or on Slurm.

python launcher.py --config-name=demo
python launcher.py --config-name=lmim dataset=imagenet data_path=/path/to/imagenet env.ngpu=8 ...
python launcher.py -m seed=1,2,3 ...    (a sweep: one run per value)
"""

import os
import signal
import sys

if (
    __name__ in ("__main__", "__mp_main__")  # the second in the processes that it starts
    and signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # what a script starts with & ignores it
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback

from omegaconf import DictConfig, OmegaConf

from launch.command import leave, run_command_line, run_configured_worker
from launch.config import ConfigError
from launch.job import is_one_of_several


def launch(configs: list[DictConfig]) -> int:
    """-> exit code. Torch is imported only where something runs on this machine."""
    cfg = configs[0]  # where to run is the same for all
    if cfg.env.slurm:
        if "RANK" in os.environ:  # each process of torchrun would submit a job
            raise ConfigError("env.slurm=True: expected to be started by python, not by torchrun")
        from launch.slurm import submit

        return submit(configs)
    if cfg.worker.startswith("launch."):  # status, report: one process, without torch
        return run_configured_worker(OmegaConf.to_container(cfg))
    from launch.results import is_finished

    if not is_one_of_several():  # what is missing
        configs = [cfg for cfg in configs if not is_finished(cfg)]
    if not configs:
        return 0
    if sys.stderr.isatty():  # torch takes seconds
        print(f"{cfg.get('job_name', cfg.worker)}: loading {cfg.worker} ...", file=sys.stderr)
    from launch.local import run_here, run_side_by_side

    if cfg.env.parallel > 1 and len(configs) > 1:
        return run_side_by_side(configs, cfg.env.parallel)
    worst = 0
    for cfg in configs:
        worst = max(worst, run_here(cfg))
        if worst > 128:  # interrupted: the rest of a sweep is not wanted either
            break
    return worst


if __name__ == "__main__":
    leave(run_command_line(launch, description=__doc__))
